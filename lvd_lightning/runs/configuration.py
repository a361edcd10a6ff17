"""From the plain values of a configuration to an experiment; every mistake that can be seen before training is."""

import inspect
import json
import os
import secrets
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import cache, partial
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.loggers import Logger

from lvd_lightning.context import StageContext
from lvd_lightning.files import write_atomically
from lvd_lightning.runs.experiment import STAGES, Experiment, Stage
from lvd_lightning.stages.stage import StageModule

__all__ = ["experiment_from", "make", "merge"]

# Where the pipeline decides, and why.
_OWNED = {
    "default_root_dir": "each stage has its own folder in the run directory",
    "enable_checkpointing": "without checkpoints a stage cannot hand on what it learned",
    "fast_dev_run": "it writes no checkpoints; use max_epochs: 1, limit_train_batches: 1 and limit_val_batches: 1",
    "barebones": "it writes no checkpoints",
    "use_distributed_sampler": "datamodules divide batches over ranks themselves",
}
_DEVICES = ("accelerator", "devices", "num_nodes")
# What changes where and how fast a stage runs, or what it prints, but not what it computes.
_HARMLESS = (
    *_DEVICES,
    *("strategy", "plugins", "logger", "enable_progress_bar", "enable_model_summary", "log_every_n_steps"),
    *("profiler", "detect_anomaly", "num_sanity_val_steps", "max_time"),
)
_HARMLESS_LATENTS = ("batch_size", "keep_features", "num_threads")
# Stages before this one do not depend on a shared value.
_SHARED_FROM = {"num_clusters": "latents"}


def experiment_from(config: Mapping[str, Any]) -> Experiment:
    """The experiment that a resolved configuration describes.

    config: name, seed, run_dir, shared, data, trainer, and stages with model, data and trainer each.

    Raises:
        ValueError: an unknown setting, one that the pipeline decides, or a stage without a model.
    """
    name, stages = str(config.get("name") or ""), config.get("stages") or {}
    if not name or Path(name).name != name or name.startswith("."):
        raise ValueError(f"name {name!r} does not name a directory: give the run one, in its config or by --name")
    present = [stage for stage in STAGES if _is_present(stage, stages.get(stage))]
    if not present:
        raise ValueError("the experiment has no stages: give one by --config, for example --config photos")
    if not config.get("data"):
        raise ValueError(
            "the experiment has no data: give it a datamodule, as in data: {class_path: datamodules.Photos}"
        )
    top = dict(config.get("trainer") or {})
    datamodule = cache(lambda text: partial(make, LightningDataModule, json.loads(text)))
    data = datamodule(json.dumps(config["data"]))
    made = [
        _stage(stage, stages[stage], config, lambda settings: datamodule(json.dumps(settings))) for stage in present
    ]
    return Experiment(
        name=name,
        run_dir=Path(config.get("run_dir", "runs")) / name,
        seed=int(config.get("seed", 0)),
        data=data,
        stages=tuple(made),
        shared=dict(config.get("shared") or {}),
        devices={key: top[key] for key in _DEVICES if key in top},
        config=config,
    )


def make(kind: type, config: Mapping[str, Any]) -> Any:
    """Make an object of a class or subclass of `kind` from {class_path, init_args}."""
    parser = _subclass_parser(kind)
    return parser.instantiate(_parsed(parser, {"object": config})).object


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, all else replaced; another class brings its own arguments."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return dict(over)
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


def _is_present(name: str, settings: Mapping[str, Any] | None) -> bool:
    if settings is None:
        return False
    if name == "latents" or settings.get("model"):
        return True
    if settings.get("data") or settings.get("trainer"):
        raise ValueError(f"stages.{name} has settings but no model: give it one, or make the stage null")
    return False


def _stage(
    name: str,
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    datamodule: Callable[[Mapping[str, Any]], Callable[[], LightningDataModule]],
) -> Stage:
    data = config["data"]
    if name != "latents" and settings.get("data"):
        data = settings["data"]
    shared = {key: value for key, value in (config.get("shared") or {}).items() if _reaches(key, name)}
    recorded = {"seed": config.get("seed", 0), "shared": shared, "data": _without_workers(data)}
    if name == "latents":
        _check_latents(settings)
        recorded["settings"] = {key: value for key, value in settings.items() if key not in _HARMLESS_LATENTS}
        return Stage(name, recorded, datamodule(data), function=partial(_run_latents, dict(settings)))
    trainer = merge(config.get("trainer") or {}, settings.get("trainer") or {})
    _check_trainer(name, trainer, config.get("trainer") or {})
    recorded["model"] = settings["model"]
    recorded["trainer"] = {key: value for key, value in trainer.items() if key not in _HARMLESS}
    return Stage(
        name,
        recorded,
        datamodule(data),
        model=partial(make, StageModule, settings["model"]),
        trainer=partial(_trainer_arguments, trainer, str(config["name"])),
        callbacks=partial(_callbacks, trainer),
    )


def _check_latents(settings: Mapping[str, Any]) -> None:
    from lvd_lightning.latents import LatentsSettings

    LatentsSettings.from_mapping(settings)


def _run_latents(settings: dict[str, Any], context: StageContext) -> dict[str, float]:
    from lvd_lightning.latents import run_latents

    return run_latents(context, settings)


def _reaches(key: str, stage: str) -> bool:
    return STAGES.index(stage) >= STAGES.index(_SHARED_FROM.get(key, STAGES[0]))


def _without_workers(data: Mapping[str, Any]) -> dict[str, Any]:
    arguments = {key: value for key, value in (data.get("init_args") or {}).items() if key != "num_workers"}
    return {**data, "init_args": arguments}


def _check_trainer(stage: str, trainer: Mapping[str, Any], top: Mapping[str, Any]) -> None:
    """Raise a ValueError for what a Trainer would not take, or what is not a stage's to say."""
    for key in trainer:
        if key in _OWNED:
            raise ValueError(f"trainer.{key} cannot be set: {_OWNED[key]}")
        if key in _DEVICES and trainer[key] != top.get(key):
            raise ValueError(
                f"stages.{stage}.trainer.{key} cannot be set: one job runs all stages, on the same devices; "
                f"set trainer.{key}"
            )
    known = [name for name in inspect.signature(Trainer.__init__).parameters if name not in (*_OWNED, "self")]
    unknown = [key for key in trainer if key not in known]
    if unknown:
        raise ValueError(f"stages.{stage}: the Trainer has no argument {unknown[0]!r}; it takes {', '.join(known)}")
    for key, value in trainer.items():
        if isinstance(value, Mapping) and any("." in str(name) for name in value):
            raise ValueError(
                f"trainer.{key} can only be given as a whole on the command line: --trainer.{key} '{{...}}'"
            )
    parsed = _parsed(_trainer_parser(), {"trainer": _without_loggers(trainer)}, f"stages.{stage}: ")
    try:
        _trainer_parser().instantiate(parsed)  # the callbacks
    except ValueError as error:
        raise ValueError(f"stages.{stage}.trainer: {error}") from error
    for logger in _logger_configs(trainer):
        _parsed(_subclass_parser(Logger), {"object": logger}, f"stages.{stage}: trainer.logger: ")


def _trainer_arguments(trainer: Mapping[str, Any], experiment: str, folder: Path) -> dict[str, Any]:
    """Arguments of the Trainer, with callbacks and loggers made afresh."""
    parser = _trainer_parser()
    made = parser.instantiate(_parsed(parser, {"trainer": _without_loggers(trainer)})).trainer
    arguments = {key: made[key] for key in trainer if key in made}
    if arguments.get("callbacks") is not None:
        arguments["callbacks"] = _as_list(arguments["callbacks"])
    loggers = [make(Logger, _placed(logger, experiment, folder)) for logger in _logger_configs(trainer)]
    return {**arguments, "logger": loggers}


def _callbacks(trainer: Mapping[str, Any]) -> list[Any]:
    """The callbacks alone, made afresh."""
    parser = _trainer_parser()
    values = {key: value for key, value in trainer.items() if key == "callbacks"}
    return _as_list(parser.instantiate(_parsed(parser, {"trainer": values})).trainer.get("callbacks"))


def _as_list(found: Any) -> list[Any]:
    return [] if found is None else found if isinstance(found, list) else [found]


def _without_loggers(trainer: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in trainer.items() if key != "logger"}


def _logger_configs(trainer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The loggers beside metrics.csv, which is always written: none for true, false and null."""
    given = trainer.get("logger")
    listed = given if isinstance(given, list) else [given]
    return [
        {"class_path": logger} if isinstance(logger, str) else logger
        for logger in listed
        if isinstance(logger, (str, dict))
    ]


def _placed(config: Mapping[str, Any], experiment: str, folder: Path) -> dict[str, Any]:
    """A logger's configuration with what it does not say: its folder and, for W&B, its names and how it goes on.

    Weights & Biases continues a run only under an id that was stored, and asks for an account unless it is offline.
    """
    arguments: dict[str, Any] = {"save_dir": str(folder)}
    if str(config["class_path"]).endswith("WandbLogger"):
        account = "WANDB_API_KEY" in os.environ or "WANDB_MODE" in os.environ
        arguments |= {"name": f"{experiment}/{folder.name}", "group": experiment}
        arguments |= {"offline": not account, "id": _stored_id(folder)}
    return {**config, "init_args": {**arguments, **(config.get("init_args") or {})}}


def _stored_id(folder: Path) -> str:
    path = folder / "wandb_id.txt"
    if not path.is_file():
        write_atomically(path, secrets.token_hex(4))
    return path.read_text()


@cache
def _subclass_parser(kind: type) -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "object", fail_untyped=False, required=True)
    return parser


@cache
def _trainer_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    owned = {*_OWNED, "logger"}
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, skip=owned)
    return parser


def _parsed(parser: ArgumentParser, values: Mapping[str, Any], where: str = "") -> Any:
    try:
        return parser.parse_object(deepcopy(dict(values)))  # it turns nested values into its own, in place
    except ArgumentError as error:
        raise ValueError(f"{where}{error}") from error

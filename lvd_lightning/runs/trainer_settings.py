"""What a stage's Trainer is told: checked before any stage runs, made into arguments when its stage runs."""

import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger

from lvd_lightning.runs.objects import make, parsed, subclass_parser
from lvd_lightning.stages.stage import StageModule

__all__ = [
    "DEVICES",
    "HARMLESS",
    "check_precision",
    "check_trainer",
    "check_without_gradients",
    "make_callbacks",
    "not_for",
    "trainer_arguments",
    "wandb_settings",
]

# Where the pipeline decides, and why.
_OWNED = {
    "default_root_dir": "each stage has its own folder in the run directory",
    "enable_checkpointing": "without checkpoints a stage cannot hand on what it learned",
    "fast_dev_run": "it writes no checkpoints; use max_epochs: 1, limit_train_batches: 1 and limit_val_batches: 1",
    "barebones": "it writes no checkpoints",
    "use_distributed_sampler": "datamodules divide batches over ranks themselves",
}
_FULL_PRECISIONS = ("32", "32-true", "64", "64-true")
ACCUMULATE = "accumulate_grad_batches"
_CLIPPING = ("gradient_clip_val", "gradient_clip_algorithm")
DEVICES = ("accelerator", "devices", "num_nodes")
#: What changes where and how fast a stage runs, or what it prints, but not what it computes.
HARMLESS = (
    *DEVICES,
    *("strategy", "plugins", "logger", "enable_progress_bar", "enable_model_summary", "log_every_n_steps"),
    *("profiler", "detect_anomaly", "num_sanity_val_steps", "max_time"),
)


def check_trainer(stage: str, trainer: Mapping[str, Any], top: Mapping[str, Any]) -> None:
    """Raise a ValueError for what a Trainer would not take, or what is not a stage's to say.

    trainer: of the stage, laid over that of the experiment, `top`.
    """
    for key in trainer:
        if key in _OWNED:
            raise ValueError(f"trainer.{key} cannot be set: {_OWNED[key]}")
        if key in DEVICES and trainer[key] != top.get(key):
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
    for key in ("check_val_every_n_epoch", "limit_train_batches"):
        if trainer.get(key) == 0 and not isinstance(trainer[key], bool):
            raise ValueError(f"stages.{stage}.trainer.{key}: got 0, expected more: a stage could not do its work")
    values = parsed(_trainer_parser(), {"trainer": _without_loggers(trainer)}, f"stages.{stage}: ")
    try:
        _trainer_parser().instantiate(values)  # the callbacks
    except ValueError as error:
        raise ValueError(f"stages.{stage}.trainer: {error}") from error
    for logger in _logger_configs(trainer):
        parsed(subclass_parser(Logger), {"object": _placed(logger, Path(stage))}, f"stages.{stage}: trainer.logger: ")


def check_precision(stage: str, precision: Any, model: str = "circuits") -> None:
    """Raise a ValueError for a precision in which circuits cannot be trained: sums of flows need 24 bits or more.

    Nor can normalizing flows, whose determinants are sums over all steps; model: which of them it is.

    Mixed precision is one of them: autocast rounds factors of sums to 8 or 11 bits, and the scale of its gradients,
    which an optimizer divides out, would change an EM step, whose gradients are flows.
    """
    if precision is not None and str(precision) not in _FULL_PRECISIONS:
        remedy = (
            f"to train a teacher in {precision}, set it there alone: --stages.teacher.trainer.precision {precision}"
        )
        if model != "circuits":
            remedy = f"set it for this stage alone: --stages.{stage}.trainer.precision 32-true"
        raise ValueError(
            f"stages.{stage}.trainer.precision: got {precision}, but {model} are trained in 32-true or 64-true; "
            f"{remedy}"
        )


def check_without_gradients(stage: str, kind: type[StageModule], trainer: Mapping[str, Any]) -> None:
    """Raise a ValueError for what a stage that EM trains is told about gradients; trainer: of the stage alone."""
    for key in not_for(kind):
        if trainer.get(key) is not None:
            why = "its batches are those of batch_size"
            if key in _CLIPPING:
                own = "clip" in inspect.signature(kind.__init__).parameters
                why = "set its model's clip" if own else "EM has no gradients that could be clipped"
            raise ValueError(f"stages.{stage}.trainer.{key} cannot be set: {why}")
    value = trainer.get(ACCUMULATE)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(
            f"stages.{stage}.trainer.{ACCUMULATE}: got {value!r}, expected a number of batches, at least 1"
        )


def not_for(kind: type[StageModule]) -> tuple[str, ...]:
    """Arguments of the Trainer that do not reach a stage of this class, if they are given for a whole experiment."""
    if not kind.em:
        return ()
    return _CLIPPING if kind.accumulates else (*_CLIPPING, ACCUMULATE)


def trainer_arguments(trainer: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments of the Trainer, with callbacks and loggers made afresh; folder: the stage's own.

    W&B is not among the loggers: see `wandb_settings`.
    """
    parser = _trainer_parser()
    made = parser.instantiate(parsed(parser, {"trainer": _without_loggers(trainer)})).trainer
    arguments = {key: made[key] for key in trainer if key in made}
    if arguments.get("callbacks") is not None:
        arguments["callbacks"] = _as_list(arguments["callbacks"])
    configs = [config for config in _logger_configs(trainer) if not _is_wandb(config)]
    return {**arguments, "logger": [make(Logger, _placed(config, folder)) for config in configs]}


def wandb_settings(trainer: Mapping[str, Any]) -> dict[str, Any] | None:
    """The arguments of the WandbLogger that the Trainer is told of; None if there is none."""
    found = [config for config in _logger_configs(trainer) if _is_wandb(config)]
    return dict(found[0].get("init_args") or {}) if found else None


def _placed(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A logger's configuration, with the folder that some of them do not work without."""
    return {**config, "init_args": {"save_dir": str(folder), **(config.get("init_args") or {})}}


def _is_wandb(config: Mapping[str, Any]) -> bool:
    return str(config["class_path"]).endswith("WandbLogger")


def make_callbacks(trainer: Mapping[str, Any]) -> list[Any]:
    """The callbacks alone, made afresh."""
    parser = _trainer_parser()
    values = {key: value for key, value in trainer.items() if key == "callbacks"}
    return _as_list(parser.instantiate(parsed(parser, {"trainer": values})).trainer.get("callbacks"))


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


@cache
def _trainer_parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    owned = {*_OWNED, "logger"}
    parser.add_class_arguments(Trainer, "trainer", fail_untyped=False, instantiate=False, skip=owned)
    return parser

"""An experiment: its stages in order, what each is made of, and how that compares with a run directory."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from omegaconf import OmegaConf

from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.files import write_atomically
from lvd_lightning.runs.bookkeeping import LAST_CHECKPOINT
from lvd_lightning.stages.stage import StageModule

__all__ = [
    "CHANGED",
    "EVALUATE",
    "REPORT",
    "STAGES",
    "Experiment",
    "Stage",
    "adopt_run_directory",
    "check_trained_with",
    "differences",
]

STAGES = ("teacher", "latents", "conditional", "prior", "finetune", "baseline")
EVALUATE = "evaluate"
REPORT = "report"
CHANGED = ("refuse", "restart", "continue")
_CONFIG = "config.yaml"


@dataclass(frozen=True)
class Stage:
    """One stage; everything costly is a function that is called when the stage is run.

    config: plain values that say what the stage is; a run directory made with other values is not continued.
    data: makes the datamodule; stages that hold the same function share one datamodule.
    model, trainer: make the module and the arguments of its Trainer (given the stage's folder); or else
    function: does the whole work of a stage that needs no Trainer, and returns figures for the report.
    callbacks: makes the callbacks that are among the Trainer's arguments; those with a method `check_module` are shown
        the module before any stage runs, and raise a ValueError if they cannot work on it.
    """

    name: str
    config: Mapping[str, Any]
    data: Callable[[], LightningDataModule]
    model: Callable[[], StageModule] | None = None
    trainer: Callable[[Path], dict[str, Any]] = field(default=lambda folder: {})
    function: Callable[[StageContext], dict[str, float]] | None = None
    callbacks: Callable[[], list[Any]] = list


@dataclass(frozen=True)
class Experiment:
    """Stages in order and what they share.

    run_dir: the run's own directory, `runs/<name>`.
    devices: the Trainer's accelerator, devices and num_nodes: the same for all stages, because one job runs them all.
    config: the resolved configuration as it is written into the run directory.
    """

    name: str
    run_dir: Path
    seed: int
    data: Callable[[], LightningDataModule]
    stages: tuple[Stage, ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    devices: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def stage(self, name: str) -> Stage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"this experiment has no stage {name!r}; its stages are {names}")


def differences(old: Any, new: Any, key: str = "") -> list[str]:
    """The dotted keys at which two nested configurations differ, each with its two values."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = [*old, *(name for name in new if name not in old)]
        missing: Any = "(absent)"
        pairs = [(f"{key}.{name}".lstrip("."), old.get(name, missing), new.get(name, missing)) for name in keys]
        return [line for name, a, b in pairs for line in differences(a, b, name)]
    return [] if old == new else [f"{key} {old} -> {new}"]


def adopt_run_directory(experiment: Experiment, changed: str = "refuse") -> None:
    """Make the run directory, or check that what it holds was made by this experiment.

    changed: what to do when a stage with a result or a checkpoint had another configuration:
        "refuse": a ValueError that names the keys;
        "restart": remove that stage and those after it, so that they start again;
        "continue": keep what there is and go on under the new configuration.
    """
    begun = [stage for stage in experiment.stages if _recorded(experiment, stage) is not None]
    found = {stage.name: differences(_recorded(experiment, stage), _plain(stage.config)) for stage in begun}
    found = {name: lines for name, lines in found.items() if lines}
    _check_order(experiment, [stage.name for stage in begun], changed)
    if found and changed == "refuse":
        lines = [f"{name}: {line}" for name, lines in found.items() for line in lines]
        shown = "; ".join(lines[:8]) + ("; ..." if len(lines) > 8 else "")
        raise ValueError(
            f"{experiment.run_dir} was begun with another configuration ({shown}): give this one another --name, or "
            f"say --changed restart to do stage {next(iter(found))!r} and those after it again, "
            "or --changed continue to keep what there is and go on"
        )
    if found and changed == "restart":
        _forget(experiment, next(iter(found)))
    elif found:
        for name in found:
            record_stage(experiment, experiment.stage(name))
    experiment.run_dir.mkdir(parents=True, exist_ok=True)
    _write_config(experiment.run_dir / _CONFIG, experiment.config)


def _check_order(experiment: Experiment, begun: list[str], changed: str) -> None:
    """Results must not stand on stages that came, went or were removed since: as `changed` says, see above.

    What comes after finetuning, which nothing builds on, may come and go.
    """
    names = [stage.name for stage in experiment.stages]
    used = [name for name in begun if name not in STAGES or STAGES.index(name) < len(STAGES) - 1]
    if not used:
        return
    last = names.index(used[-1])
    come = [name for name in names[:last] if name not in begun]
    gone = [
        name
        for name in STAGES[: STAGES.index(used[-1]) if used[-1] in STAGES else 0]
        if name not in names and (experiment.run_dir / name / DONE_MARKER).is_file()
    ]
    if not come and not gone:
        return
    if changed == "refuse":
        what = [f"stage {name!r} has no result there" for name in come] + [
            f"stage {name!r} is not part of this one" for name in gone
        ]
        raise ValueError(
            f"{experiment.run_dir} was begun with other stages ({'; '.join(what)}), and {used[-1]!r} has a result: "
            f"give this one another --name, or say --changed restart to do {(come + gone)[0]!r} and those after it "
            "again, or --changed continue to keep what there is and go on"
        )
    if changed == "restart":
        for name in gone:
            shutil.rmtree(experiment.run_dir / name, ignore_errors=True)
        after = [name for name in names if gone and name in STAGES and STAGES.index(name) > STAGES.index(gone[0])]
        _forget(experiment, min([*come, *after[:1]], key=names.index))


def record_stage(experiment: Experiment, stage: Stage) -> None:
    """Make the stage's folder and write down in it what the stage is."""
    folder = experiment.run_dir / stage.name
    folder.mkdir(parents=True, exist_ok=True)
    _write_config(folder / _CONFIG, stage.config)


def check_trained_with(experiment: Experiment, stage: str) -> None:
    """Raise a ValueError if a stage's result in the run directory is of other data or shared settings than these.

    Where the data lie and how many examples a batch has may differ.
    """
    path = experiment.run_dir / stage / _CONFIG
    if not path.is_file():
        return
    recorded: Any = OmegaConf.to_container(OmegaConf.load(path))
    mine = [found for found in experiment.stages if found.name == stage]
    config = _plain(mine[0].config if mine else experiment.config)
    parts = [
        line
        for key in ("seed", "shared", "data")
        for line in differences(recorded.get(key), config.get(key), key)
        if not line.startswith(("data.init_args.path ", "data.init_args.batch_size "))
    ]
    if parts:
        raise ValueError(
            f"{experiment.run_dir} was trained with other settings ({'; '.join(parts[:8])}): give the same as then, or "
            f"--config {experiment.run_dir / _CONFIG}"
        )


def _recorded(experiment: Experiment, stage: Stage) -> Any:
    """The configuration of a stage that has something to lose, a result or a checkpoint; else None."""
    folder = experiment.run_dir / stage.name
    worth_keeping = any((folder / name).is_file() for name in (DONE_MARKER, LAST_CHECKPOINT))
    path = folder / _CONFIG
    return OmegaConf.to_container(OmegaConf.load(path)) if worth_keeping and path.is_file() else None


def _write_config(path: Path, config: Mapping[str, Any]) -> None:
    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(_plain(config))))


def _forget(experiment: Experiment, first: str) -> None:
    names = [stage.name for stage in experiment.stages]
    for name in (*reversed(names[names.index(first) :]), EVALUATE, REPORT):
        shutil.rmtree(experiment.run_dir / name, ignore_errors=True)


def _plain(config: Any) -> Any:
    """The same values as YAML gives them back: lists for tuples, dicts for mappings."""
    if isinstance(config, Mapping):
        return {str(key): _plain(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_plain(value) for value in config]
    return config

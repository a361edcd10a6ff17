"""An experiment: its stages in order, and what each is made of."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from lvd_lightning.ranks import TIMEOUT_MINUTES
from lvd_lightning.stages.stage import Stage

__all__ = ["Experiment", "PlannedStage"]


@dataclass(frozen=True)
class PlannedStage:
    """One stage of an experiment; everything costly is a function that is called when the stage is run.

    kind: its class, which says what the stage leaves.
    config: plain values that say what the stage is; a run directory made with other values is not continued.
    data: makes the datamodule; stages that hold the same function share one datamodule.
    model: makes the stage itself.
    trainer: makes the arguments of its Trainer (given the stage's folder), for a `StageModule`.
    callbacks: makes the callbacks that are among the Trainer's arguments; those with a method `check_module` are shown
        the module before any stage runs, and raise a ValueError if they cannot work on it.
    wandb: arguments of a WandbLogger if the stage logs to the experiment's W&B run; else None.
    """

    name: str
    kind: type[Stage]
    config: Mapping[str, Any]
    data: Callable[[], LightningDataModule]
    model: Callable[[], Stage]
    trainer: Callable[[Path], dict[str, Any]] = field(default=lambda folder: {})
    callbacks: Callable[[], list[Any]] = list
    wandb: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Experiment:
    """Stages in order and what they share.

    run_dir: the run's own directory, `runs/<name>`.
    devices: the Trainer's accelerator, devices and num_nodes: the same for all stages, because one job runs them all.
    config: the resolved configuration as it is written into the run directory.
    checkpoint_minutes: between checkpoints within an epoch; None for none but at a signal.
    timeout_minutes: after which a rank that waits for another gives up.
    wandb: arguments of the WandbLogger of all stages, see `WandbRun`; None for none.
    """

    name: str
    run_dir: Path
    seed: int
    data: Callable[[], LightningDataModule]
    stages: tuple[PlannedStage, ...]
    shared: Mapping[str, Any] = field(default_factory=dict)
    devices: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_minutes: float | None = None
    timeout_minutes: float = TIMEOUT_MINUTES
    wandb: Mapping[str, Any] | None = None

    def stage(self, name: str) -> PlannedStage:
        for stage in self.stages:
            if stage.name == name:
                return stage
        names = ", ".join(stage.name for stage in self.stages)
        raise ValueError(f"this experiment has no stage {name!r}; its stages are {names}")

    def earlier(self, name: str) -> dict[str, tuple[str, ...]]:
        """The stages before one of this name, in order, with the kinds of artefact that each leaves."""
        names = [stage.name for stage in self.stages]
        return {stage.name: stage.kind.leaves for stage in self.stages[: names.index(name)]}

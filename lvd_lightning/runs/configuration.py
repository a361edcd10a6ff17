"""From a configuration to an experiment; every mistake that can be seen before training is."""

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_warn

from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.objects import class_of, make, merge
from lvd_lightning.runs.settings import ClassSettings, ExperimentSettings, StageSettings
from lvd_lightning.runs.trainer_settings import (
    DEVICES,
    HARMLESS,
    check_precision,
    check_trainer,
    check_without_gradients,
    make_callbacks,
    not_for,
    trainer_arguments,
    wandb_settings,
)
from lvd_lightning.stages.stage import PlainStage, Stage, StageModule

__all__ = ["experiment_from"]

MakeData = Callable[[], LightningDataModule]


def experiment_from(config: Mapping[str, Any]) -> Experiment:
    """The experiment that a resolved configuration describes.

    config: name, seed, run_dir, shared, data, trainer, and stages with model, data and trainer each.

    Raises:
        ValueError: an unknown setting, one that the pipeline decides, or a stage without a model.
    """
    settings = ExperimentSettings.from_mapping(config)
    by_text = cache(lambda text: partial(make, LightningDataModule, json.loads(text)))

    def datamodule(data: ClassSettings) -> MakeData:
        """The same function for the same settings: stages that hold one function share one datamodule."""
        return by_text(json.dumps(data.plain()))

    planned = tuple(_planned(name, stage, settings, datamodule) for name, stage in settings.stages.items())
    _say_what_does_not_reach(settings, planned)
    return Experiment(
        name=settings.name,
        run_dir=Path(settings.run_dir) / settings.name,
        seed=settings.seed,
        data=datamodule(settings.data),
        stages=planned,
        shared=settings.shared,
        devices={key: settings.trainer[key] for key in DEVICES if key in settings.trainer},
        config=config,
        checkpoint_minutes=settings.checkpoint_minutes,
        timeout_minutes=settings.timeout_minutes,
        wandb=_one_wandb(planned),
    )


def _one_wandb(planned: tuple[PlannedStage, ...]) -> Mapping[str, Any] | None:
    """What the W&B run of all stages is opened with; None if no stage logs to one."""
    found = {stage.name: stage.wandb for stage in planned if stage.wandb is not None}
    for name, settings in found.items():
        first = next(iter(found))
        if settings != found[first]:
            raise ValueError(
                f"stages.{name}.trainer.logger: got another WandbLogger than stage {first!r} has, but an experiment "
                "is one W&B run: set trainer.logger for all"
            )
    return next(iter(found.values()), None)


def _say_what_does_not_reach(settings: ExperimentSettings, planned: tuple[PlannedStage, ...]) -> None:
    """Arguments of all Trainers that say something about gradients, where some stages have none."""
    for key in (key for key, value in settings.trainer.items() if value is not None):
        without = [
            stage.name for stage in planned if issubclass(stage.kind, StageModule) and key in not_for(stage.kind)
        ]
        if without:
            rank_zero_warn(
                f"trainer.{key} does not apply to {', '.join(without)}, which EM trains, but to the other stages"
            )


def _planned(
    name: str, stage: StageSettings, experiment: ExperimentSettings, datamodule: Callable[[ClassSettings], MakeData]
) -> PlannedStage:
    try:
        kind = class_of(stage.model.class_path, Stage)
    except ValueError as error:
        raise ValueError(f"stages.{name}.model: {error}") from error
    data = stage.data or experiment.data
    recorded: dict[str, Any] = {
        "seed": experiment.seed,
        "data": data.plain(without=("num_workers",)),
        "model": stage.model.plain(without=kind.harmless),
    }
    model = partial(make, Stage, stage.model.plain())
    if issubclass(kind, PlainStage):
        if stage.trainer:
            raise ValueError(f"stages.{name}.trainer cannot be set: a {kind.__name__} is run without a Trainer")
        return PlannedStage(name, kind, recorded, datamodule(data), model)
    if not issubclass(kind, StageModule):
        raise ValueError(f"stages.{name}.model: a {kind.__name__} is neither a StageModule nor a PlainStage")
    check_without_gradients(name, kind, stage.trainer)
    reaching = {key: value for key, value in experiment.trainer.items() if key not in not_for(kind)}
    trainer = merge(reaching, stage.trainer)
    check_trainer(name, trainer, experiment.trainer)
    if kind.em or kind.full_precision:
        check_precision(name, trainer.get("precision"), "circuits" if kind.em else "flows")
    recorded["trainer"] = {key: value for key, value in trainer.items() if key not in HARMLESS}
    return PlannedStage(
        name,
        kind,
        recorded,
        datamodule(data),
        model,
        trainer=partial(trainer_arguments, trainer),
        callbacks=partial(make_callbacks, trainer),
        wandb=wandb_settings(trainer),
    )

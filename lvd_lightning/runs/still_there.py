"""A run directory that is removed, or whose disk is taken away, ends the stage that works in it."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lvd_lightning.runs.run_directory import RUN_CONFIG

__all__ = ["StillThere"]


class StillThere(Callback):
    """Looks, before an epoch and before its checkpoint, whether the stage's folder still holds what it began with.

    Whoever writes there makes folders that are not there: pictures and checkpoints would go into a new folder, without
    what earlier stages left. A ValueError says so instead.

    folder: the stage's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and not (self.folder / RUN_CONFIG).is_file():
            epoch = trainer.current_epoch + 1
            raise ValueError(
                f"{self.folder} was removed, or its disk is gone, while its stage ran (epoch {epoch}): "
                "bring it back, and the same command goes on from the last checkpoint there"
            )

"""What the callbacks that draw pictures share: at which epochs they draw, and where pictures go."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from lvd_lightning.checks import check_counts

__all__ = ["PictureCallback"]


class PictureCallback(Callback):
    """Draws at every n-th epoch. Override `should_draw` to draw at other epochs.

    Args:
        every_n_epochs: draw at the epochs n - 1, 2 n - 1, ... (counted from 0).
        seed: of the random numbers; the same every time, so that pictures differ by what was learned.
    """

    def __init__(self, every_n_epochs: int, seed: int = 0) -> None:
        check_counts(every_n_epochs=every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self.seed = seed

    def should_draw(self, epoch: int) -> bool:
        """Whether to draw at this epoch (counted from 0)."""
        return (epoch + 1) % self.every_n_epochs == 0

    def folder(self, trainer: Trainer) -> Path:
        """`pictures/` in the Trainer's default_root_dir, the stage's folder; made if it is not there."""
        found = Path(trainer.default_root_dir) / "pictures"
        found.mkdir(parents=True, exist_ok=True)
        return found

    def log_pictures(self, trainer: Trainer, pictures: Mapping[str, Path]) -> None:
        """Give pictures, by their names, to Weights & Biases if it is among the loggers."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for name, path in pictures.items():
                    logger.log_image(key=name, images=[str(path)])

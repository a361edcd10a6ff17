"""Global random numbers that are the same in an epoch that is begun again."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from typing_extensions import override

from lvd_lightning.seeds import derive_seed

__all__ = ["EpochSeed"]


class EpochSeed(Callback):
    """Seeds the global random numbers at every epoch from (seed, epoch), alike on all ranks.

    Checkpoints hold no random state. With this, dropout and whatever else draws from the global generators is the same
    in an epoch that was begun again after an interruption. The second seeding, at the first batch, is there because an
    epoch's data iterator, which draws a number, is built before the epoch starts on a resume and after it otherwise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _seed(self, trainer: Trainer) -> None:
        seed_everything(derive_seed(self.seed, "epoch", trainer.current_epoch, 0), verbose=False)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._seed(trainer)

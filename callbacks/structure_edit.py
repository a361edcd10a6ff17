"""What the callbacks that edit circuits share: when they act, on what, in which order, and what they log."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lvd_lightning.checks import check_counts, expect
from lvd_lightning.events import record
from lvd_lightning.stages.conditional import ConditionalStudent

__all__ = ["StructureEdit"]


class StructureEdit(Callback, ABC):
    """Edits the circuits of a `ConditionalStudent` at the start of some epochs; other modules are left alone.

    At the start, so that the epoch that is validated and may become the best checkpoint is one of the edited circuit.
    Subclasses say what they do in `edit`; override `should_act` to act at other epochs. They stand in the list of
    callbacks in the order of the method: Prune, ReassignClusters, GrowClusters. Callbacks keep no state: what is edited
    is in the module's checkpoint, and random numbers are a function of (seed, stage, round).

    Args:
        every_n_epochs: between two edits; where the student has `round_epochs`, a multiple of these.
        first_epoch: epoch (counted from 0) of the first edit; `every_n_epochs` by default.
        last_epoch: no edit after this epoch; none by default.
    """

    position: ClassVar[int] = 0

    def __init__(self, every_n_epochs: int = 5, first_epoch: int | None = None, last_epoch: int | None = None) -> None:
        check_counts(every_n_epochs=every_n_epochs)
        self.every_n_epochs = every_n_epochs
        self.first_epoch = every_n_epochs if first_epoch is None else first_epoch
        self.last_epoch = last_epoch
        expect(self.first_epoch >= 1, "first_epoch", first_epoch, "at least 1: circuits are trained first")
        is_later = last_epoch is None or last_epoch >= self.first_epoch
        expect(is_later, "last_epoch", last_epoch, f"first_epoch, {self.first_epoch}, or later")

    def should_act(self, epoch: int) -> bool:
        """Whether to act at the start of this epoch (counted from 0)."""
        if epoch < self.first_epoch or (self.last_epoch is not None and epoch > self.last_epoch):
            return False
        return (epoch - self.first_epoch) % self.every_n_epochs == 0

    @abstractmethod
    def edit(self, trainer: Trainer, student: ConditionalStudent) -> Mapping[str, float]:
        """Edit the circuits; figures for the loggers."""

    def check_module(self, module: LightningModule) -> None:
        """Raise a ValueError for a student whose circuits cannot be edited; called before any stage runs."""
        if isinstance(module, ConditionalStudent) and not module.hparams["tied"]:
            raise ValueError(f"{type(self).__name__}: only circuits that positions share are edited; set tied: true")

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot work before an epoch is spent on it."""
        if not isinstance(pl_module, ConditionalStudent):
            return
        name = type(self).__name__
        self.check_module(pl_module)
        self._check_order(trainer)
        epochs = [epoch for epoch in range(trainer.max_epochs or 0) if self.should_act(epoch)]
        if not epochs:
            rank_zero_warn(f"{name}: acts in none of the {trainer.max_epochs} epochs (first_epoch {self.first_epoch})")
        rounds = pl_module.hparams["round_epochs"]
        amiss = [epoch for epoch in epochs if rounds is not None and epoch % rounds]
        if amiss:
            raise ValueError(
                f"{name}: acts at epoch {amiss[0]}, within a round of {rounds} epochs: every_n_epochs and first_epoch "
                "have to be multiples of the model's round_epochs"
            )

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, ConditionalStudent) or not self.should_act(trainer.current_epoch):
            return
        name, found = type(self).__name__, self.edit(trainer, pl_module)
        figures = {f"{name}/{key}": value for key, value in found.items()}
        stage = Path(trainer.default_root_dir).name
        record("edit", stage=stage, edit=name, epoch=trainer.current_epoch, step=trainer.global_step, **found)
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **figures}, step=trainer.global_step)

    def _check_order(self, trainer: Trainer) -> None:
        edits = [found for found in trainer.callbacks if isinstance(found, StructureEdit)]  # type: ignore[attr-defined]
        for before, after in pairwise(edits):
            if before.position > after.position:
                raise ValueError(
                    f"callbacks: {type(before).__name__} stands before {type(after).__name__}; the order is Prune, "
                    "ReassignClusters, GrowClusters"
                )

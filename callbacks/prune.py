"""Prune: edges of the conditional circuits that carry next to no flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from callbacks.structure_edit import StructureEdit
from lvd_lightning.checks import check_share
from lvd_lightning.growing import prune_circuits
from lvd_lightning.stages.conditional import ConditionalStudent

__all__ = ["Prune"]


class Prune(StructureEdit):
    """Removes edges that carry at most `threshold` of the flow of their circuit's training patches, and unused units.

    Logs clusters, heads, edges and parameters before and after.

    Args:
        threshold: 0 removes only edges without any flow.
        every_n_epochs, first_epoch, last_epoch: see `StructureEdit`.

    Example:
        >>> from callbacks import Prune
        >>> edit = Prune(threshold=1e-3, every_n_epochs=4, last_epoch=12)
        >>> [epoch for epoch in range(20) if edit.should_act(epoch)]
        [4, 8, 12]
    """

    position: ClassVar[int] = 0

    def __init__(
        self,
        threshold: float = 1e-4,
        every_n_epochs: int = 5,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
    ) -> None:
        super().__init__(every_n_epochs, first_epoch, last_epoch)
        check_share(threshold=threshold)
        self.threshold = threshold

    @override
    def edit(self, trainer: Trainer, student: ConditionalStudent) -> Mapping[str, float]:
        before = student.size()
        student.replace_circuits(prune_circuits(student.assembled.conditional, student.examples(), self.threshold))
        after = student.size()
        return {**before.figures("before"), **after.figures("after")}

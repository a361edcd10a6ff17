"""ReassignClusters: every training patch goes to the head that explains it best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning.pytorch import Trainer
from typing_extensions import override

from callbacks.structure_edit import StructureEdit
from lvd_lightning.checks import check_at_least
from lvd_lightning.growing import best_heads
from lvd_lightning.stages.conditional import ConditionalStudent

__all__ = ["ReassignClusters"]


class ReassignClusters(StructureEdit):
    """Gives every training patch the likeliest head of its circuit, unless the one it has is nearly as good.

    Logs `share_moved`, and `log_p_patch_given_head_nats`: the mean log-likelihood of a patch under the head that it is
    given. That is no likelihood of images, because it says nothing about how likely the head is.

    Args:
        reluctance: nats by which another head has to be better.
        every_n_epochs, first_epoch, last_epoch: see `StructureEdit`.

    Example:
        >>> from callbacks import ReassignClusters
        >>> edit = ReassignClusters(every_n_epochs=4, last_epoch=12)
        >>> [epoch for epoch in range(20) if edit.should_act(epoch)]
        [4, 8, 12]
    """

    position: ClassVar[int] = 1

    def __init__(
        self,
        reluctance: float = 1.0,
        every_n_epochs: int = 5,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
    ) -> None:
        super().__init__(every_n_epochs, first_epoch, last_epoch)
        check_at_least(0, reluctance=reluctance)
        self.reluctance = reluctance

    @override
    def edit(self, trainer: Trainer, student: ConditionalStudent) -> Mapping[str, float]:
        before = student.heads_NP
        heads_NP, mean = best_heads(student.assembled.conditional, student.examples(), self.reluctance)
        student.replace_heads(heads_NP)
        return {
            "share_moved": float((heads_NP != before).double().mean()),
            "log_p_patch_given_head_nats": mean,
        }

"""GrowClusters: heads that explain their patches badly get a copy, and share their patches with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.structure_edit import StructureEdit
from lvd_lightning.checks import check_at_least, check_counts, check_share
from lvd_lightning.growing import grow_circuits, mean_log_probs, recluster, select_heads
from lvd_lightning.stages.conditional import ConditionalStudent

__all__ = ["GrowClusters"]


class GrowClusters(StructureEdit):
    """Selects heads in every circuit, grows their circuits by a copy of each, and clusters their patches again.

    Of each circuit those heads grow that explain their patches worst and together hold more than `share` of them; the
    circuit of a cluster no longer grows when it has `target` heads, or when these have too few patches.

    Logs clusters, heads, edges and parameters before and after, `grown` (heads), and `log_p_patch_given_head_nats`, the
    mean log-likelihood of a patch under its head before growth, which is no likelihood of images.

    Args:
        target: heads of a circuit.
        share: of a circuit's training patches.
        min_examples: training patches that a head needs to be split.
        sigma: standard deviation of the factors that tell copies apart.
        every_n_epochs, first_epoch, last_epoch: see `StructureEdit`.

    References:
        Liu, Liu, Van den Broeck and Liang, Understanding the distillation process from deep generative models to
        tractable probabilistic circuits, ICML 2023.

    Example:
        >>> from callbacks import GrowClusters
        >>> edit = GrowClusters(target=4, every_n_epochs=4, last_epoch=12)
        >>> [epoch for epoch in range(20) if edit.should_act(epoch)]
        [4, 8, 12]
    """

    position: ClassVar[int] = 2

    def __init__(
        self,
        target: int,
        share: float = 0.4,
        min_examples: int = 200,
        sigma: float = 0.2,
        every_n_epochs: int = 5,
        first_epoch: int | None = None,
        last_epoch: int | None = None,
    ) -> None:
        super().__init__(every_n_epochs, first_epoch, last_epoch)
        check_counts(target=target, min_examples=min_examples)
        check_share(share=share)
        check_at_least(0, sigma=sigma)
        self.target, self.share, self.min_examples, self.sigma = target, share, min_examples, sigma

    @override
    def check_module(self, module: LightningModule) -> None:
        super().check_module(module)
        if isinstance(module, ConditionalStudent) and not module.structure.grows:
            raise ValueError(
                "GrowClusters: circuits with Kronecker products do not grow; set structure_settings.product: hadamard, "
                "or leave this callback away (Prune and ReassignClusters work)"
            )

    @override
    def edit(self, trainer: Trainer, student: ConditionalStudent) -> Mapping[str, float]:
        conditional, examples, num_heads = student.assembled.conditional, student.examples(), student.heads_per_circuit
        before = student.size()
        mean_GH, count_GH = mean_log_probs(conditional, examples)
        heads = select_heads(
            mean_GH, count_GH, num_heads, target=self.target, share=self.share, min_examples=self.min_examples
        )
        if any(heads):
            grown = grow_circuits(conditional, examples, heads, sigma=self.sigma, generator=student.generator("grow"))
            heads_NP = recluster(
                student.features(), examples, heads, num_heads, generator=student.generator("recluster")
            )
            student.round += 1
            student.replace_circuits(grown, heads_NP, copied=heads)
        after = student.size()
        return {
            **before.figures("before"),
            **after.figures("after"),
            "grown": float(sum(map(len, heads))),
            "log_p_patch_given_head_nats": float((mean_GH.nan_to_num() * count_GH).sum() / count_GH.sum()),
        }

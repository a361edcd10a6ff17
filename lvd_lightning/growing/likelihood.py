"""Log-likelihoods of patches under the heads of their circuits, and which head explains each patch best.

Shapes: N images, P patches, n patches of a chunk, G circuits, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.growing.examples import Chunk, Examples
from lvd_lightning.models.evidence import CircuitGroups
from lvd_lightning.ranks import summed

__all__ = ["best_heads", "mean_log_probs"]


@torch.no_grad()
def mean_log_probs(conditional: pc.Circuit, examples: Examples) -> tuple[Tensor, Tensor]:
    """The mean log-likelihood of every head's own patches, in nats, and how many these are; all processes have to call.

    Returns:
        float64 (G, H), NaN for heads without patches, and int64 (G, H).
    """
    groups = examples.groups(conditional)
    shape = examples.shape(conditional)
    own_GH = torch.zeros(conditional.num_circuits, shape[1], dtype=torch.float64)
    for chunk, log_nH in _log_probs(groups, examples):
        own_n = log_nH.gather(1, chunk.head[:, None])[:, 0].double().cpu()
        own_GH.view(-1).index_add_(0, (chunk.circuit * shape[1] + chunk.head).cpu(), own_n)
    total_GH = own_GH
    if examples.members is not None:
        total_GH = torch.zeros(shape, dtype=torch.float64)
        total_GH[examples.members.own] = own_GH
    count_GH = examples.counts(*shape)
    return summed(total_GH) / torch.where(count_GH > 0, count_GH, torch.nan), count_GH


@torch.no_grad()
def best_heads(
    conditional: pc.Circuit, examples: Examples, reluctance: float = 0.0, alone: bool = False
) -> tuple[Tensor, float]:
    """The head of its circuit under which each patch is likeliest, `reluctance` nats in favour of the one it has.

    Args:
        reluctance: 0 or larger; 1 in the published method (section 4, step 2).
        alone: this process does all the work, and no other has to call.

    Returns:
        int16 (N, P), the same on every process, and the mean log-likelihood under these heads, in nats per patch.
    """
    groups = examples.groups(conditional)
    positions = examples.head_NP.shape[1]
    best = torch.zeros(examples.head_NP.numel(), dtype=torch.int32)
    total = torch.zeros((), dtype=torch.float64)
    for chunk, log_nH in _log_probs(groups, examples, alone):
        favour_nH = torch.zeros_like(log_nH).scatter_(1, chunk.head[:, None], reluctance)
        value_n, head_n = (log_nH + favour_nH).max(1)
        head_n = torch.where(value_n > -torch.inf, head_n, chunk.head)  # a patch that no head explains stays
        best[chunk.flat] = head_n.int().cpu()
        total += log_nH.gather(1, head_n[:, None]).double().sum().cpu()
    best, total = (best, total) if alone else (summed(best), summed(total))
    return best.view(-1, positions).short(), float(total) / best.numel()


def _log_probs(groups: CircuitGroups, examples: Examples, alone: bool = False) -> Iterator[tuple[Chunk, Tensor]]:
    """Chunks of patches with their log-likelihoods under all heads of their circuits, (n, H)."""
    for chunk in examples.chunks(groups.whole.device, every_image=alone):
        item = torch.arange(len(chunk.x), device=chunk.x.device)
        yield chunk, groups.log_prob_of_heads(chunk.x, item, chunk.circuit)

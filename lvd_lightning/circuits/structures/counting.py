"""Parts of equal size, heads and leaves as they are counted: what structures with first parameters from data share.

Shapes: N examples, D leaves, H units of a leaf, C categories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import described

__all__ = ["check_heads", "smooth_leaves"]


def check_heads(head: Tensor | None, num_heads: int, size: int) -> Tensor:
    """The head of every example, int64 (N,)."""
    if head is None:
        if num_heads > 1:
            raise ValueError(f"head: is needed to tell {num_heads} heads apart: the head of every example")
        return torch.zeros(size, dtype=torch.int64)
    whole = isinstance(head, Tensor) and not head.is_floating_point() and head.dtype != torch.bool
    if not whole or head.shape != (size,) or not bool(((head >= 0) & (head < num_heads)).all()):
        raise ValueError(f"head: expected {size} integers 0..{num_heads - 1}, got {described(head)}")
    return head.cpu().long()


def smooth_leaves(counts_DHC: Tensor, smoothing: float) -> Tensor:
    """Probabilities: counts and `smoothing` times as many examples of the marginal (0.05 added to each value)."""
    marginal_D1C = counts_DHC.sum(1, keepdim=True) + 0.05
    per_part_DH1 = counts_DHC.sum(-1, keepdim=True).mean(1, keepdim=True)
    leaves_DHC = counts_DHC + smoothing * per_part_DH1 * marginal_D1C / marginal_D1C.sum(-1, keepdim=True)
    return leaves_DHC / leaves_DHC.sum(-1, keepdim=True)

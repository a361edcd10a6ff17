"""A prior for tables over ordered values: what was seen at one value counts a little at its neighbours.

Shapes: S categories, R offsets; leading dimensions "..." may be any.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SmoothPrior"]

#: Of a Gaussian, in widths: beyond it one part in 10,000 is left.
REACH = 4.0
#: Up to this radius a sum over offsets is faster than a matrix product over 256 categories.
LARGEST_RADIUS = 16
#: Categories up to which a matrix over their pairs is kept.
LARGEST_MATRIX = 2048


@dataclass(frozen=True)
class SmoothPrior:
    """Pseudocounts a (F * g) / F_n for flows F of sum F_n, with a = share F_n + constant and g a Gaussian of `width`.

    Near the ends of the range what g would send beyond it stays within: each value hands on as much as it has.
    """

    share: float
    width: float
    constant: float

    def pseudocounts(self, flow: Tensor) -> Tensor:
        """What EM adds to flows (..., S) of the data: a new tensor, 0 for a unit without flow."""
        spread = self._spread(flow)
        if self.constant == 0:
            return spread.mul_(self.share)
        total = flow.sum(-1, keepdim=True)
        spread.div_(torch.where(total > 0, total, torch.inf))
        return spread.mul_(total.mul_(self.share).add_(self.constant))

    def kernel(self, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The Gaussian at 0, 1, ... levels (R), and one over how much of it lies within the range, (S)."""
        return _kernel(size, float(self.width), dtype)

    def _spread(self, flow: Tensor) -> Tensor:
        """F * g, with the same sum."""
        key = (flow.shape[-1], float(self.width), flow.dtype, flow.device)
        weights, inside_S = _kernel_on(*key)
        if len(weights) > LARGEST_RADIUS + 1 and len(inside_S) <= LARGEST_MATRIX:
            return flow @ _matrix(*key)
        source = flow * inside_S
        out = source * weights[0]
        for offset in range(1, len(weights)):
            out[..., offset:].add_(source[..., :-offset], alpha=weights[offset])
            out[..., :-offset].add_(source[..., offset:], alpha=weights[offset])
        return out


@functools.lru_cache(maxsize=64)
def _kernel(size: int, width: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `SmoothPrior.kernel`."""
    weights_R = torch.exp(-0.5 * (torch.arange(1 + _radius(size, width), dtype=torch.float64) / width) ** 2)
    one_side_S = weights_R.cumsum(0)[torch.arange(size).clamp_max(len(weights_R) - 1)]
    inside_S = (one_side_S + one_side_S.flip(0) - weights_R[0]).reciprocal_()
    return weights_R.to(dtype), inside_S.to(dtype)


@functools.lru_cache(maxsize=64)
def _kernel_on(size: int, width: float, dtype: torch.dtype, device: torch.device) -> tuple[list[float], Tensor]:
    """The same, where flows on a device are."""
    weights_R, inside_S = _kernel(size, width, dtype)
    return weights_R.tolist(), inside_S.to(device)


@functools.lru_cache(maxsize=8)
def _matrix(size: int, width: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Where every value (a row) hands its flow on to; rows sum to one."""
    place_S = torch.arange(size, dtype=torch.float64)
    distance_SS = (place_S[:, None] - place_S).abs()
    banded_SS = torch.exp(-0.5 * (distance_SS / width) ** 2).masked_fill_(distance_SS > _radius(size, width), 0.0)
    return (banded_SS / banded_SS.sum(1, keepdim=True)).to(device, dtype)


def _radius(size: int, width: float) -> int:
    """The largest offset between values that hand flow to each other."""
    return math.ceil(min(REACH * width, size - 1))

"""Sums of (w, w x, w x^2), gathered around a centre: far from 0 single precision would lose the deviation.

Shapes: "..." may be any; last dimensions hold the three sums. N examples, D variables, K units.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["central", "moments_from_centred", "unit_moments"]


def moments_from_centred(weight: Tensor, first: Tensor, second: Tensor, centre: Tensor) -> Tensor:
    """Sums of (w, w x, w x^2), float64 (..., 3), from those of w, w (x - c) and w (x - c)^2, each (...)."""
    weight, first, second, centre = (part.double() for part in (weight, first, second, centre))
    raw_second = second + centre * (2 * first + centre * weight)
    return torch.stack([weight, first + centre * weight, raw_second], -1)


def central(moments: Tensor, centre: Tensor) -> Tensor:
    """The sum of w (x - c)^2, (...), from the sums of (w, w x, w x^2), (..., 3)."""
    weight, first, second = moments.unbind(-1)
    return second - centre * (2 * first - centre * weight)


def unit_moments(
    x_ND: Tensor, unit_ND: Tensor, num_units: int, weight_N: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Means and variances of the values of each unit, both float64 (D, K); arguments as in `Distribution.from_data`.

    Each unit gets `smoothing` examples more, around its mean like all values of the variable around theirs. A share of
    the examples, as tables get, would be far too much: one or two numbers are known from few examples, and units that
    all reach over the others' values have a long way to go.
    """
    x_DN, unit_DN = x_ND.T.double(), unit_ND.T
    weight_DN = torch.ones_like(x_DN) if weight_N is None else weight_N.double().expand_as(x_DN)
    total_D1 = weight_DN.sum(1, keepdim=True)
    centre_D1 = (weight_DN * x_DN).sum(1, keepdim=True) / total_D1
    x_DN = x_DN - centre_D1

    def sums(values_DN: Tensor) -> Tensor:
        return values_DN.new_zeros(len(values_DN), num_units).scatter_add_(1, unit_DN, values_DN)

    count_DK = sums(weight_DN)
    mean_DK = sums(weight_DN * x_DN) / (count_DK + smoothing)
    square_DK = sums(weight_DN * (x_DN - mean_DK.gather(1, unit_DN)).square())
    variance_D1 = (weight_DN * x_DN.square()).sum(1, keepdim=True) / total_D1
    variance_DK = (square_DK + smoothing * variance_D1) / (count_DK + smoothing)
    return centre_D1 + mean_DK, variance_DK

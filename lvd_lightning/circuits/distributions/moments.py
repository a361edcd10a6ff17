"""Sums of (w, w x, w x^2), gathered around a centre: far from 0 single precision would lose the deviation.

Shapes: "..." may be any; last dimensions hold the three sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["central", "moments_from_centred"]


def moments_from_centred(weight: Tensor, first: Tensor, second: Tensor, centre: Tensor) -> Tensor:
    """Sums of (w, w x, w x^2), float64 (..., 3), from those of w, w (x - c) and w (x - c)^2, each (...)."""
    weight, first, second, centre = (part.double() for part in (weight, first, second, centre))
    raw_second = second + centre * (2 * first + centre * weight)
    return torch.stack([weight, first + centre * weight, raw_second], -1)


def central(moments: Tensor, centre: Tensor) -> Tensor:
    """The sum of w (x - c)^2, (...), from the sums of (w, w x, w x^2), (..., 3)."""
    weight, first, second = moments.unbind(-1)
    return second - centre * (2 * first - centre * weight)

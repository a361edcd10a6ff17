"""How rich images are in contrast and colour: three figures to set beside those of other images.

Shapes: N images, H x W pixels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lvd_lightning.color import LUMA_B, LUMA_G, LUMA_R, LUMA_UNIT

__all__ = ["Contrast", "contrast", "histogram_distance"]

_LEVELS = 256


class Contrast(NamedTuple):
    """Of some images.

    std: the standard deviation of BT.709 luma within an image, in levels, on average over images.
    saturation: (max - min) / max over red, green and blue, on average over pixels; that of black is 0.
    steps: how often the luma of two pixels side by side, or one above the other, differs by 0, 1, ... 255 levels.
    """

    std: float
    saturation: float
    steps: Tensor


def contrast(images: Tensor) -> Contrast:
    """The figures of images, uint8 RGB (N, 3, H, W).

    Raises:
        ValueError: no RGB bytes, or no images.

    Example:
        >>> import torch
        >>> from lvd_lightning.runs.contrast import contrast
        >>> images = torch.tensor([0, 100], dtype=torch.uint8).expand(1, 3, 2, 2)  # a dark and a grey column
        >>> found = contrast(images)
        >>> found.std, found.saturation, found.steps[[0, 100]].tolist()
        (50.0, 0.0, [2, 2])
    """
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (N, 3, H, W), one or more"
        )
    std, saturation = 0.0, 0.0
    steps = torch.zeros(_LEVELS, dtype=torch.int64)
    for part in images.split(500):
        red, green, blue = part.double().unbind(1)
        luma_NHW = (LUMA_R * red + LUMA_G * green + LUMA_B * blue) / LUMA_UNIT
        std += float(luma_NHW.flatten(1).std(1, correction=0).sum())
        high_NHW, low_NHW = part.amax(1).double(), part.amin(1).double()
        saturation += float(((high_NHW - low_NHW) / high_NHW.clamp_min(1)).mean((1, 2)).sum())
        for step in (luma_NHW.diff(dim=1), luma_NHW.diff(dim=2)):
            steps += torch.bincount(step.abs().round().long().flatten(), minlength=_LEVELS)
    return Contrast(std / len(images), saturation / len(images), steps)


def histogram_distance(one: Tensor, other: Tensor) -> float:
    """How far the values of one histogram have to be moved on average to become those of another (Wasserstein-1), in
    bins; both of counts, or shares, (bins,).

    Example:
        >>> import torch
        >>> from lvd_lightning.runs.contrast import histogram_distance
        >>> histogram_distance(torch.tensor([4, 0, 0]), torch.tensor([1, 0, 1]))
        1.0
    """
    share, other_share = one.double() / one.sum(), other.double() / other.sum()
    return float((share - other_share).cumsum(0).abs().sum())

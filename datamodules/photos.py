"""Crops of two photographs that come with scikit-learn: a real data set without a download."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from typing_extensions import override

from datamodules.images import Pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import SPLITS, Split, subset
from lvd_lightning.checks import check_counts

__all__ = ["Photos"]

# Which split the bands of a photograph belong to, from left to right: held-out bands lie between training bands.
BANDS: tuple[Split, ...] = ("train", "val", "train", "test", "train")
# The part of the width that each held-out band takes, unless a crop needs more.
HELD_OUT_WIDTH = 0.15


class Photos(RGBDataModule):
    """Crops of scikit-learn's two sample photographs (427 x 640, a temple and a flower).

    Each photograph is cut into five vertical bands, train, val, train, test, train, and every band is reduced on its
    own: no crop of one split shares a pixel with a crop of another, in the photograph or in its reduction. Crops of
    one split overlap; each position is used once.

    Args:
        reduce: how many pixels of a photograph, in each direction, make one pixel.
        num_train: the number of training crops, without the mirror images of `flip`.
        num_val: the number of validation crops.
        num_test: the number of test crops.
        **common: the settings of every `RGBDataModule`.

    Example:
        >>> from datamodules import Photos
        >>> data = Photos(image_size=16, num_train=20, num_val=5, num_test=5)
        >>> data.setup()
        >>> data.images("train").shape, data.parts.num_parts
        (torch.Size([20, 3, 16, 16]), 16)
    """

    def __init__(
        self,
        reduce: int = 2,
        num_train: int = 8000,
        num_val: int = 1000,
        num_test: int = 1000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_counts(reduce=reduce, num_train=num_train, num_val=num_val, num_test=num_test)
        self.reduce = reduce
        self.num_crops: dict[Split, int] = {"train": num_train, "val": num_val, "test": num_test}

    @override
    def load(self) -> Mapping[Split, Tensor]:
        from sklearn.datasets import load_sample_images  # takes a second to import

        bands: dict[Split, list[Pixels]] = {split: [] for split in SPLITS}
        for photo in load_sample_images().images:
            for split, band in zip(BANDS, self._cut(photo), strict=True):
                bands[split].append(_reduced(band, self.reduce))
        return {split: self.encode(self._crops(split, bands[split])) for split in SPLITS}

    def _cut(self, photo: Pixels) -> list[Pixels]:
        """Cut a photograph (H, W, 3) into the bands of `BANDS`, whose sides are multiples of `reduce`."""
        height, width = (side // self.reduce for side in photo.shape[:2])
        held_out = max(self.image_size, round(HELD_OUT_WIDTH * width))
        train = width - 2 * held_out
        if height < self.image_size or train // 3 < self.image_size:
            raise ValueError(
                f"reduce, image_size: a photograph of {height} x {width} after reduction by {self.reduce} is too small "
                f"for five bands of crops of {self.image_size}; choose smaller ones"
            )
        widths = [train // 3, held_out, train - 2 * (train // 3), held_out, train // 3]
        edges = np.cumsum([0, *widths]) * self.reduce
        return [photo[: height * self.reduce, start:end] for start, end in pairwise(edges)]

    def _crops(self, split: Split, bands: list[Pixels]) -> Pixels:
        """Crops (N, 3, S, S) of one split, at positions that are drawn once and for all."""
        side, wanted = self.image_size, self.num_crops[split]
        positions = [
            (number, top, left)
            for number, band in enumerate(bands)
            for top in range(band.shape[0] - side + 1)
            for left in range(band.shape[1] - side + 1)
        ]
        if wanted > len(positions):
            raise ValueError(f"num_{split}: got {wanted}, but there are {len(positions)} crops of {side} x {side}")
        chosen = [positions[row] for row in subset(len(positions), wanted)]
        crops = np.stack([bands[number][top : top + side, left : left + side] for number, top, left in chosen])
        return crops.transpose(0, 3, 1, 2)[self.limit(len(crops))]


def _reduced(band: Pixels, factor: int) -> Pixels:
    """Reduce a band (H, W, 3) with an antialiasing filter."""
    height, width = band.shape[:2]
    size = (width // factor, height // factor)
    return np.asarray(Image.fromarray(band).resize(size, Image.Resampling.LANCZOS))

"""Small grey patches of images as a table of 63 columns, made as the patches of BSDS300 are.

Shapes: N images, M patches, S image side.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from datamodules.folder import Folder
from datamodules.photos import Photos
from datamodules.splits import SPLITS, Split
from datamodules.tables import Table, TableDataModule
from lvd_lightning.checks import check_counts, expect
from lvd_lightning.color import LUMA_B, LUMA_G, LUMA_R, LUMA_UNIT

__all__ = ["GreyPatches"]

SIDE = 8


class GreyPatches(TableDataModule):
    """Random patches of 8 x 8 pixels: luma plus uniform noise, divided by 256, less the patch's mean, without the last
    pixel, which the others then tell.

    A patch is of the split of its image.

    Args:
        path: a folder or a .zip archive of images, see `Folder`; null for the photographs of `Photos`.
        image_size: the side that images are reduced to.
        num_patches: of an image, at random places that never change.
        max_images: at most so many images per split.
        **common: the settings of every `TableDataModule`.

    References:
        Uria, Murray and Larochelle, RNADE: The real-valued neural autoregressive density-estimator, 2013 (arXiv
        1306.0186), section 5.2, after Zoran and Weiss, 2011.

    Example:
        >>> data = GreyPatches(num_patches=2, max_images=10)
        >>> data.setup()
        >>> data.num_examples("train"), data.num_dims
        (20, 63)
    """

    num_columns = SIDE * SIDE - 1

    def __init__(
        self,
        path: str | None = None,
        image_size: int = 32,
        num_patches: int = 10,
        max_images: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_counts(num_patches=num_patches, image_size=image_size, max_images=max_images)
        expect(image_size >= SIDE, "image_size", image_size, f"at least {SIDE}, the side of a patch")
        self.path = path
        self.image_size = image_size
        self.num_patches = num_patches
        self.max_images = max_images

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"table": "grey patches", **super().facts}

    @override
    def load(self) -> Mapping[Split, Table]:
        common: dict[str, Any] = {
            "image_size": self.image_size,
            "patch_size": 1,
            "color": "rgb",
            "max_examples": self.max_images,
        }
        images = Photos(**common) if self.path is None else Folder(self.path, **common)
        images.setup()
        self.left_out = images.left_out
        found: dict[Split, Table] = {}
        for number, split in enumerate(SPLITS):
            pixels = images.images(split)[torch.arange(images.num_examples(split))].numpy().astype(np.float64)
            found[split] = grey_patches(pixels, self.num_patches, np.random.RandomState(number))
        return found


def grey_patches(pixels: Table, num_patches: int, random: np.random.RandomState) -> Table:
    """Rows (N num_patches, 63) of RGB images (N, 3, S, S) of bytes."""
    luma = np.tensordot(np.array([LUMA_R, LUMA_G, LUMA_B]) / LUMA_UNIT, pixels, axes=(0, 1))
    count, side = len(luma), luma.shape[-1]
    top, left = random.randint(side - SIDE + 1, size=(2, count, num_patches))
    down, right = np.mgrid[:SIDE, :SIDE]
    patches = luma[
        np.arange(count)[:, None, None, None],
        top[..., None, None] + down,
        left[..., None, None] + right,
    ].reshape(-1, SIDE * SIDE)
    noisy = (patches + random.rand(*patches.shape)) / 256
    return (noisy - noisy.mean(1, keepdims=True))[:, :-1]

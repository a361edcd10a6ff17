"""Encoded images that are indexed like one tensor but are stored in several parts or on disk."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.splits import Rows
from lvd_lightning.color import crop_region, encode_color

__all__ = ["ImageRows", "IndexedImages", "MirrorImages", "Part", "Pixels", "encode_images", "with_mirrors"]

Pixels = npt.NDArray[np.uint8]

# Images encoded at a time, which bounds the temporaries.
ENCODE_CHUNK = 16384


def encode_images(pixels: Pixels, color: str, region: str) -> Tensor:
    """Crop and colour-encode raw images.

    Args:
        pixels: uint8 RGB, with shape (N, 3, S, S).
        color: one of `lvd_lightning.color.COLORS`.
        region: one of `lvd_lightning.color.REGIONS`.

    Returns:
        A contiguous tensor with shape (N, 3, H, W), of the type that `encode_color` gives.
    """
    cropped = crop_region(torch.from_numpy(pixels), region)
    encoded = torch.empty(cropped.shape, dtype=encode_color(cropped[:0], color).dtype)
    for start in range(0, len(cropped), ENCODE_CHUNK):
        chunk = slice(start, start + ENCODE_CHUNK)
        encoded[chunk] = encode_color(cropped[chunk], color)
    return encoded


class Part(Protocol):
    """Stored images: a tensor, or anything that gives a tensor (n, C, H, W) for a tensor of rows (n,)."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Tensor, /) -> Tensor: ...


class ImageRows:
    """Chosen rows of images in several parts, indexed like one tensor (N, C, H, W).

    Args:
        parts: the stored images, numbered through all parts.
        rows: which of them, in this order; all by default.
    """

    def __init__(self, parts: Sequence[Part], rows: Rows | None = None) -> None:
        self._parts = parts
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self._rows = torch.arange(int(self._ends[-1])) if rows is None else torch.from_numpy(rows)
        first = parts[0][torch.zeros(1, dtype=torch.int64)]
        self._image_shape, self.dtype = first.shape[1:], first.dtype

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, C, H, W)."""
        return (len(self), *self._image_shape)

    def __getitem__(self, index: int | slice | Tensor) -> Tensor:
        """Read images: one for an int, a batch for a slice or an int64 tensor (n,)."""
        rows = self._rows[index]
        flat = rows.reshape(-1)
        part_of = torch.searchsorted(self._ends, flat, right=True)
        images = torch.empty(len(flat), *self._image_shape, dtype=self.dtype)
        for number in part_of.unique().tolist():
            here = (part_of == number).nonzero()[:, 0]
            part = self._parts[number]
            images[here] = part[flat[here] - (int(self._ends[number]) - len(part))]
        return images.reshape(*rows.shape, *self._image_shape)


class MirrorImages:
    """Stored images, each with its left and right exchanged when it is read.

    Args:
        images: the stored images, (N, C, H, W).
    """

    def __init__(self, images: Part) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read the rows (n,) as mirror images (n, C, H, W)."""
        return self._images[rows].flip(-1)


def with_mirrors(images: Part, rows: Rows | None = None) -> ImageRows:
    """Images (N, C, H, W) as 2 N images: i + N is the mirror image of i. Nothing is copied.

    Args:
        images: the stored images.
        rows: which of the 2 N, in this order; all by default.

    Example:
        >>> import torch
        >>> from datamodules.images import with_mirrors
        >>> both = with_mirrors(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).view(2, 1, 1, 2))
        >>> both[:].view(4, 2).tolist()
        [[1, 2], [3, 4], [2, 1], [4, 3]]
    """
    return ImageRows([images, MirrorImages(images)], rows)


class IndexedImages(Dataset[tuple[Tensor, Tensor]]):
    """One split as a dataset of (image, index) pairs that reads whole batches at once.

    Args:
        images: a tensor (N, 3, H, W) or something indexed like one.
    """

    def __init__(self, images: Tensor | ImageRows) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self._images[index], torch.tensor(index)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """The images (n, 3, H, W) and their indices (n,)."""
        index = torch.tensor(indices, dtype=torch.int64)
        return self._images[index], index

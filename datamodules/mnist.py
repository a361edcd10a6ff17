"""MNIST and the sets in its file format: Fashion-MNIST and EMNIST."""

import gzip
import math
import struct
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.base import ImageDataModule
from datamodules.files import resolve
from datamodules.splits import Split, carve
from lvd_lightning.checks import check_choice, expect

__all__ = ["EMNIST", "MNIST", "FashionMNIST"]

SIDE = 28
# The header of an idx file of images: its kind (bytes, three dimensions), then their number, rows and columns.
HEADER, IMAGES = struct.Struct(">4I"), 0x00000803
MOST_BYTES = 1 << 31
EMNIST_SETS = ("byclass", "bymerge", "balanced", "letters", "digits", "mnist")


class MNIST(ImageDataModule):
    """The 70,000 greyscale digits of MNIST, 28 x 28, from their idx files, gzipped or not.

    The official test set is the test split; the validation split is carved out of the training images.

    Args:
        path: the folder with the files.
        num_val: training images that become the validation split.
        **common: the settings of every `ImageDataModule`; `patch_size` divides 28.

    References:
        LeCun, Bottou, Bengio and Haffner, Gradient-Based Learning Applied to Document Recognition, 1998.

    Example:
        >>> from datamodules import MNIST
        >>> data = MNIST("data/mnist", patch_size=4)  # nothing is read before `setup`
        >>> data.image_shape, data.parts.num_parts
        ((1, 28, 28), 49)
    """

    files: ClassVar[dict[str, str]] = {"train": "train-images-idx3-ubyte", "test": "t10k-images-idx3-ubyte"}
    mirrors_are_alike: ClassVar[bool] = False
    source: ClassVar[str] = "http://yann.lecun.com/exdb/mnist"

    def __init__(self, path: str, num_val: int = 5000, **common: Any) -> None:
        super().__init__(**common)
        self.path = path
        self.num_val = num_val

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 1, SIDE, SIDE

    @property
    @override
    def published_counts(self) -> tuple[int, int, int] | None:
        return 60_000 - self.num_val, self.num_val, 10_000

    @override
    def load(self) -> Mapping[Split, Tensor]:
        known, test = (self._read(self.files[name]) for name in ("train", "test"))
        fits = 0 < self.num_val < len(known)
        expect(fits, "num_val", self.num_val, f"1 to {len(known) - 1} of the training images")
        train_rows, val_rows = carve(len(known), self.num_val)
        return {
            "train": known[torch.from_numpy(train_rows[self.limit(len(train_rows))])],
            "val": known[torch.from_numpy(val_rows[self.limit(len(val_rows))])],
            "test": test[torch.from_numpy(self.limit(len(test)))],
        }

    def upright(self, images: Tensor) -> Tensor:
        """The images as a person reads them, (N, 28, 28)."""
        return images

    def _read(self, name: str) -> Tensor:
        """The images of one file, uint8 (N, 1, 28, 28)."""
        root = resolve(self.path)
        for file in (root / name, root / f"{name}.gz"):
            if file.is_file():
                return self.upright(read_idx(file))[:, None].contiguous()
        raise FileNotFoundError(
            f"missing: {root / name}\n{type(self).__name__}: expected {' and '.join(self.files.values())}, with or "
            f"without .gz, in {root}.\nGet them from {self.source} and put them there."
        )


class FashionMNIST(MNIST):
    """The 70,000 greyscale pictures of clothes of Fashion-MNIST, 28 x 28; files and settings as those of `MNIST`.

    References:
        Xiao, Rasul and Vollgraf, Fashion-MNIST, 2017, arXiv 1708.07747.

    Example:
        >>> from datamodules import FashionMNIST
        >>> data = FashionMNIST("data/mnist", patch_size=4)  # nothing is read before `setup`
        >>> data.image_shape, data.parts.num_parts
        ((1, 28, 28), 49)
    """

    mirrors_are_alike: ClassVar[bool] = True
    source: ClassVar[str] = "https://github.com/zalandoresearch/fashion-mnist"


class EMNIST(MNIST):
    """Handwritten letters and digits, 28 x 28; files as those of `MNIST`, which hold images on their side.

    Args:
        path: the folder with the files `emnist-SUBSET-train-images-idx3-ubyte` and `emnist-SUBSET-test-...`.
        subset: `byclass`, `bymerge`, `balanced`, `letters`, `digits` or `mnist`.
        num_val: training images that become the validation split.
        **common: the settings of every `ImageDataModule`.

    References:
        Cohen, Afshar, Tapson and van Schaik, EMNIST, 2017, arXiv 1702.05373.

    Example:
        >>> from datamodules import EMNIST
        >>> data = EMNIST("data/emnist", subset="letters", patch_size=7)  # nothing is read before `setup`
        >>> data.image_shape, data.parts.num_parts
        ((1, 28, 28), 16)
    """

    source: ClassVar[str] = "https://www.nist.gov/itl/products-and-services/emnist-dataset"

    def __init__(self, path: str, subset: str = "letters", num_val: int = 5000, **common: Any) -> None:
        super().__init__(path, num_val, **common)
        check_choice(EMNIST_SETS, subset=subset)
        self.files = {  # type: ignore[misc]
            name: f"emnist-{subset}-{name}-images-idx3-ubyte" for name in ("train", "test")
        }

    @property
    @override
    def published_counts(self) -> None:
        return None  # other numbers in every subset

    @override
    def upright(self, images: Tensor) -> Tensor:
        return images.transpose(1, 2)


def read_idx(file: Path) -> Tensor:
    """The images of an idx file, uint8 (N, 28, 28); of a compressed one no more is unpacked than its header says.

    Raises:
        ValueError: the file is damaged, or holds something else; the message names it.
    """
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:
            kind, *shape = HEADER.unpack(content.read(HEADER.size))
            if kind != IMAGES:
                raise ValueError(f"it begins with {kind:#010x}, not {IMAGES:#010x}")
            if shape[1:] != [SIDE, SIDE]:
                raise ValueError(f"holds images of {shape[1]} x {shape[2]}, expected {SIDE} x {SIDE}")
            size = math.prod(shape)
            if size > MOST_BYTES:
                raise ValueError(f"says that it holds {shape[0]:,} images, expected at most {MOST_BYTES // SIDE**2:,}")
            pixels = content.read(size + 1)
            if len(pixels) != size:
                raise ValueError(f"it holds {'more' if len(pixels) > size else 'less'} than its {shape[0]:,} images")
    except (ValueError, EOFError, OSError, struct.error, zlib.error) as error:
        raise ValueError(f"{file}: damaged or no idx file of images ({error})") from error
    return torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(shape) if size else torch.zeros(shape).byte()

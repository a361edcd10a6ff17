"""CIFAR-10 from its original Python batches."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from datamodules.files import require, resolve
from datamodules.pickles import read_pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import Split, carve
from lvd_lightning.checks import expect

__all__ = ["CIFAR10"]

FOLDER = "cifar-10-batches-py"
TRAIN_FILES = [f"data_batch_{number}" for number in range(1, 6)]
TEST_FILE = "test_batch"


class CIFAR10(RGBDataModule):
    """The 60,000 images of CIFAR-10, 32 x 32.

    The official test set is the test split; the validation split is carved out of the 50,000 training images.

    Args:
        path: the folder `cifar-10-batches-py`, or the one that holds it.
        num_val: training images that become the validation split.
        **common: the settings of every `RGBDataModule`.

    References:
        Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.

    Example:
        >>> from datamodules import CIFAR10
        >>> data = CIFAR10("data/cifar-10-batches-py", num_val=5000)  # nothing is read before `setup`
        >>> data.image_shape, data.parts.num_parts
        ((3, 32, 32), 64)
    """

    def __init__(self, path: str, num_val: int = 5000, **common: Any) -> None:
        super().__init__(**common)
        expect(self.image_size == 32, "image_size", self.image_size, "32: CIFAR-10 is 32 x 32")
        self.path = path
        self.num_val = num_val

    @property
    @override
    def published_counts(self) -> tuple[int, int, int]:
        return 50_000 - self.num_val, self.num_val, 10_000

    @override
    def load(self) -> Mapping[Split, Tensor]:
        root = resolve(self.path)
        folder = root / FOLDER if (root / FOLDER).is_dir() else root
        require(
            [folder / name for name in [*TRAIN_FILES, TEST_FILE]],
            f"CIFAR10: expected the folder {FOLDER}, with data_batch_1 to data_batch_5 and test_batch, in {root}.\n"
            "Get 'CIFAR-10 python version' from https://www.cs.toronto.edu/~kriz/cifar.html and unpack it there.",
        )
        known = np.concatenate([read_pixels(folder / name, self.image_size) for name in TRAIN_FILES])
        test = read_pixels(folder / TEST_FILE, self.image_size)
        fits = 0 < self.num_val < len(known)
        expect(fits, "num_val", self.num_val, f"1 to {len(known) - 1} of the training images")
        train_rows, val_rows = carve(len(known), self.num_val)
        return {
            "train": self.encode(known[train_rows[self.limit(len(train_rows))]]),
            "val": self.encode(known[val_rows[self.limit(len(val_rows))]]),
            "test": self.encode(test[self.limit(len(test))]),
        }

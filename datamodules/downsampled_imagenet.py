"""ImageNet32 and ImageNet64 from their pickled batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.files import require, resolve
from datamodules.images import ImageRows
from datamodules.pickles import read_pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import Split, carve

__all__ = ["DownsampledImageNet"]

TRAIN_FILES = [f"train_data_batch_{number}" for number in range(1, 11)]
TEST_FILE = "val_data"


class DownsampledImageNet(RGBDataModule):
    """The 1,281,167 training and 50,000 validation images of ImageNet at 32 x 32 or 64 x 64 (`image_size`).

    The official validation set is the test split; the validation split is carved out of the training set, an equal
    part of every file. All images stay in memory: 4 GB at 32 x 32, 16 GB at 64 x 64, in each process. Where that is
    too much, store them as .npy files for `Arrays`, which processes share.

    Args:
        path: the folder with the ten files `train_data_batch_*` and `val_data`; they may also lie in its folders
            `Imagenet32_train` and `Imagenet32_val` (or `Imagenet64_...`).
        num_val: training images that become the validation split.
        **common: the settings of every `RGBDataModule`.

    References:
        Chrabaszcz, Loshchilov and Hutter, A Downsampled Variant of ImageNet, 2017, arXiv 1707.08819.

    Example:
        >>> from datamodules import DownsampledImageNet
        >>> data = DownsampledImageNet("data/imagenet64", image_size=64)  # nothing is read before `setup`
        >>> data.image_shape, data.parts.num_parts
        ((3, 64, 64), 256)
    """

    def __init__(self, path: str, num_val: int = 50_000, **common: Any) -> None:
        super().__init__(**common)
        self.path = path
        self.num_val = num_val

    @property
    @override
    def published_counts(self) -> tuple[int, int, int]:
        return 1_281_167 - self.num_val, self.num_val, 50_000

    @override
    def load(self) -> Mapping[Split, Tensor | ImageRows]:
        train_files, test_file = self._files()
        train_parts: list[Tensor] = []
        val_parts: list[Tensor] = []
        for number, file in enumerate(train_files):
            # One file at a time is encoded, so that nothing is held twice.
            pixels = read_pixels(file, self.image_size)
            share = self.num_val * (number + 1) // len(train_files) - self.num_val * number // len(train_files)
            if not 0 < share < len(pixels):
                raise ValueError(f"num_val: {share} of the {len(pixels)} images in {file} would become validation")
            train_rows, val_rows = carve(len(pixels), share)
            train_parts.append(self.encode(pixels[train_rows]))
            val_parts.append(self.encode(pixels[val_rows]))
        images: dict[Split, Tensor | ImageRows] = {
            "train": ImageRows(train_parts),
            "val": torch.cat(val_parts),
            "test": self.encode(read_pixels(test_file, self.image_size)),
        }
        if self.max_examples is None:
            return images
        return {split: rows[torch.from_numpy(self.limit(len(rows)))] for split, rows in images.items()}

    def _files(self) -> tuple[list[Path], Path]:
        root, name = resolve(self.path), f"Imagenet{self.image_size}"
        train = root / f"{name}_train" if (root / f"{name}_train").is_dir() else root
        val = root / f"{name}_val" if (root / f"{name}_val").is_dir() else root
        train_files, test_file = [train / file for file in TRAIN_FILES], val / TEST_FILE
        require(
            [*train_files, test_file],
            f"DownsampledImageNet: expected train_data_batch_1 to train_data_batch_10 and val_data in {root}, "
            f"or in its folders {name}_train and {name}_val.\n"
            f"Get the files '{name}_train.zip' and '{name}_val.zip' from https://image-net.org/download-images "
            "(a free account) and unpack them there.",
        )
        return train_files, test_file

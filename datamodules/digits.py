"""The handwritten digits that come with scikit-learn: a real data set without a download."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from typing_extensions import override

from datamodules.base import ImageDataModule
from datamodules.splits import Split, check_fractions, divide

__all__ = ["Digits"]

SIDE, LEVELS = 8, 17


class Digits(ImageDataModule):
    """scikit-learn's 1,797 greyscale digits, 8 x 8 pixels of 17 levels.

    Args:
        val_fraction: how much of them is for validation.
        test_fraction: how much of them is for the test.
        **common: the settings of every `ImageDataModule`; `patch_size` divides 8.

    Example:
        >>> data = Digits(patch_size=2)
        >>> data.setup()
        >>> data.num_examples("train"), data.parts.num_parts, round(data.unit.uniform, 3)
        (1437, 16, 4.087)

    References:
        Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998.
    """

    mirrors_are_alike: ClassVar[bool] = False

    def __init__(self, val_fraction: float = 0.1, test_fraction: float = 0.1, **common: Any) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        return 1, SIDE, SIDE

    @property
    @override
    def num_categories(self) -> int:
        return LEVELS

    @override
    def load(self) -> Mapping[Split, Tensor]:
        images = torch.from_numpy(load_digits().images).to(torch.uint8)[:, None]
        rows = divide(len(images), self.val_fraction, self.test_fraction)
        return {split: images[torch.from_numpy(found[self.limit(len(found))])] for split, found in rows.items()}

"""Crops of seven photographs that come with scikit-learn and scikit-image: a real data set without a download."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from torch import Tensor
from typing_extensions import override

from datamodules.images import Pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import SPLITS, Split, subset
from lvd_lightning.checks import check_counts

__all__ = ["Photos", "photographs"]

# The splits of six blocks of a photograph that are in order of how much there is to see in them. In the next six,
# validation and test change places.
DEALT: tuple[Split, ...] = ("train", "train", "val", "test", "train", "train")
EXCHANGED: dict[Split, Split] = {"train": "train", "val": "test", "test": "val"}


class Photos(RGBDataModule):
    """Crops of the sample photographs of scikit-learn (a temple, a flower) and scikit-image (an astronaut, a cat, a cup
    of coffee, a rocket, a motorcycle).

    Each photograph is reduced, then cut into square blocks an eighth larger than a crop. Of every six blocks that have
    about as much to be seen in them, one is for validation and one for the test. So the splits are alike in every
    photograph, and no crop of one shares a pixel with a crop of another, in the photograph or in its reduction. Crops
    of one split overlap; each position is used once. Photographs of fewer than six blocks are left out.

    Args:
        reduce: how many pixels of a photograph, in each direction, make one pixel, their mean.
        num_train: the number of training crops, without the mirror images of `flip`.
        num_val: the number of validation crops.
        num_test: the number of test crops.
        **common: the settings of every `RGBDataModule`.

    Raises:
        ValueError: a setting is out of range; at `setup`, there are not so many crops.

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
        # The mean of whole squares of pixels, so that no filter looks from one block into the next.
        reduced = [np.asarray(Image.fromarray(photo).reduce(self.reduce)) for photo in photographs()]
        side = self.image_size + self.image_size // 8
        large = [photo for photo in reduced if len(_corners(photo, side)) >= len(DEALT)]
        if not large:
            height, width = max((photo.shape[:2] for photo in reduced), key=min)
            raise ValueError(
                f"reduce, image_size: got {self.reduce} and {self.image_size}; a photograph of {height} x {width} "
                f"after reduction is too small for {len(DEALT)} blocks of {side} x {side}; choose smaller ones"
            )
        blocks = [number_blocks(photo, side) for photo in large]
        return {split: self.encode(self._crops(split, large, blocks)) for split in SPLITS}

    def _crops(self, split: Split, photos: list[Pixels], blocks: list[npt.NDArray[np.int64]]) -> Pixels:
        """Crops (N, 3, S, S) of one split, at positions that are drawn once and for all.

        blocks: as `number_blocks` gives them, of each photograph.
        """
        side, wanted = self.image_size, self.num_crops[split]
        positions = [
            (number, int(top), int(left))
            for number, numbered in enumerate(blocks)
            for top, left in np.argwhere(_splits_of_crops(numbered, side) == SPLITS.index(split))
        ]
        if wanted > len(positions):
            raise ValueError(f"num_{split}: got {wanted}, but there are {len(positions)} crops of {side} x {side}")
        chosen = [positions[row] for row in subset(len(positions), wanted)]
        crops = np.stack([photos[number][top : top + side, left : left + side] for number, top, left in chosen])
        return crops.transpose(0, 3, 1, 2)[self.limit(len(crops))]


def photographs() -> list[Pixels]:
    """The photographs, uint8 (H, W, 3) each; the second picture of the motorcycle shows the same again."""
    from skimage import data  # these take a second to import
    from sklearn.datasets import load_sample_images

    motorcycle, _, _ = data.stereo_motorcycle()
    return [*load_sample_images().images, data.astronaut(), data.chelsea(), data.coffee(), data.rocket(), motorcycle]


def number_blocks(photo: Pixels, side: int) -> npt.NDArray[np.int64]:
    """Deal the blocks of a photograph to the splits.

    Args:
        photo: uint8 (H, W, 3).
        side: the side of a block.

    Returns:
        (H, W), the block that every pixel belongs to: 0 is training, whose blocks are one and take what no block
        covers; other blocks have a number each, odd for validation and even for test.

    Example:
        >>> import numpy as np
        >>> from datamodules.photos import number_blocks
        >>> number_blocks(np.zeros((2, 7, 3), dtype=np.uint8), 1)
        array([[0, 0, 1, 2, 0, 0, 0],
               [0, 4, 3, 0, 0, 0, 0]])
    """
    corners = _corners(photo, side)
    activity = [_activity(photo[top : top + side, left : left + side]) for top, left in corners]
    numbered = np.zeros(photo.shape[:2], dtype=np.int64)
    highest: dict[Split, int] = {"val": -1, "test": 0}
    for place, block in enumerate(np.argsort(activity, kind="stable")):
        round_of_six, place_in_six = divmod(place, len(DEALT))
        split = DEALT[place_in_six] if round_of_six % 2 == 0 else EXCHANGED[DEALT[place_in_six]]
        if split == "train":
            continue
        highest[split] += 2
        top, left = corners[block]
        numbered[top : top + side, left : left + side] = highest[split]
    return numbered


def _corners(photo: Pixels, side: int) -> list[tuple[int, int]]:
    """Top and left of every whole block of a photograph, row by row."""
    height, width = photo.shape[:2]
    return [(top, left) for top in range(0, height - side + 1, side) for left in range(0, width - side + 1, side)]


def _activity(block: Pixels) -> float:
    """How much there is to see: about the bits that it takes to say how neighbouring pixels differ in green, in red
    less green, and in blue less green."""
    red, green, blue = np.moveaxis(block.astype(np.int64), -1, 0)
    planes = np.stack([green, red - green, blue - green])
    steps = [np.abs(np.diff(planes, axis=axis)) for axis in (1, 2)]
    return float(sum(np.log2(1 + step).mean() for step in steps if step.size))


def _splits_of_crops(numbered: npt.NDArray[np.int64], side: int) -> npt.NDArray[np.int64]:
    """Which of `SPLITS` the crop at every position is of, (H - side + 1, W - side + 1); -1: of none.

    Blocks are not smaller than crops, so that a crop which meets a block has a corner in it.
    """
    height, width = (size - side + 1 for size in numbered.shape)
    first = numbered[:height, :width]
    whole = np.ones_like(first, dtype=bool)
    for down, right in ((0, side - 1), (side - 1, 0), (side - 1, side - 1)):
        whole &= numbered[down : down + height, right : right + width] == first
    names = np.where(first == 0, SPLITS.index("train"), np.where(first % 2, SPLITS.index("val"), SPLITS.index("test")))
    return np.where(whole, names, -1)

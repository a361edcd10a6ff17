"""The frame of every image data module: splits in memory, colour and region applied once, loaders of global batches."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.identity import identity_of_images
from datamodules.images import ImageRows, IndexedImages, Pixels, encode_images
from datamodules.sampler import GlobalBatchSampler
from datamodules.splits import SPLITS, Rows, Split, subset
from lvd_lightning.color import COLORS, REGIONS, is_lossy

__all__ = ["ImageDataModule"]

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")


class ImageDataModule(LightningDataModule):
    """Images as bytes, colour-encoded and cropped, in the splits train, val and test.

    Loaders yield (x, index): uint8 images (b, 3, H, W) and their int64 numbers (b,) in the split. Which examples a
    split holds never depends on `seed`; the order of training is a function of (seed, epoch) alone. Trainers run with
    `use_distributed_sampler=False`: the loaders divide every batch over the ranks themselves.

    A subclass says where images come from in `load`.

    Args:
        image_size: the side of the images, in pixels.
        color: `rgb`, `ycocg_r` (reversible) or `ycbcr_lossy` (only to reproduce published figures).
        region: `whole`, or `quadrant` for the top-left quarter.
        batch_size: examples per training step, all ranks together.
        num_workers: processes that read batches; 0 reads in the main process.
        seed: the seed of the training order.
        val_batch_size: examples per validation or test step, all ranks together; `batch_size` by default.
        max_examples: at most so many examples per split, for small runs.

    Raises:
        ValueError: a setting is out of range.
    """

    def __init__(
        self,
        image_size: int = 32,
        color: str = "ycocg_r",
        region: str = "whole",
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        max_examples: int | None = None,
    ) -> None:
        super().__init__()
        for name, value, choices in (("color", color, COLORS), ("region", region, REGIONS)):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
        if image_size < 1 or (region == "quadrant" and image_size % 2):
            raise ValueError(f"image_size: got {image_size}, expected a positive number, even for a quadrant")
        for name, number, least in (
            ("batch_size", batch_size, 1),
            ("val_batch_size", val_batch_size, 1),
            ("max_examples", max_examples, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if number is not None and number < least:
                raise ValueError(f"{name}: got {number}, expected at least {least}")
        self.image_size = image_size
        self.color = color
        self.region = region
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_batch_size = val_batch_size or batch_size
        self.max_examples = max_examples
        self.left_out: dict[str, int] = {}  # files that were not used, by reason
        self._images: dict[Split, Tensor | ImageRows] = {}
        self._identity: dict[Split, str] = {}

    @abstractmethod
    def load(self) -> Mapping[Split, Tensor | ImageRows]:
        """Read every split, encoded with `encode` and limited with `limit`, as uint8 (N, 3, H, W)."""

    def encode(self, pixels: Pixels) -> Tensor:
        """Crop and colour-encode raw RGB bytes (N, 3, image_size, image_size)."""
        return encode_images(pixels, self.color, self.region)

    def limit(self, count: int) -> Rows:
        """Which rows of a split of `count` examples to keep under `max_examples`."""
        return subset(count, self.max_examples)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once.

        Raises:
            FileNotFoundError: the data are not where the settings say; the message tells what belongs there.
            ValueError: a file is not what it should be, or a split has no examples.
        """
        if self._images:
            return
        images = dict(self.load())
        self._check_counts({split: len(images[split]) for split in SPLITS})
        for split in SPLITS:
            assert tuple(images[split].shape[1:]) == self.image_shape
        self._images = images

    def _check_counts(self, counts: Mapping[Split, int]) -> None:
        """Raise a ValueError that says how many images there are and how many it takes, if a split has none."""
        for split, count in counts.items():
            if count:
                continue
            fraction = getattr(self, f"{split}_fraction", None)
            remedy = "give more images"
            if fraction is not None:
                few = math.ceil(1 / fraction)
                remedy += f", {few} or more for {split}_fraction {fraction}, or choose a larger {split}_fraction"
            raise ValueError(
                f"{type(self).__name__}: there are {sum(counts.values())} images, and the split {split!r} has none of "
                f"them (train, val and test: {', '.join(map(str, counts.values()))}); each needs at least 1: {remedy}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (3, H, W) of what is modelled."""
        side = self.image_size // 2 if self.region == "quadrant" else self.image_size
        return 3, side, side

    @property
    def lossy(self) -> bool:
        """Whether the colour encoding merges colours, so that figures have to say so."""
        return is_lossy(self.color)

    def images(self, split: Split) -> Tensor | ImageRows:
        """All images of a split, encoded, with shape (N, 3, H, W); large sets give an object indexed like a tensor."""
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {', '.join(SPLITS)}")
        if not self._images:
            raise RuntimeError(f"{type(self).__name__} holds no images yet: call setup() first")
        return self._images[split]

    @property
    def identity(self) -> dict[str, str]:
        """A digest of every split: another one says that images were replaced, renamed, exchanged or put in order.

        It does not depend on where the data lie. Latent values, features and whatever else is kept by the numbers of
        images is of no use for data of another identity.
        """
        for split in SPLITS:
            if split not in self._identity:
                self._identity[split] = identity_of_images(self.images(split))
        return {split: self._identity[split] for split in SPLITS}

    def num_examples(self, split: Split) -> int:
        """The number of images in a split."""
        return len(self.images(split))

    def batch(self, split: Split, indices: Tensor) -> Tensor:
        """Read images by their int64 numbers (n,), as uint8 (n, 3, H, W) on the CPU."""
        return self.images(split)[indices.cpu()]

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val", self.val_batch_size, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test", self.val_batch_size, shuffle=False)

    def _loader(self, split: Split, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
        in_group = dist.is_available() and dist.is_initialized()
        sampler = GlobalBatchSampler(
            self.num_examples(split),
            batch_size,
            seed=self.seed,
            shuffle=shuffle,
            rank=dist.get_rank() if in_group else 0,
            world_size=dist.get_world_size() if in_group else 1,
        )
        if self.trainer is not None:
            # A resumed Trainer fetches the first batches before it calls `set_epoch`.
            sampler.set_epoch(self.trainer.current_epoch)
        return DataLoader(
            IndexedImages(self.images(split)),
            batch_sampler=sampler,
            collate_fn=_as_read,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _as_read(batch: T) -> T:
    """The dataset reads whole batches: nothing is left to collate."""
    return batch

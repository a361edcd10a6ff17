"""The frame of every image data module: splits in memory, patches, unit and protocol, loaders of global batches."""

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from datamodules.identity import digest, identity_of_images
from datamodules.images import ImageRows, IndexedImages, with_mirrors
from datamodules.loaders import GlobalLoaders
from datamodules.splits import SPLITS, Rows, Split, subset
from lvd_lightning.checks import check_at_least, check_choice, check_counts
from lvd_lightning.parts import ImagePatches
from lvd_lightning.units import BitsPerDimension, Unit

__all__ = ["ImageDataModule"]


class ImageDataModule(GlobalLoaders):
    """Images of whole numbers in the splits train, val and test.

    Loaders yield (x, index): images (b, C, H, W), of the smallest type that holds their values, and their int64 numbers
    (b,) in the split. Which examples a split holds never depends on `seed`; the order of training is a function of
    (seed, epoch) alone. Trainers run with `use_distributed_sampler=False`: the loaders divide every batch over the
    ranks themselves.

    A subclass says where images come from in `load` and what they are in `image_shape`; one whose pixels are no bytes
    says so in `num_categories`, one whose mirror images are none of the kind in `mirrors_are_alike`.

    Args:
        patch_size: the side of a patch, the part of an image that has a latent variable; it divides the images' sides.
        batch_size: examples per training step, all ranks together.
        num_workers: processes that read batches; 0 reads in the main process.
        seed: the seed of the training order.
        val_batch_size: examples per validation or test step, all ranks together; `batch_size` by default.
        max_examples: at most so many examples per split, for small runs.
        flip: whether the mirror image of every training image is a training example of its own, numbered after all
            others: there are twice as many then. They count for `max_examples`, and take no memory.

    Raises:
        ValueError: a setting is out of range, or mirror images of such data are none of the kind.

    Example:
        >>> import torch
        >>> from datamodules import ImageDataModule
        >>> class Noise(ImageDataModule):
        ...     image_shape = (1, 4, 4)
        ...     def load(self):
        ...         return {split: torch.zeros(10, 1, 4, 4, dtype=torch.uint8) for split in ("train", "val", "test")}
        >>> data = Noise(patch_size=2)
        >>> data.setup()
        >>> data.parts.num_parts, data.num_dims, data.unit.name
        (4, 16, 'bpd')
    """

    mirrors_are_alike: ClassVar[bool] = True

    def __init__(
        self,
        *,
        patch_size: int = 4,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        max_examples: int | None = None,
        flip: bool = False,
    ) -> None:
        super().__init__()
        check_counts(
            patch_size=patch_size, batch_size=batch_size, val_batch_size=val_batch_size, max_examples=max_examples
        )
        check_at_least(0, num_workers=num_workers, seed=seed)
        if flip and not self.mirrors_are_alike:
            raise ValueError(
                f"flip: got {flip}, expected False: {type(self).__name__} holds letters or digits, and most of their "
                "mirror images are none"
            )
        self.patch_size = patch_size
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_batch_size = val_batch_size or batch_size
        self.max_examples = max_examples
        self.flip = flip
        self.left_out: dict[str, int] = {}  # files that were not used, by reason
        self._images: dict[Split, Tensor | ImageRows] = {}
        self._identity: dict[Split, str] = {}

    @property
    @abstractmethod
    def image_shape(self) -> tuple[int, int, int]:
        """The shape (C, H, W) of what is modelled."""

    @abstractmethod
    def load(self) -> Mapping[Split, Tensor | ImageRows]:
        """Read every split, limited with `limit`, as integers (N, C, H, W)."""

    @property
    def published_counts(self) -> tuple[int, int, int] | None:
        """Images of train, val and test, as the data are published; None where only reading tells."""
        return None

    def published(self) -> tuple[dict[str, int], ImagePatches] | None:
        """The number of examples of every split, and their parts, known before anything is read; None if they are not.

        For plans: what is read counts.
        """
        if self.published_counts is None:
            return None
        most = math.inf if self.max_examples is None else self.max_examples
        counts = [int(min(count, most)) for count in self.published_counts]
        if self.flip:
            counts[0] = int(min(2 * counts[0], most))
        return dict(zip(SPLITS, counts)), self.parts

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
        self.parts.shape  # noqa: B018 - a patch size that does not fit is said before anything is read
        images = dict(self.load())
        self._check_counts({split: len(images[split]) for split in SPLITS})
        for split in SPLITS:
            assert tuple(images[split].shape[1:]) == self.image_shape
        if self.flip:
            images["train"] = with_mirrors(images["train"], self.limit(2 * len(images["train"])))
            if "train" in self._identity:  # of the images that were loaded
                note = f"{len(images['train'])} with mirror images"
                self._identity["train"] = digest(self._identity["train"].encode(), note.encode())
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
    def num_categories(self) -> int | tuple[int, ...]:
        """How many values a pixel has, 0..n-1: one number, or one for each channel."""
        return 256

    @property
    def parts(self) -> ImagePatches:
        """The patches that have a latent variable each.

        Raises:
            ValueError: patches of `patch_size` do not tile the images.
        """
        return ImagePatches(self.image_shape, self.patch_size, self.num_categories)

    @property
    def num_dims(self) -> int:
        """Dimensions of an image: every channel of every pixel."""
        return math.prod(self.image_shape)

    @property
    def unit(self) -> Unit:
        """Bits per dimension."""
        numbers = self.parts.num_categories
        return BitsPerDimension(uniform=sum(math.log2(number) for number in numbers) / len(numbers))

    @property
    def protocol(self) -> str:
        """What stands in brackets beside every figure; empty: whole images, without loss."""
        return ""

    @property
    def facts(self) -> dict[str, Any]:
        """The protocol for scripts."""
        return {}

    def to_rgb(self, images: Tensor) -> Tensor:
        """What a person sees: uint8 (..., 3, H, W) of images (..., C, H, W), or of real-valued means of them.

        Each channel's values are spread over 0..255; one channel is grey.
        """
        highest = torch.tensor(self.parts.num_categories, device=images.device)[:, None, None] - 1
        levels = (images.double() * 255 / highest).round().clamp(0, 255).to(torch.uint8)
        return levels.expand(*levels.shape[:-3], 3, *levels.shape[-2:])

    def images(self, split: Split) -> Tensor | ImageRows:
        """All images of a split, encoded, with shape (N, C, H, W); large sets give an object indexed like a tensor."""
        check_choice(SPLITS, split=split)
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
        """Read images by their int64 numbers (n,), as integers (n, C, H, W) on the CPU."""
        return self.images(split)[indices.cpu()]

    @override
    def dataset(self, split: Split) -> IndexedImages:
        return IndexedImages(self.images(split))

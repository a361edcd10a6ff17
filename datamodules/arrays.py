"""Images in .npy or .npz files."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from datamodules.files import require, resolve
from datamodules.images import ImageRows, Pixels, encode_images
from datamodules.rgb import RGBDataModule
from datamodules.splits import SPLITS, Rows, Split, check_fractions, divide
from lvd_lightning.archives import check_size
from lvd_lightning.checks import expect
from lvd_lightning.files import ARRAY_ERRORS, load_npy

__all__ = ["Arrays", "MappedImages"]

EXPECTED = (
    "Arrays: expected .npy files or .npz archives of uint8 images with shape (N, S, S, 3) or (N, 3, S, S): "
    "one file (path) that is divided, or three (train, val, test)."
)
READ_ERRORS = (OSError, *ARRAY_ERRORS)


class MappedImages:
    """The images of a .npy file, read from disk and encoded when they are indexed.

    Args:
        file: the file, with uint8 images of shape (N, S, S, 3) or (N, 3, S, S).
        image_size: the side S that the images must have.
        color: one of `lvd_lightning.color.COLORS`.
        region: one of `lvd_lightning.color.REGIONS`.

    Raises:
        ValueError: the file is damaged or holds something else; the message names it.
    """

    def __init__(self, file: Path, image_size: int, color: str, region: str) -> None:
        self._settings = (file, image_size, color, region)
        try:
            array = load_npy(file, "r")
        except READ_ERRORS as error:
            raise ValueError(f"{file}: cannot be read as a .npy file ({error})") from error
        self._pixels = _channels_first(array, file, image_size)
        self._color = color
        self._region = region

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Read the rows (n,) as an encoded uint8 tensor (n, 3, H, W)."""
        return encode_images(self._pixels[rows.numpy()], self._color, self._region)

    def __reduce__(self) -> tuple[type["MappedImages"], tuple[Path, int, str, str]]:
        # A worker process opens the file again; pickling a map would send all of its contents.
        return MappedImages, self._settings


class Arrays(RGBDataModule):
    """Images that are numpy arrays of bytes, (N, S, S, 3) or (N, 3, S, S), with S = `image_size`.

    Give either one file, which is divided by a fixed permutation (an archive with arrays named train, val and test is
    taken as it is), or one file for each split. A .npy file stays on disk and is mapped into memory, which several
    processes share; its images are encoded as they are read. An .npz archive is read into memory.

    Args:
        path: the one file.
        train: the file of the training split.
        val: the file of the validation split.
        test: the file of the test split.
        key: the array to take from .npz archives that hold several.
        val_fraction: how much of the one file is for validation.
        test_fraction: how much of the one file is for the test.
        **common: the settings of every `RGBDataModule`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import numpy as np
        >>> from datamodules import Arrays
        >>> with TemporaryDirectory() as folder:
        ...     path = Path(folder) / "pixels.npz"
        ...     np.savez(path, np.zeros((20, 8, 8, 3), dtype=np.uint8))
        ...     data = Arrays(str(path), image_size=8)
        ...     data.setup()
        >>> [data.num_examples(split) for split in ("train", "val", "test")]
        [16, 2, 2]
    """

    def __init__(
        self,
        path: str | None = None,
        train: str | None = None,
        val: str | None = None,
        test: str | None = None,
        key: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        given = {"train": train, "val": val, "test": test}
        paths = {split: file for split in SPLITS if (file := given[split]) is not None}
        if len(paths) != (3 if path is None else 0):
            raise ValueError(
                f"path, train, val, test: got path={path} and {given}, expected path alone or the other three"
            )
        self.path = path
        self.paths = paths
        self.key = key
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction

    @override
    def load(self) -> Mapping[Split, Tensor | ImageRows]:
        if self.path is None:
            return {split: self._whole(self._open(resolve(file))) for split, file in self.paths.items()}
        file = resolve(self.path)
        require([file], EXPECTED)
        if self.key is None and file.suffix == ".npz" and set(SPLITS) <= set(_names(file)):
            return {split: self._whole(self._open(file, split)) for split in SPLITS}
        images = self._open(file)
        rows = divide(len(images), self.val_fraction, self.test_fraction)
        return {split: self._rows(images, rows[split]) for split in SPLITS}

    def _whole(self, images: Pixels | MappedImages) -> Tensor | ImageRows:
        return self._rows(images, np.arange(len(images), dtype=np.int64))

    def _rows(self, images: Pixels | MappedImages, rows: Rows) -> Tensor | ImageRows:
        """Rows of a file as a split: encoded now if they are in memory, else when they are read."""
        kept = rows[self.limit(len(rows))]
        if isinstance(images, MappedImages):
            return ImageRows([images], kept)
        return self.encode(images[kept])

    def _open(self, file: Path, key: str | None = None) -> Pixels | MappedImages:
        """Open one file; raises a ValueError that names it if it does not hold images of the right size."""
        require([file], EXPECTED)
        if file.suffix == ".npy":
            return MappedImages(file, self.image_size, self.color, self.region)
        if file.suffix == ".npz":
            return _channels_first(_read_archive(file, key or self.key), file, self.image_size)
        raise ValueError(f"{file}: expected a name that ends in .npy or .npz")


def _names(file: Path) -> list[str]:
    """The names of the arrays in an .npz archive."""
    try:
        with np.load(file, allow_pickle=False) as archive:
            return list(archive.files)
    except (*READ_ERRORS, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read as an .npz archive ({error})") from error


def _read_archive(file: Path, key: str | None) -> Pixels:
    """Read one array of an .npz archive: the one called `key`, or the only one."""
    names = _names(file)
    if key is None and len(names) == 1:
        key = names[0]
    expect(key in names, "key", key, f"one of the arrays in {file}: {', '.join(names)}")
    with zipfile.ZipFile(file) as members:
        for info in members.infolist():
            check_size(info, file)
    try:
        with np.load(file, allow_pickle=False) as archive:
            return archive[key]
    except READ_ERRORS as error:
        raise ValueError(
            f"{file}: the array {key!r} cannot be read ({error}): give an intact archive, as numpy.savez writes it"
        ) from error


def _channels_first(array: Pixels, file: Path, image_size: int) -> Pixels:
    """See an array of images as (N, 3, S, S); the ValueError for anything else names the file."""
    if array.dtype == np.uint8 and array.ndim == 4 and len(array):
        if array.shape[1:] == (3, image_size, image_size):
            return array
        if array.shape[1:] == (image_size, image_size, 3):
            return array.transpose(0, 3, 1, 2)
    raise ValueError(
        f"{file}: holds {array.dtype} of shape {array.shape}, expected uint8 (N, {image_size}, {image_size}, 3) "
        f"or (N, 3, {image_size}, {image_size}); image_size is {image_size}"
    )

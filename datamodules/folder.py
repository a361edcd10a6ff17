"""Any folder or zip archive of images."""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from torch import Tensor
from typing_extensions import override

from datamodules.files import resolve
from datamodules.identity import digest, identity_of_files
from datamodules.images import Pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import SPLITS, Split, check_fractions, position_of_name, split_of_name
from lvd_lightning.archives import check_members, open_archive, read_member
from lvd_lightning.broken_images import BROKEN_IMAGE, why_broken
from lvd_lightning.image_names import EXTENSIONS, ImageNames, names_in_archive, names_in_folder

__all__ = ["Folder", "decode_image"]

# Images that one thread decodes before it takes more work.
DECODE_BLOCK = 64


class _Source(NamedTuple):
    """Images in one place; `read` gives the bytes of one as it is stored."""

    root: Path
    names: ImageNames
    read: Callable[[str], bytes]


_Member = tuple[_Source, str]


class Folder(RGBDataModule):
    """The images in a folder, its folders, or a .zip archive.

    Every image is cropped to its central square, resized to `image_size` and kept in memory as bytes. Which split it
    belongs to follows from a hash of its path alone, below the last folder that all images share: it is the same on
    every machine, in a folder and in an archive made of it or of the folder around it, and stays when other images come
    to that folder or go.

    Links to folders are followed, and a folder is read once. What is no image by its name, is hidden or cannot be read
    is left out; how much for which reason is said in one warning and stands in `left_out`. An image that is damaged is
    an error.

    Args:
        path: the folder or the .zip archive.
        val_fraction: about how much of the images is for validation.
        test_fraction: about how much of the images is for the test.
        train_path: another folder or archive, all of whose images are for training, so that more data is compared on
            the same validation and test images.
        **common: the settings of every `RGBDataModule`.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from datamodules import Folder
        >>> with TemporaryDirectory() as folder:
        ...     for number in range(40):
        ...         Image.new("RGB", (40, 30)).save(Path(folder) / f"{number}.png")
        ...     data = Folder(folder, val_fraction=0.2, test_fraction=0.2, image_size=16)
        ...     data.setup()
        >>> sum(data.num_examples(split) for split in ("train", "val", "test"))
        40
    """

    def __init__(
        self,
        path: str,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        train_path: str | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        self.path = path
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.train_path = train_path

    @override
    def load(self) -> Mapping[Split, Tensor]:
        with ExitStack() as opened:
            own = _open(opened, "path", self.path)
            sources = [own] if self.train_path is None else [own, _open(opened, "train_path", self.train_path)]
            return self._read(sources)

    def _read(self, sources: Sequence[_Source]) -> dict[Split, Tensor]:
        """Divide the images of the first source among the splits, give those of a second to training; decode them."""
        self.left_out = {}
        members: dict[Split, list[_Member]] = {split: [] for split in SPLITS}
        for source in sources:
            root, names = source.root, source.names
            left_out = ", ".join(f"{count} {reason}" for reason, count in names.left_out.items())
            if not names.stored:
                raise ValueError(
                    f"{root}: holds no images; expected files that end in {', '.join(sorted(EXTENSIONS))}"
                    + (f" (left out: {left_out})" if left_out else "")
                )
            if left_out:
                rank_zero_warn(f"{root}: {len(names.stored)} images are used; left out: {left_out}")
            for reason, count in names.left_out.items():
                self.left_out[reason] = self.left_out.get(reason, 0) + count
            for name in names.stored:
                is_own = source is sources[0]
                split = split_of_name(name, self.val_fraction, self.test_fraction) if is_own else "train"
                members[split].append((source, name))
        for found in members.values():  # the first few of a split are a sample of all folders
            found.sort(key=lambda member: position_of_name(member[1]))
        unusable: dict[tuple[Path, str], str] = {}
        images = {split: self.encode(self._decode(split, members[split], unusable)) for split in SPLITS}
        if unusable:
            raise ValueError(_complaint(unusable, sum(len(part) for part in images.values())))
        return images

    def _decode(self, split: Split, members: Sequence[_Member], unusable: dict[tuple[Path, str], str]) -> Pixels:
        """Decode images in threads (Pillow works outside of Python's global lock), as bytes (N, 3, S, S).

        unusable: what is wrong with which image, for images that could not be decoded, is added here.
        """
        used = [members[row] for row in self.limit(len(members))]
        digests = [""] * len(used)
        pixels = np.empty((len(used), 3, self.image_size, self.image_size), dtype=np.uint8)

        def decode_block(start: int) -> None:
            for row in range(start, min(start + DECODE_BLOCK, len(used))):
                source, name = used[row]
                stored = source.names.stored[name]
                try:
                    contents = source.read(stored)
                    digests[row] = digest(contents)
                    pixels[row] = decode_image(contents, self.image_size)
                except BROKEN_IMAGE as error:
                    unusable[source.root, stored] = why_broken(error)

        with ThreadPoolExecutor(min(32, os.cpu_count() or 1)) as pool:
            for _ in pool.map(decode_block, range(0, len(used), DECODE_BLOCK)):
                pass
        self._identity[split] = identity_of_files(zip((name for _, name in used), digests, strict=True))
        return pixels


def decode_image(data: bytes, image_size: int) -> Pixels:
    """Decode one image, upright, in RGB (transparency is dropped), and reduce its central square.

    Args:
        data: the contents of an image file.
        image_size: the side S of the result.

    Returns:
        Bytes with shape (3, S, S).

    Raises:
        ValueError: the image is smaller than that, or has more than 8 bits per channel.
        OSError: the contents are damaged or no image.
    """
    with Image.open(BytesIO(data)) as image:
        # A large JPEG is decoded at a fraction of its size, still several times larger than what is kept of it.
        image.draft(None, (4 * image_size, 4 * image_size))
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {upright.mode!r}, expected 8 bits per channel")
    width, height = upright.size
    side = min(width, height)
    if side < image_size:
        raise ValueError(f"{width} x {height} pixels, smaller than image_size {image_size}: remove it or choose less")
    left, top = (width - side) // 2, (height - side) // 2
    square = upright.convert("RGB").crop((left, top, left + side, top + side))
    if side > image_size:
        square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    return np.asarray(square).transpose(2, 0, 1)


def _open(opened: ExitStack, argument: str, path: str) -> _Source:
    """The images below a folder or in an archive, which stays open as long as `opened`."""
    root = resolve(path)
    if root.is_dir():
        return _Source(root, names_in_folder(root), lambda name: (root / name).read_bytes())
    if not root.is_file():
        raise FileNotFoundError(f"{argument}: there is no {root}; expected a folder or a .zip archive of images")
    archive = opened.enter_context(open_archive(root))
    names = names_in_archive(archive)
    check_members(archive, root, names.stored.values())
    return _Source(root, names, lambda name: read_member(archive, root, name))


def _complaint(unusable: Mapping[tuple[Path, str], str], count: int) -> str:
    """What is wrong with the first image by name, how many there are, and what to do."""
    first, *others = sorted(unusable)
    root, name = first
    complaint = f"{root}/{name.lstrip('/')}: {unusable[first]}"
    if not others:
        return f"{complaint}; remove this file or replace it by an intact one"
    also = ", ".join(name for _, name in others[:5]) + (" ..." if len(others) > 5 else "")
    return (
        f"{complaint}; {len(unusable)} of {count} images cannot be used (also {also}): remove these files or replace "
        "them by intact ones"
    )

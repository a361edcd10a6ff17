"""Pictures that users give: files, folders and .zip archives, read one by one and fitted to a circuit's size.

Shapes: H x W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lvd_lightning.archives import check_members, open_archive, read_member
from lvd_lightning.broken_images import BROKEN_IMAGE, why_broken
from lvd_lightning.checks import check_choice
from lvd_lightning.image_names import EXTENSIONS, names_in_archive, names_in_folder

__all__ = ["FITS", "Picture", "PictureSet", "fitted", "joined", "read_picture", "tiled"]

#: What may be done to pictures of another size than the circuit's.
FITS = ("resize", "crop", "tile")


@dataclass(frozen=True)
class Picture:
    """A picture.

    name: below the folder or archive it was found in, with slashes.
    pixels: uint8 RGB (3, H, W).
    is_grey: whether its file has one channel.
    is_opaque: whether nothing of it is transparent; `pixels` are without transparency.
    """

    name: str
    pixels: Tensor
    is_grey: bool = False
    is_opaque: bool = True


class PictureSet:
    """All pictures of some files, folders and .zip archives, in the order of their names, read when they are asked for.

    A context manager: archives stay open inside it.

    Raises:
        ValueError: a source is not there, has no pictures, or cannot be read; two pictures have one name.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> from PIL import Image
        >>> from lvd_lightning.use.pictures import PictureSet
        >>> with TemporaryDirectory() as folder:
        ...     for number in range(3):
        ...         Image.new("RGB", (4, 4)).save(Path(folder) / f"{number}.png")
        ...     with PictureSet([folder]) as pictures:
        ...         print(len(pictures), [picture.name for picture in pictures])
        3 ['0.png', '1.png', '2.png']
    """

    def __init__(self, sources: Sequence[str | os.PathLike[str]]) -> None:
        self._opened = ExitStack()
        self._members: list[tuple[str, str, Callable[[], bytes]]] = []
        try:
            for source in sources:
                self._members += _members(Path(source).expanduser(), self._opened)
        except BaseException:
            self._opened.close()
            raise
        names = [name for name, _, _ in self._members]
        twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
        if twice:
            self._opened.close()
            raise ValueError(f"two pictures have the name {twice[0]}: put them into one folder and give that")
        if not names:
            raise ValueError(f"got no pictures, expected files that end in {', '.join(sorted(EXTENSIONS))}")

    def __enter__(self) -> PictureSet:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[Picture]:
        return (self[number] for number in range(len(self)))

    def __getitem__(self, number: int) -> Picture:
        """Read one; a ValueError names the file if it is none."""
        name, where, read = self._members[number]
        try:
            return read_picture(name, read())
        except BROKEN_IMAGE as error:
            raise ValueError(
                f"{where}: cannot be read as a picture ({why_broken(error)}): remove or replace it"
            ) from error

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self._members]

    @property
    def num_bytes(self) -> int:
        """What all files have together."""
        return sum(len(read()) for _, _, read in self._members)


def read_picture(name: str, contents: bytes) -> Picture:
    """A picture, upright, of the contents of its file.

    Raises:
        ValueError: more than 8 bits per channel.
        OSError: no picture, or a damaged one.
    """
    with Image.open(BytesIO(contents)) as image:
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith(("I", "F")):
        raise ValueError(f"pixels of mode {upright.mode!r}, expected 8 bits per channel")
    is_opaque = True
    if upright.has_transparency_data:
        is_opaque = int(np.asarray(upright.convert("RGBA"))[..., 3].min()) == 255
    pixels = torch.from_numpy(np.asarray(upright.convert("RGB")).transpose(2, 0, 1).copy())
    return Picture(name, pixels, upright.mode in ("1", "L", "LA"), is_opaque)


def fitted(picture: Picture, size: tuple[int, int], fit: str | None = None) -> Tensor:
    """A picture's pixels as uint8 (n, 3, H, W) of the size (H, W): n = 1, or the tiles of `tiled`.

    fit: None: the picture has this size; "resize": its central part of this shape, made as large; "crop": its central
        part as it is; "tile": see `tiled`.

    Raises:
        ValueError: the picture has another size, or is too small to be cropped.
    """
    check_choice(FITS, fit=fit)
    height, width = size
    found = (int(picture.pixels.shape[1]), int(picture.pixels.shape[2]))
    if fit == "tile":
        return tiled(picture.pixels, size)
    if found == size:
        return picture.pixels[None]
    if fit is None:
        raise ValueError(
            f"{picture.name}: has {found[1]} x {found[0]} pixels, the circuit's pictures have {width} x {height}: say "
            "--fit tile (piece by piece), --fit resize or --fit crop (the centre)"
        )
    if fit == "crop":
        if found[0] < height or found[1] < width:
            raise ValueError(
                f"{picture.name}: has {found[1]} x {found[0]} pixels, fewer than the {width} x {height} that are to be "
                "cropped from it: say --fit resize or --fit tile"
            )
        top, left = (found[0] - height) // 2, (found[1] - width) // 2
        return picture.pixels[None, :, top : top + height, left : left + width]
    scale = min(found[0] / height, found[1] / width)
    part_height, part_width = max(1, round(scale * height)), max(1, round(scale * width))
    top, left = (found[0] - part_height) // 2, (found[1] - part_width) // 2
    part = picture.pixels[:, top : top + part_height, left : left + part_width]
    image = Image.fromarray(part.permute(1, 2, 0).numpy()).resize((width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())[None]


def tiled(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """Pieces (n, C, H, W) of pixels (C, H', W'), row by row; the last ones are filled up with the pixels at the edge.

    Example:
        >>> import torch
        >>> from lvd_lightning.use.pictures import joined, tiled
        >>> pixels = torch.arange(15).view(1, 3, 5)
        >>> tiled(pixels, (2, 3)).shape, bool((joined(tiled(pixels, (2, 3)), (3, 5)) == pixels).all())
        (torch.Size([4, 1, 2, 3]), True)
    """
    height, width = size
    rows = torch.arange(-(-pixels.shape[1] // height) * height).clamp_max(pixels.shape[1] - 1)
    columns = torch.arange(-(-pixels.shape[2] // width) * width).clamp_max(pixels.shape[2] - 1)
    filled = pixels[:, rows][:, :, columns]
    cells = filled.view(len(pixels), len(rows) // height, height, len(columns) // width, width)
    return cells.permute(1, 3, 0, 2, 4).reshape(-1, len(pixels), height, width)


def joined(tiles: Tensor, size: tuple[int, int]) -> Tensor:
    """The inverse of `tiled`: tiles (n, C, H, W) of a picture of the size (H', W'), as (C, H', W')."""
    _, channels, height, width = tiles.shape
    columns = -(-size[1] // width)
    cells = tiles.view(-1, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return cells.reshape(channels, -1, columns * width)[:, : size[0], : size[1]]


def _members(source: Path, opened: ExitStack) -> list[tuple[str, str, Callable[[], bytes]]]:
    """Name, place for messages and contents of every picture of a source, in the order of names."""
    if source.is_dir():
        names = names_in_folder(source)
        _check_any(source, len(names.stored))
        return [(name, str(source / file), (source / file).read_bytes) for name, file in sorted(names.stored.items())]
    if not source.is_file():
        raise ValueError(f"{source}: there is no such file or folder; expected pictures, folders or .zip archives")
    if source.suffix.lower() != ".zip":
        if source.suffix.lower() not in EXTENSIONS:
            raise ValueError(f"{source}: is no picture by its name, expected {', '.join(sorted(EXTENSIONS))} or .zip")
        return [(PurePosixPath(source.name).as_posix(), str(source), source.read_bytes)]
    archive = opened.enter_context(open_archive(source))
    found = names_in_archive(archive)
    _check_any(source, len(found.stored))
    check_members(archive, source, found.stored.values())
    return [
        (name, f"{source}/{file}", lambda file=file: read_member(archive, source, file))  # type: ignore[misc]
        for name, file in sorted(found.stored.items())
    ]


def _check_any(source: Path, count: int) -> None:
    if not count:
        raise ValueError(f"{source}: holds no pictures; expected files that end in {', '.join(sorted(EXTENSIONS))}")

"""Which pixels of a picture are missing: by a picture, a box or a half.

Shapes: H x W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lvd_lightning.broken_images import BROKEN_IMAGE, why_broken
from lvd_lightning.checks import check_choice
from lvd_lightning.use.pictures import read_picture

__all__ = ["HALVES", "missing_box", "missing_half", "missing_in"]

HALVES = ("left", "right", "top", "bottom")


def missing_in(path: Path, size: tuple[int, int]) -> Tensor:
    """The pixels that are bright (128 or more of 255) in a picture, bool (H, W).

    Raises:
        ValueError: there is no such file, it is no picture, has another size, or nothing or everything of it is bright.
    """
    if not path.is_file():
        raise ValueError(f"mask: {path}: there is no such file; expected a picture whose bright pixels are missing")
    try:
        pixels = read_picture(path.name, path.read_bytes()).pixels
    except BROKEN_IMAGE as error:
        raise ValueError(f"mask: {path} cannot be read as a picture ({why_broken(error)})") from error
    if tuple(pixels.shape[1:]) != size:
        raise ValueError(
            f"mask: {path} has {pixels.shape[2]} x {pixels.shape[1]} pixels, expected {size[1]} x {size[0]}, those of "
            "the picture: bright pixels are the missing ones"
        )
    missing = pixels.long().sum(0) >= 3 * 128
    if not bool(missing.any()) or bool(missing.all()):
        what = "everything" if bool(missing.any()) else "nothing"
        raise ValueError(
            f"mask: {path}: {what} is missing by it; bright pixels are the missing ones, dark ones are given"
        )
    return missing


def missing_box(box: str, size: tuple[int, int]) -> Tensor:
    """The pixels in a box "x,y,w,h" (left, top, width, height, in pixels), bool (H, W).

    Raises:
        ValueError: these are no four whole numbers, or the box lies outside of the picture or is all of it.
    """
    try:
        x, y, width, height = (int(word) for word in box.split(","))
    except ValueError as error:
        raise ValueError(f"box: got {box!r}, expected x,y,w,h in pixels, such as 8,8,16,16") from error
    if min(x, y) < 0 or min(width, height) < 1 or x + width > size[1] or y + height > size[0]:
        raise ValueError(
            f"box: got {box!r}, expected a box inside of the picture, which has {size[1]} x {size[0]} pixels"
        )
    missing = torch.zeros(size, dtype=torch.bool)
    missing[y : y + height, x : x + width] = True
    if bool(missing.all()):
        raise ValueError(
            f"box: got {box!r}, which is the whole picture; `sample` draws pictures of which nothing is given"
        )
    return missing


def missing_half(half: str, size: tuple[int, int]) -> Tensor:
    """The pixels of one half, bool (H, W); half: one of `HALVES`."""
    check_choice(HALVES, half=half)
    height, width = size
    missing = torch.zeros(size, dtype=torch.bool)
    row, column = (slice(None), slice(None))
    if half in ("left", "right"):
        column = slice(0, width // 2) if half == "left" else slice(width // 2, None)
    else:
        row = slice(0, height // 2) if half == "top" else slice(height // 2, None)
    missing[row, column] = True
    return missing

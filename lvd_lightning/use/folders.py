"""Folders that are there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_place", "new_folder"]


def check_place(path: Path, *, of_file: bool = False) -> None:
    """Whether a folder, or a file, can be written at this path, before anything is computed for it.

    Raises:
        ValueError: a file is there in place of a folder or the other way round, or the place is not writable.
    """
    if of_file and path.is_dir():
        raise ValueError(f"{path}: is a folder; give the name of a file in it")
    folder = (path.parent if of_file else path).absolute()
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    if not nearest.is_dir():
        raise ValueError(f"{path}: {nearest} is a file, expected a folder; give another place")
    if not os.access(nearest, os.W_OK):
        raise ValueError(f"{path}: {nearest} is not writable; give another place")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder under another name, which gets its own when everything in it is written.

    Raises:
        ValueError: there is a folder (or file) of that name, and it holds something; or the place is not writable.
    """
    check_place(out.parent)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: is there and holds something; give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

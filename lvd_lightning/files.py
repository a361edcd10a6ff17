"""Files that are there as a whole or not at all, whenever the process dies.

Everything that a run or a circuit leaves on disk is written here: under a temporary name in the same folder, forced to
the disk, then renamed. Whoever reads sees the old content or the new one.

A file that is damaged all the same (a broken disk, an editor, a copy that was cut short) is a ValueError that names it
and says what to do, whichever library reads it.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = [
    "ARRAY_ERRORS",
    "errors_naming",
    "load_npy",
    "parse_json",
    "put_in_place",
    "read_array",
    "read_json",
    "read_tensors",
    "temporary_name",
    "unreadable",
    "write_array",
    "write_atomically",
    "write_json",
    "write_tensors",
]


#: What NumPy raises on damaged files, on sizes that no memory holds, and on archives that Python cannot read.
ARRAY_ERRORS = (
    *(ValueError, EOFError, KeyError, TypeError, SyntaxError, MemoryError, OverflowError, struct.error),
    *(NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file, replacing the one that may be there.

    content: text (written as UTF-8), bytes, or a function that writes to the path that it is given; that path has the
        same suffix, from which some writers take the format.

    Raises:
        OSError: it could not be written; the error names `path`, and what was there before still is.
    """
    temporary = temporary_name(path)
    with errors_naming(path):
        try:
            if callable(content):
                content(temporary)
            else:
                temporary.write_bytes(content.encode() if isinstance(content, str) else content)
            put_in_place(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write plain values as JSON; see `write_atomically`."""
    write_atomically(path, json.dumps(value, indent=indent))


def write_array(path: Path, array: np.ndarray) -> None:
    """Write a NumPy file, without pickled objects; see `write_atomically`."""
    import numpy as np

    def save(target: Path) -> None:
        with target.open("wb") as file:  # to a name that does not end in .npy, NumPy adds that
            np.save(file, array, allow_pickle=False)

    write_atomically(path, save)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file; see `write_atomically`."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    found = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def save(target: Path) -> None:
        try:
            save_file(found, str(target), metadata=metadata)
        except SafetensorError as error:
            raise OSError(str(error)) from error

    write_atomically(path, save)


def read_json(path: Path) -> Any:
    """The values in a JSON file; a ValueError that names it if it is damaged."""
    try:
        return parse_json(path.read_text())
    except ValueError as error:  # no JSON, or no text at all
        raise unreadable(path, error) from error


def parse_json(text: str | bytes) -> Any:
    """The values in a JSON text; a ValueError for what is none, nested too deeply included."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_array(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array in a NumPy file; a ValueError that names it if it is damaged."""
    try:
        return load_npy(path, mmap_mode)
    except ARRAY_ERRORS as error:
        raise unreadable(path, error) from error


def load_npy(path: Path, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """The array in a .npy file, without pickled objects; raises one of `ARRAY_ERRORS` or an OSError if it is none."""
    import numpy as np

    found = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    if not isinstance(found, np.ndarray):  # NumPy goes by the content: an archive has no shape
        found.close()
        raise ValueError("it is an archive of arrays (.npz), expected one array (.npy)")
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, on the CPU; a ValueError that names it if it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> ValueError:
    """What is raised for a damaged file of a run."""
    reason = str(error) or type(error).__name__
    return ValueError(f"{path}: cannot be read ({reason}): remove the folder {path.parent} and run its stage again")


@contextmanager
def errors_naming(path: Path) -> Iterator[None]:
    """What a full disk raises says neither which file nor which disk: inside, it names `path`."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(temporary_name(path))):
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error


def temporary_name(path: Path) -> Path:
    """Where a file is written before it is complete: beside it, with the same suffix."""
    return path.with_name(f".{path.stem}.partial{path.suffix}")


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a complete file of the same file system its name, once its content is on the disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)

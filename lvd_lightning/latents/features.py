"""Features of patches: written to disk once, read by rows; computed whenever they are read; or the pixels themselves.

Shapes: N images, P patches, E features, m rows.
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.files import ARRAY_ERRORS, load_npy, parse_json, put_in_place, read_json, temporary_name, write_json
from lvd_lightning.ranks import on_first, rank_and_size, wait
from lvd_lightning.shares import own_chunks
from lvd_lightning.stopping import requested, stop_if_requested

__all__ = ["ComputedFeatures", "FeatureStore", "PartValues", "PatchVectors", "write_features"]

_DTYPE = np.dtype("<f2")
_SECONDS_BETWEEN_MARKS = 5.0  # of how far a file is written


class PatchVectors(Protocol):
    """A vector for every patch of every image of a split, with shape (N, P, E)."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    def read(self, start: int, stop: int) -> Tensor:
        """The vectors of a run of images, float32 with shape (stop - start, P, E)."""

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        """The vectors of single patches, float32 with shape (m, E); indices int64 with shape (m,)."""


class PartValues:
    """The values of each part's variables as its vector, such as pixels: what is clustered without a teacher.

    data: a datamodule, set up; split: "train", "val" or "test".
    """

    def __init__(self, data: Any, split: str) -> None:
        self.shape = (data.num_examples(split), data.parts.num_parts, math.prod(data.parts.shape))
        self._data, self._split = data, split

    def read(self, start: int, stop: int) -> Tensor:
        return self._patches(torch.arange(start, min(stop, self.shape[0])))

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        vectors_mE = torch.empty(len(images), self.shape[2])
        for rows in torch.arange(len(images)).split(4096):
            distinct, place = images[rows].unique(return_inverse=True)
            vectors_mE[rows] = self._patches(distinct)[place, positions[rows]]
        return vectors_mE

    def _patches(self, images: Tensor) -> Tensor:
        found: Tensor = self._data.parts.split(self._data.batch(self._split, images)).float()
        return found


class ComputedFeatures:
    """Features that take no room on disk: they are computed whenever they are read, to the precision of float16.

    Args:
        shape: N, P, E.
        compute: features of the images of some numbers (n,), with shape (n, P, E).
        compute_at: features of one position (n,) each of images (n,), with shape (n, E); None: of all positions, from
            which one is taken.
        chunk_size: images computed at once.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        compute: Callable[[Tensor], Tensor],
        compute_at: Callable[[Tensor, Tensor], Tensor] | None = None,
        chunk_size: int = 256,
    ) -> None:
        self.shape = shape
        self._compute, self._compute_at, self._chunk_size = compute, compute_at, chunk_size

    def read(self, start: int, stop: int) -> Tensor:
        images = torch.arange(start, max(start, min(stop, self.shape[0])))
        vectors_NPE = torch.empty(len(images), *self.shape[1:])
        for first in range(0, len(images), self._chunk_size):
            rows = slice(first, first + self._chunk_size)
            vectors_NPE[rows] = _rounded(self._compute(images[rows]), images[rows])
        return vectors_NPE

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        vectors_mE = torch.empty(len(images), self.shape[2])
        for first in range(0, len(images), self._chunk_size):
            rows = slice(first, first + self._chunk_size)
            if self._compute_at is not None:
                found = self._compute_at(images[rows], positions[rows])
            else:
                distinct, place = images[rows].unique(return_inverse=True)
                found = self._compute(distinct).cpu()[place, positions[rows]]
            vectors_mE[rows] = _rounded(found, images[rows], positions[rows])
        return vectors_mE


class FeatureStore:
    """A finished file of features, memory-mapped: float16 with shape (N, P, E) in NumPy's own format.

    A side-car file, written last, says that the features are complete, what they were computed from, and how many
    seconds that took.

    Raises:
        FileNotFoundError: if there are no complete features at `path`.
        ValueError: if the file is not what its side-car file says.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shape, self.key, self.seconds = _read_sidecar(self.path)
        try:
            array: Any = load_npy(self.path, "r")
        except (OSError, *ARRAY_ERRORS) as error:
            raise ValueError(f"{self.path} holds no readable features ({error}): {_REMEDY}") from error
        if array.shape != self.shape or array.dtype != _DTYPE:
            raise ValueError(
                f"{self.path} holds {array.dtype} {array.shape}, expected {_DTYPE} {self.shape}: {_REMEDY}"
            )
        size = array.offset + array.nbytes
        if self.path.stat().st_size != size:
            raise ValueError(f"{self.path} has {self.path.stat().st_size} bytes, expected {size}: {_REMEDY}")
        self._array = array

    @classmethod
    def is_complete(cls, path: str | os.PathLike[str], key: str) -> bool:
        """Whether features computed from `key` were written to the end; an interrupted or outdated file is not."""
        try:
            return cls(path).key == key
        except FileNotFoundError:
            return False

    def read(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self._array[start:stop].astype(np.float32))

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        return torch.from_numpy(self._array[images.numpy(), positions.numpy()].astype(np.float32))


def write_features(
    path: str | os.PathLike[str],
    shape: tuple[int, int, int],
    compute: Callable[[int, int], Tensor],
    *,
    key: str,
    chunk_size: int = 256,
    progress: Callable[[int, int], None] | None = None,
) -> FeatureStore:
    """Compute features chunk by chunk into a file that appears only when it is complete.

    All processes have to call; each computes a slice of the images and writes it into the one file. What processes that
    were interrupted have written is used again, if it was computed from the same.

    Args:
        shape: N, P, E.
        compute: features of the images start to stop, with shape (stop - start, P, E).
        key: says what the features were computed from; see `FeatureStore.is_complete`.
        progress: called after every chunk with this process's finished images and all of its images.

    Raises:
        ValueError: if the features have another shape or leave the range of float16.
    """
    path = Path(path)
    partial = temporary_name(path)

    def begin() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sidecar(path).unlink(missing_ok=True)
        if not _has_shape(partial, shape):
            for mark in _marks(path):
                mark.unlink()
            np.lib.format.open_memmap(partial, mode="w+", dtype=_DTYPE, shape=shape).flush()

    def complete() -> None:
        seconds = max(_Mark(mark, key).seconds for mark in _marks(path))
        put_in_place(partial, path)
        write_json(_sidecar(path), {"shape": shape, "dtype": _DTYPE.str, "key": key, "seconds": seconds})
        for mark in _marks(path):
            mark.unlink()

    on_first(begin)
    rank, size = rank_and_size()
    mark = _Mark(partial.with_name(f"{partial.stem}.{rank}of{size}.json"), key)
    own = own_chunks(shape[0], chunk_size)
    _write_slice(partial, shape, compute, range(own.start, own.stop, chunk_size), own.stop, progress, mark)
    wait()
    on_first(complete)
    return FeatureStore(path)


class _Mark:
    """How much of its slice a process has written, in a file that a later process with the same slice goes on from.

    path: of the file; key: of the features, without which the mark is one of others and counts for nothing.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        found = read_json(path) if path.is_file() else {}
        is_own = found.get("key") == key
        self.num_done: int = found["num_done"] if is_own else 0
        self.seconds: float = found["seconds"] if is_own else 0.0
        self._begun = time.monotonic() - self.seconds
        self._last = time.monotonic()

    def move(self, num_done: int, file: Any, at_once: bool = False) -> None:
        """Note that so many images are written to an open file, once they are on the disk; every few seconds."""
        now = time.monotonic()
        self.num_done, self.seconds = num_done, now - self._begun
        if at_once or now - self._last >= _SECONDS_BETWEEN_MARKS:
            file.flush()
            os.fsync(file.fileno())
            write_json(self.path, {"key": self.key, "num_done": num_done, "seconds": self.seconds})
            self._last = time.monotonic()


def _marks(path: Path) -> list[Path]:
    """The marks of all processes that write features which belong at `path`."""
    return sorted(path.parent.glob(f"{temporary_name(path).stem}.*of*.json"))


def _has_shape(partial: Path, shape: tuple[int, int, int]) -> bool:
    """Whether there is a file to go on with."""
    try:
        array = np.load(partial, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(array.shape == shape and array.dtype == _DTYPE)


def _write_slice(
    partial: Path,
    shape: tuple[int, int, int],
    compute: Callable[[int, int], Tensor],
    starts: range,
    stop: int,
    progress: Callable[[int, int], None] | None,
    mark: _Mark,
) -> None:
    """Compute and write one process's images, from where its mark is.

    Written through the file, not through a memory map: a full disk is then an OSError and not a killed process.
    """
    offset = int(np.load(partial, mmap_mode="r").offset)
    row_bytes = shape[1] * shape[2] * _DTYPE.itemsize
    with open(partial, "r+b") as file:
        for first in range(starts.start + mark.num_done, stop, starts.step):
            last = min(first + starts.step, stop)
            features = compute(first, last).cpu().to(torch.float16)
            if features.shape != (last - first, *shape[1:]):
                raise ValueError(
                    f"compute gave features of shape {tuple(features.shape)}, expected {(last - first, *shape[1:])}"
                )
            _check_finite(features, torch.arange(first, last))
            file.seek(offset + first * row_bytes)
            file.write(features.numpy().astype(_DTYPE, copy=False).tobytes())
            mark.move(last - starts.start, file, at_once=requested() is not None)
            stop_if_requested()
            if progress is not None:
                progress(last - starts.start, stop - starts.start)
        mark.move(stop - starts.start, file, at_once=True)


def _rounded(features: Tensor, images: Tensor, positions: Tensor | None = None) -> Tensor:
    """To the precision of float16, as float32 on the CPU."""
    found = features.cpu().to(torch.float16)
    _check_finite(found, images, positions)
    return found.float()


def _check_finite(features: Tensor, examples: Tensor, positions: Tensor | None = None) -> None:
    """Of the examples of some numbers: all their parts, or the one of each that `positions` names."""
    if features.isfinite().all():
        return
    row, *rest = (~features.isfinite()).nonzero()[0].tolist()
    part = rest[0] if positions is None else int(positions[row])
    raise ValueError(
        f"features hold NaN or values beyond float16, first those of example {int(examples[row])}, part {part}: "
        "the teacher has diverged; train it with a lower learning rate"
    )


_REMEDY = "delete it, and it is computed again"


def _sidecar(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_sidecar(path: Path) -> tuple[tuple[int, int, int], str, float | None]:
    """Shape and key of complete features, and the seconds that they took, which files of earlier versions lack."""
    sidecar = _sidecar(path)
    if not sidecar.is_file() or not path.is_file():
        raise FileNotFoundError(f"{path} holds no complete features: run stage latents first")
    try:
        content = parse_json(sidecar.read_text())
        num_images, num_patches, num_features = content["shape"]
        shape = (int(num_images), int(num_patches), int(num_features))
        return shape, str(content["key"]), content.get("seconds")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{sidecar} does not describe features ({error!r}): delete it, and {path}") from error

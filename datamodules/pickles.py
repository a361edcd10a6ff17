"""Pickled image batches (CIFAR-10, downsampled ImageNet), read without running any code that a pickle may hold."""

import pickle
import pickletools
import struct
from pathlib import Path
from typing import IO, Any

import numpy as np

from datamodules.images import Pixels

__all__ = ["RestrictedUnpickler", "load_pickle", "read_pixels"]

# numpy 2 moved these functions; pickles name them as the numpy that wrote them did.
NUMPY_FUNCTIONS = {("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer")}
NUMPY_CORES = ("numpy._core", "numpy.core")
# What unpickling raises on damaged files, among them lengths that no memory holds and containers without end.
LOAD_ERRORS = (
    *(pickle.UnpicklingError, EOFError, TypeError, LookupError, AttributeError, AssertionError, ImportError),
    *(NotImplementedError, OverflowError, MemoryError, RuntimeError, struct.error),
)


class RestrictedUnpickler(pickle.Unpickler):
    """Builds numpy arrays, containers, strings, bytes and numbers, and refuses every other global.

    Args:
        file: the open pickle.
        path: its name, for the message.
    """

    def __init__(self, file: IO[bytes], path: Path) -> None:
        # Python 2 wrote CIFAR-10: its strings hold the arrays' bytes.
        super().__init__(file, encoding="bytes")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        """Resolve an admitted global."""
        core, _, submodule = module.rpartition(".")
        if core in NUMPY_CORES and (submodule, name) in NUMPY_FUNCTIONS:
            return super().find_class(f"{_numpy_core()}.{submodule}", name)
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise ValueError(f"{self._path}: refused to load {module}.{name}; expected a pickle of numpy arrays alone")


def load_pickle(path: Path) -> Any:
    """Read a pickle of numpy arrays and plain values.

    Raises:
        ValueError: the file is cut short, is no pickle, or asks for anything but arrays and plain values.
    """
    with path.open("rb") as file:
        try:
            _check_numbers(file, path.stat().st_size)
            file.seek(0)
            return RestrictedUnpickler(file, path).load()
        except ValueError as error:
            if str(path) in str(error):
                raise
            raise _corrupt(path, error) from error
        except LOAD_ERRORS as error:
            raise _corrupt(path, error) from error


def read_pixels(path: Path, image_size: int) -> Pixels:
    """Read the images of one pickled batch: a dictionary whose `data` is uint8 (N, 3 S S), channel by channel.

    Args:
        path: the batch file.
        image_size: the side S that the images must have.

    Returns:
        RGB bytes with shape (N, 3, S, S).

    Raises:
        ValueError: the file does not hold that; the message names it.
    """
    batch = load_pickle(path)
    if not isinstance(batch, dict):
        raise ValueError(f"{path}: got a {type(batch).__name__}, expected a dictionary with the key 'data'")
    data = batch.get(b"data", batch.get("data"))
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2:
        kind = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else type(data).__name__
        raise ValueError(f"{path}: 'data' is {kind}, expected a uint8 array (N, {3 * image_size**2})")
    if data.shape[1] != 3 * image_size**2:
        raise ValueError(
            f"{path}: an image has {data.shape[1]} values, expected {3 * image_size**2} for image_size {image_size}"
        )
    # A pickle may hand out memory that cannot be written to, which torch does not accept.
    return np.require(data, requirements=["C", "W"]).reshape(-1, 3, image_size, image_size)


def _check_numbers(file: IO[bytes], size: int) -> None:
    """Raise a ValueError for a place in the memo that no pickle of this size needs: it would be made room for."""
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and (argument or 0) > size:
            raise ValueError(f"asks for place {argument} of the memo in {size} bytes")


def _numpy_core() -> str:
    return NUMPY_CORES[0] if np.lib.NumpyVersion(np.__version__) >= "2.0.0" else NUMPY_CORES[1]


def _latin1(text: str, encoding: str) -> bytes:
    """How protocol 2 spells bytes; any other codec is refused."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


def _corrupt(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: truncated or not a pickle of numpy arrays ({type(error).__name__}: {error})")

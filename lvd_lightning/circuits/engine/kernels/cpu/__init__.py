"""Fused kernels in C for circuits on the CPU, compiled at first use; without a compiler PyTorch does the work.

Where a compiler fails, or its result cannot be kept, one warning says so; where there is none, a line at level INFO.
`LVD_LIGHTNING_NATIVE=0` in the environment turns the kernels off, and the warning with them.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.kernels.cpu.compiler import NoCompilerError, build

__all__ = ["library", "suits"]

logger = logging.getLogger(__name__)

REALS = {torch.float32: "float", torch.float64: "double"}
#: Levels at which this process has said that there are no kernels: once is enough for both types of numbers.
_reported: set[int] = set()


def library(dtype: torch.dtype) -> ctypes.CDLL | None:
    """The kernels for tensors of this type, or None where there are none and PyTorch has to do."""
    if os.environ.get("LVD_LIGHTNING_NATIVE", "1") == "0" or dtype not in REALS:
        return None
    return _load(REALS[dtype])


def suits(tensors: Sequence[Tensor]) -> bool:
    """Whether the kernels can work on the memory of all these tensors."""
    return all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)


@functools.cache
def _load(real: str) -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        found = build(real)
    except NoCompilerError as error:
        _report(logging.INFO, str(error))
        return None
    except (OSError, RuntimeError, ValueError) as error:  # no home directory is a RuntimeError
        _report(logging.WARNING, f"{error}\nLVD_LIGHTNING_NATIVE=0 in the environment silences this.")
        return None
    _share_threads(found)
    pointer, number, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    found.forward.argtypes = found.update_table.argtypes = (pointer, threads)
    found.backward.argtypes = (pointer, pointer, threads)
    found.finish.argtypes, found.finish.restype = (pointer, pointer, pointer, pointer), ctypes.c_double
    found.collect_ties.argtypes = (pointer, number, pointer, pointer, number, pointer, threads)
    found.bound_error.argtypes = (pointer, pointer, number, pointer, ctypes.c_double, *(pointer,) * 4, threads)
    found.pass_edges.argtypes = (*(number,) * 3, *(pointer,) * 5, threads)
    for name in ("forward", "backward", "collect_ties", "bound_error", "update_table", "pass_edges"):
        getattr(found, name).restype = None
    return found


def _report(level: int, reason: str) -> None:
    """Say, once per process, that PyTorch does the work, and why."""
    if level not in _reported:
        _reported.add(level)
        logger.log(level, "circuits run without compiled kernels, on a slower path: %s", reason)


def _share_threads(found: ctypes.CDLL) -> None:
    """Let the kernels run on PyTorch's own threads: a second pool would wait for processors that the first one holds.

    PyTorch makes its OpenMP runtime visible to the whole process; GNU's and LLVM's have these entry points. Without
    them the kernels run on the calling thread.
    """
    process = ctypes.CDLL(None)
    names = ("GOMP_parallel", "omp_get_thread_num")
    if all(hasattr(process, name) for name in names):
        found.set_parallel(*(ctypes.cast(getattr(process, name), ctypes.c_void_p) for name in names))

"""Fused kernels in Triton for circuits on a GPU; without Triton, or where they fail, PyTorch does the work.

They take the general pass of `layers.py`: logarithms between layers, matrix products of scaled numbers inside. What the
host would have to ask for (did a sum underflow?) is settled inside the kernels, so that a training step never waits for
the device. Single precision only.

Before their first use on a device they compute a small circuit that PyTorch computes as well (`kernel_check.py`, which
hands in its check since it knows circuits and nothing here does). `LVD_LIGHTNING_TRITON=0`
in the environment turns them off. With `TRITON_INTERPRET=1` they run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

__all__ = ["PRECISIONS", "applies", "check_first_with", "interprets", "on", "passes_for", "switched"]

logger = logging.getLogger(__name__)

#: Precisions of matrix products, from the most exact to the fastest; sums are float32 in all of them.
PRECISIONS = ("ieee", "tf32x3", "tf32", "bf16")

_forced: bool | None = None
#: Raises if kernels and PyTorch differ on a device.
_check: Callable[[torch.device], None] | None = None


def applies(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether circuits of this type on this device are computed by the kernels."""
    if dtype != torch.float32 or device.type != ("cpu" if interprets() else "cuda"):
        return False
    if os.environ.get("LVD_LIGHTNING_TRITON", "1") == "0":
        return False
    return _is_usable(str(device)) if _forced is None else _forced


def passes_for(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """The module `passes`, where it applies; else None. Triton is imported when it is needed, not before."""
    if not applies(device, dtype):
        return None
    from lvd_lightning.circuits.engine.kernels.triton import passes

    return passes


def interprets() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launch kernels on this device: Triton takes the current one, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def check_first_with(check: Callable[[torch.device], None]) -> None:
    """Say what is called before the first use of a device; it raises where the kernels do not work."""
    global _check
    _check = check


@contextlib.contextmanager
def switched(on: bool) -> Iterator[None]:
    """Use the kernels, or PyTorch, without asking whether they work on the device: for comparisons."""
    global _forced
    before, _forced = _forced, on
    try:
        yield
    finally:
        _forced = before


@functools.cache
def _is_usable(device: str) -> bool:
    """Whether the kernels compile for this device and agree with PyTorch; says so once if not."""
    try:
        assert _check is not None
        _check(torch.device(device))
    except Exception as error:  # no Triton, no compiler, too little shared memory, wrong numbers
        logger.warning(
            "circuits on %s run without fused kernels, by PyTorch operations that wait for the device: %s: %s",
            device,
            type(error).__name__,
            str(error).splitlines()[0] if str(error) else "",
        )
        return False
    return True

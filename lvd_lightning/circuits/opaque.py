"""Calls that `torch.compile` leaves alone."""

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

__all__ = ["opaque"]

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which `torch.compile` calls as it is, between two graphs, and does not look into.

    There is nothing in it to gain: it runs kernels of its own. Whoever looks into it meets calls of compiled code,
    checks that read values and caches, and breaks a graph at each, for minutes.

    `torch.compiler.disable` does the work, once somebody has loaded the compiler; by itself it would load it at once,
    which takes longer than the rest of this library.
    """
    disabled: Callable[P, R] | None = None

    @functools.wraps(function)
    def call(*arguments: P.args, **keywords: P.kwargs) -> R:
        nonlocal disabled
        if disabled is None:
            if "torch._dynamo" not in sys.modules:
                return function(*arguments, **keywords)
            disabled = torch.compiler.disable(function)
        return disabled(*arguments, **keywords)

    return call

"""Which tables were changed since they were last known to be good: asked of PyTorch's version counters, not of numbers.

Whatever writes into a tensor in place counts its version up, an optimizer of PyTorch as well as `load_state_dict`. Who
knows that the new numbers are right says so, and nobody looks at them again. The fused optimizers of PyTorch do not
count; a hook behind their steps does it for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

__all__ = ["KnownTables"]


class KnownTables:
    """The tables of a circuit as they were when they were last trusted."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int]] = {}

    def trust(self, tables: Iterable[Tensor]) -> None:
        """These are good as they are now."""
        self._known = {number: (table, table._version) for number, table in enumerate(tables) if _has_version(table)}

    def changed(self, tables: Iterable[Tensor]) -> Iterator[int]:
        """The numbers of those that are others now, or have other contents; each is trusted once it was given out.

        Tensors that `torch.func.functional_call` puts in the place of parameters are the caller's own affair, and while
        a CUDA graph is captured nobody can look.
        """
        for number, table in enumerate(tables):
            known = self._known.get(number)
            if known is not None and known[0] is table and known[1] == table._version:
                continue
            if not isinstance(table, nn.Parameter) or not _has_version(table) or _is_capturing(table):
                continue
            yield number
            self._known[number] = (table, table._version)


def _has_version(table: Tensor) -> bool:
    return not table.is_inference()


def _is_capturing(table: Tensor) -> bool:
    return table.is_cuda and torch.cuda.is_current_stream_capturing()


def _count_fused_step(optimizer: Optimizer, arguments: Any, settings: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([table for table in group["params"] if table.grad is not None])


register_optimizer_step_post_hook(_count_fused_step)

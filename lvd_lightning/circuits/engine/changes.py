"""Which tables were changed since they were last known to be good: asked of PyTorch's version counters, not of numbers.

Whatever writes into a tensor in place counts its version up, an optimizer of PyTorch as well as `load_state_dict`. Who
knows that the new numbers are right says so, and nobody looks at them again. The fused optimizers of PyTorch do not
count; a hook behind their steps does it for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

__all__ = ["KnownTables"]


class KnownTables:
    """The tables of a circuit as they were when they were last trusted."""

    def __init__(self, tables: Iterable[Tensor]) -> None:
        self._known = [_seen(table) for table in tables]

    def trust(self) -> None:
        """They are good as they are now."""
        self._known = [_seen(table) for table, _ in self._known]

    def changed(self, tables: Iterable[Tensor]) -> list[int]:
        """The numbers of those that are other tensors now, or have other contents.

        Tensors that `torch.func.functional_call` puts in the place of parameters are the caller's own affair, and while
        a CUDA graph is captured nobody can look.
        """
        return [
            number
            for number, (table, (known, version)) in enumerate(zip(tables, self._known, strict=True))
            if (table is not known or (version is not None and table._version != version)) and _can_tell(table)
        ]

    def learn(self, number: int, table: Tensor) -> None:
        """This one was looked at and is good."""
        self._known[number] = _seen(table)


def _seen(table: Tensor) -> tuple[Tensor, int | None]:
    """A table and its version; tensors of inference mode have none."""
    return table, None if table.is_inference() else table._version


def _can_tell(table: Tensor) -> bool:
    is_captured = table.is_cuda and torch.cuda.is_current_stream_capturing()
    return isinstance(table, nn.Parameter) and not is_captured


def _count_fused_step(optimizer: Optimizer, arguments: Any, settings: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            torch.autograd.graph.increment_version([table for table in group["params"] if table.grad is not None])


register_optimizer_step_post_hook(_count_fused_step)

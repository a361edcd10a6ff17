"""Dropout that does not depend on the number of ranks: its masks are drawn for the whole batch.

Shapes: b examples of this rank, B examples of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from lvd_lightning.ranks import rank_and_size
from lvd_lightning.shares import batch_total

__all__ = ["batch_noise"]


@contextmanager
def batch_noise(count: int) -> Iterator[None]:
    """Inside, what layers draw from the global generators are this rank's rows of what the whole batch would draw.

    Of tensors whose first dimension is that of the examples, with generators in one state on all ranks. One process
    goes on as always.

    count: b.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield
        return
    # The other kernels of attention draw inside, where nobody sees their masks.
    with sdpa_kernel(SDPBackend.MATH), _BatchNoise(count, batch_total(count), rank, size):
        yield


class _BatchNoise(TorchDispatchMode):
    def __init__(self, count: int, total: int, rank: int, size: int) -> None:
        super().__init__()
        self.count, self.total, self.rank, self.size = count, total, rank, size

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if function is torch.ops.aten.bernoulli_.float and len(args[0]) == self.count:
            drawn: Tensor = args[0]
            return drawn.copy_(self._own(function(self._whole(drawn), *args[1:], **named)))
        if function is torch.ops.aten.native_dropout.default and len(args[0]) == self.count:
            x, share, train = args
            if train and share > 0:
                kept = self._own(function(self._whole(x).fill_(1.0), share, train, **named)[1])
                return x * kept / (1 - share), kept
        return function(*args, **named)

    def _whole(self, own: Tensor) -> Tensor:
        """Room for the whole batch, in memory as one process would have it."""
        strides = own.stride()
        order = sorted(range(own.dim()), key=lambda dim: -strides[dim])
        sizes = [self.total if dim == 0 else own.shape[dim] for dim in order]
        room = torch.empty(sizes, dtype=own.dtype, device=own.device)
        return room.permute(sorted(range(own.dim()), key=lambda place: order[place]))

    def _own(self, whole: Tensor) -> Tensor:
        return whole[self.rank :: self.size]

"""Dropout and other noise that do not depend on the number of ranks: they are drawn for the whole batch.

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
    """Inside, what is drawn for the examples of a batch are this rank's rows of what the whole batch would draw.

    That is noise whose first dimension is that of the examples: dropout, and uniform, normal and exponential noise,
    from the global generators or others, which have to be in one state on all ranks. One process goes on as always.

    count: b.
    """
    rank, size = rank_and_size()
    if size == 1:
        yield
        return
    # The other kernels of attention draw inside, where nobody sees their masks.
    with sdpa_kernel(SDPBackend.MATH), _BatchNoise(count, batch_total(count), rank, size):
        yield


_OPS = torch.ops.aten
_FACTORIES = (_OPS.rand.default, _OPS.rand.generator, _OPS.randn.default, _OPS.randn.generator)
_IN_PLACE = (_OPS.bernoulli_.float, _OPS.uniform_.default, _OPS.normal_.default, _OPS.exponential_.default)


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
        if function in _FACTORIES and args[0] and args[0][0] == self.count:
            return self._own(function([self.total, *args[0][1:]], *args[1:], **named)).contiguous()
        if function in _IN_PLACE and args[0].dim() and len(args[0]) == self.count:
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

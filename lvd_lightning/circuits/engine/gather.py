"""Sums and products of rows at fixed indices, with the views and buffers of a workspace bound once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from lvd_lightning.circuits.engine.plan import Gather

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.kernels.triton.rows import RowTable

__all__ = ["BoundGather", "GatherRows", "as_range"]


class GatherRows(nn.Module):
    """Sums of rows: row r of the result is the sum of some rows of a source (indices are fixed, see `plan.Gather`)."""

    first: Tensor

    def __init__(self, gather: Gather) -> None:
        super().__init__()
        self.start = as_range(gather.first)
        self._table: RowTable | None = None
        self.register_buffer("first", torch.from_numpy(gather.first), persistent=False)
        self.bounds = [slot.dst for slot in gather.more]
        self.prefix = [as_range(slot.dst) == 0 for slot in gather.more]
        for number, slot in enumerate(gather.more):
            self.register_buffer(f"dst{number}", torch.from_numpy(slot.dst), persistent=False)
            self.register_buffer(f"src{number}", torch.from_numpy(slot.src), persistent=False)

    @property
    def is_slice(self) -> bool:
        """Whether the result is a plain slice of the source."""
        return self.start is not None and not self.bounds

    def largest_part(self) -> int:
        """Rows of the largest slot beyond the first."""
        return max((len(rows) for rows in self.bounds), default=0)

    def table(self, num_folds: int) -> RowTable:
        """The rows as the kernels for a GPU read them, for a layer of `num_folds` nodes; made once on every device."""
        if self._table is None or self._table.rows.device != self.first.device:
            from lvd_lightning.circuits.engine.kernels.triton.rows import RowTable

            self._table = RowTable.of(self, num_folds)
        return self._table

    def bind(
        self, source_RB: Tensor, low: int, high: int, out_NB: Tensor, scratch: Tensor, product: bool = False
    ) -> BoundGather:
        """Rows low..high of the result into `out_NB`; `scratch` is a flat buffer for `largest_part` rows.

        product: multiply rows instead of adding them; for gathers whose further slots fill a prefix.
        """
        view = None if self.start is None else source_RB[self.start + low : self.start + high]
        parts = []
        for number, rows in enumerate(self.bounds):
            a, b = (int(found) for found in np.searchsorted(rows, [low, high]))
            if a == b:
                continue
            part = scratch[: (b - a) * source_RB.shape[1]].view(b - a, -1)
            index = getattr(self, f"src{number}")[a:b]
            if self.prefix[number]:
                parts.append(_Part(index, part, out_NB[: b - a], None))
            else:
                assert not product
                parts.append(_Part(index, part, out_NB, getattr(self, f"dst{number}")[a:b] - low))
        return BoundGather(source_RB, out_NB, view, self.first[low:high], parts, product)

    def dense(self, source_RB: Tensor, low: int, high: int) -> Tensor:
        """Rows low..high of the result: a view where possible, else fresh memory."""
        if self.is_slice:
            assert self.start is not None
            return source_RB[self.start + low : self.start + high]
        out_NB = source_RB.new_empty(high - low, source_RB.shape[1])
        self.bind(source_RB, low, high, out_NB, source_RB.new_empty(self.largest_part() * source_RB.shape[1])).run()
        return out_NB


@dataclass
class _Part:
    """`out[index_out] += source[index]`, by way of `scratch`; `index_out` None means all rows of `out`."""

    index: Tensor
    scratch: Tensor
    out: Tensor
    index_out: Tensor | None


@dataclass
class BoundGather:
    """A gather with its buffers."""

    source: Tensor
    out: Tensor
    view: Tensor | None
    first: Tensor
    parts: list[_Part]
    product: bool = False

    @property
    def is_inside(self) -> bool:
        """Whether `out` is other rows of `source` itself (products that are stored), which `index_select` refuses."""
        return self.out.untyped_storage().data_ptr() == self.source.untyped_storage().data_ptr()

    def run(self) -> None:
        """Fill `out`."""
        parts = self.parts
        if self.view is None and self.is_inside:
            self.out.copy_(self.source.index_select(0, self.first))
        elif self.view is None:
            torch.index_select(self.source, 0, self.first, out=self.out)
        elif parts and parts[0].index_out is None and len(parts[0].out) == len(self.out):
            torch.index_select(self.source, 0, parts[0].index, out=parts[0].scratch)
            combine = torch.mul if self.product else torch.add
            combine(self.view, parts[0].scratch, out=self.out)
            parts = parts[1:]
        elif self.out.data_ptr() != self.view.data_ptr():
            self.out.copy_(self.view)
        for part in parts:
            torch.index_select(self.source, 0, part.index, out=part.scratch)
            if self.product:
                part.out.mul_(part.scratch)
            elif part.index_out is None:
                part.out.add_(part.scratch)
            else:
                part.out.index_add_(0, part.index_out, part.scratch)


def as_range(index: np.ndarray) -> int | None:
    """The first number of `index` if it counts up by one from there, else None."""
    if len(index) == 0 or not np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return None
    return int(index[0])

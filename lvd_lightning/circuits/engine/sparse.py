"""Sum nodes of which pruning left few edges: their weights are stored and multiplied row by row, live edges only.

The layout is that of compressed sparse rows. Where it does not pay, pruned edges stay in a dense table, as zeros behind
a mask. Matrix products reach about twice the rate on dense tables, so that with half of the edges a step takes about as
long either way (benchmarks/edges.py); memory falls with the edges.

Shapes: F folded nodes, H outer units, K inner units, R = F H rows, E live edges of all rows, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["LAYOUTS", "EdgeIndex", "Layout", "SparseEdges", "pays"]

Index = NDArray[Any]
Layout = Literal["auto", "dense", "sparse"]
LAYOUTS: tuple[Layout, ...] = ("auto", "dense", "sparse")
#: At this share of live edges or less, the sparse layout takes less time than the dense one, or little more.
SPARSE_BELOW = 0.55
#: Inner units below which rows are too short for it.
LEAST_WIDTH = 32
#: Columns are stored in 16 bits.
MOST_WIDTH = 1 << 15


def pays(mask_HK: Tensor | None, layout: Layout) -> bool:
    """Whether a sum node with these live edges (None: all) should be sparse."""
    if mask_HK is None or layout == "dense" or max(mask_HK.shape) > MOST_WIDTH:
        return False
    if layout == "sparse":
        return True
    return mask_HK.shape[1] >= LEAST_WIDTH and float(mask_HK.double().mean()) <= SPARSE_BELOW


@dataclass
class EdgeIndex:
    """Where the live edges of folded nodes are: `column` (E), those of row r from `start[r]` (R + 1) on.

    The same edges by column: the inner units of fold f are F K rows, those of row n from `by_column_start[n]` on, with
    the outer unit of each, and its place among the edges of the fold.
    """

    shape: tuple[int, int, int]  # F, H, K
    start: Index
    column: Index
    by_column_start: Index
    outer: Index
    place: Index

    @classmethod
    def of(cls, masks: list[Tensor], outer: int, inner: int) -> EdgeIndex:
        """From the masks of the nodes, each at most (outer, inner). Units that only pad are copies of the first."""
        live = np.zeros((len(masks), outer, inner), dtype=bool)
        for f, mask in enumerate(masks):
            units, width = mask.shape
            live[f, :units, :width] = mask.cpu().numpy()
            live[f, units:] = live[f, 0]
        fold, row, column = np.nonzero(live)
        per_row = live.sum(2).reshape(-1)
        start = np.concatenate([[0], per_row.cumsum()])
        order = np.lexsort((row, column, fold))
        place = np.arange(len(fold)) - start[fold * outer]
        by_column_start = np.concatenate([[0], live.sum(1).reshape(-1).cumsum()])
        return cls(
            live.shape,
            start.astype(np.int64),
            column.astype(np.int16),
            by_column_start.astype(np.int64),
            row[order].astype(np.int16),
            place[order].astype(np.int32),
        )


class SparseEdges(nn.Module):
    """Weights (E) of the live edges of a layer, against tables (F, H, K)."""

    start: Tensor
    column: Tensor

    def __init__(self, index: EdgeIndex) -> None:
        super().__init__()
        self.index = index
        self.num_folds, self.outer, self.inner = index.shape
        self.fold_start = index.start[:: self.outer].tolist()
        self.register_buffer("start", torch.from_numpy(index.start), persistent=False)
        self.register_buffer("column", torch.from_numpy(index.column), persistent=False)

    @property
    def count(self) -> int:
        """E."""
        return self.column.numel()

    def dense(self, values_E: Tensor, low: int = 0, high: int | None = None) -> Tensor:
        """The tables of folds low..high, 0 where there is no edge: (high - low, H, K)."""
        high = self.num_folds if high is None else high
        out = values_E.new_zeros((high - low) * self.outer * self.inner)
        out[self._places(low, high)] = values_E[self.fold_start[low] : self.fold_start[high]]
        return out.view(high - low, self.outer, self.inner)

    def take(self, table_FHK: Tensor, low: int = 0) -> Tensor:
        """The entries of live edges in the tables of the folds from `low` on."""
        return table_FHK.reshape(-1)[self._places(low, low + len(table_FHK))]

    def write(self, values_E: Tensor, table_FHK: Tensor, low: int) -> None:
        """Put these entries into `values_E`."""
        high = low + len(table_FHK)
        values_E[self.fold_start[low] : self.fold_start[high]] = self.take(table_FHK, low)

    def row_sums(self, values_E: Tensor) -> Tensor:
        """Sums over the edges of every row, (R)."""
        return torch.segment_reduce(values_E, "sum", lengths=self.counts, unsafe=True)

    def column_sums(self, values_E: Tensor) -> Tensor:
        """Sums over the edges of every inner unit, float64 (F, K)."""
        edges_F = torch.tensor(self.fold_start, device=values_E.device).diff()
        fold_E = torch.repeat_interleave(torch.arange(self.num_folds, device=values_E.device), edges_F)
        out = torch.zeros(self.num_folds * self.inner, dtype=torch.float64, device=values_E.device)
        return out.index_add_(0, fold_E * self.inner + self.column, values_E.double()).view(self.num_folds, self.inner)

    def spread(self, values_R: Tensor) -> Tensor:
        """The number of a row at each of its edges, (E)."""
        return torch.repeat_interleave(values_R, self.counts, output_size=self.count)

    @property
    def counts(self) -> Tensor:
        """Live edges of every row, (R)."""
        return self.start.diff()

    def _places(self, low: int, high: int) -> Tensor:
        """Where the edges of folds low..high are in their tables, counted from the first."""
        start = self.start[low * self.outer : high * self.outer + 1]
        first, last = self.fold_start[low], self.fold_start[high]
        rows = torch.arange(len(start) - 1, device=start.device)
        row_of_edge = torch.repeat_interleave(rows, start.diff(), output_size=last - first)
        return row_of_edge * self.inner + self.column[first:last]

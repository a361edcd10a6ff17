"""Forward and backward pass with linear values (see `workspace.LinearWorkspace`) in the kernels of `kernels.c`.

A pass is one call. Layer by layer, fold by fold, inner units are looked up in tables, multiplied, scaled and mixed
while they are in the cache; on the way back gradients go to the tables of inputs and, divided by their values, to the
sums below.

Shapes: F folded nodes, H outer units, K inner units, B batch, G circuits, P parameter rows, S categories; J blocks of
C columns hold the batch; V and E the row spaces of `plan.py`. Values of inputs are not kept.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_double, c_int64, c_void_p
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from lvd_lightning.circuits.distributions.logistic import DiscretizedLogistic
from lvd_lightning.circuits.engine.kernels.cpu import library, suits
from lvd_lightning.circuits.engine.layers import BITS_PER_NAT
from lvd_lightning.circuits.engine.plan import LOG_ZERO, LayerPlan

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.batch import Batch
    from lvd_lightning.circuits.engine.engine import Engine
    from lvd_lightning.circuits.engine.error_bound import ErrorBound
    from lvd_lightning.circuits.engine.layers import InputLayer, Layer

__all__ = ["FusedWorkspace", "LayerIndex", "WideWorkspace", "applies"]

Index = NDArray[Any]
#: As in kernels.c: columns of a block, and of one step of a matrix product at most; blocks of a backward step.
WIDTH, LARGEST_STRIP, BLOCKS_AT_ONCE = 64, 32, 4
#: As in kernels.c: sums over examples that a logistic unit learns from.
NUM_SUMS = 4


def applies(engine: Engine, tables: Sequence[Tensor]) -> bool:
    """Whether the kernels can run these layers with these parameters."""
    families = (leaf.distribution for leaf in engine.leaf_layers())
    known = all(family.is_table or isinstance(family, DiscretizedLogistic) for family in families)
    return known and engine.is_linear and suits(tables) and library(engine.dtype) is not None


class _Leaf(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("start", "units", "size", "folds")),
        *((name, c_void_p) for name in ("fold", "table_row", "table", "x", "values", "observed")),
        *((name, c_void_p) for name in ("table_grad", "rows_grad", "circuit", "shift", "largest", "sums")),
        ("last", c_double),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("folds", "outer", "units", "first_edge", "first_row", "first_node")),
        *((name, c_void_p) for name in ("parameter_rows", "grad_rows", "weight", "weight_grad")),
        *((name, c_void_p) for name in ("edge_start", "edge_column")),
        *((name, c_void_p) for name in ("by_column_start", "by_column_row", "by_column_place")),
        *((name, c_void_p) for name in ("factor_start", "factor", "target_start", "target", "source_start", "source")),
    )


class _Space(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "blocks", "first_sum", "num_sums", "num_edges", "num_nodes")),
        *((name, c_int64) for name in ("num_leaves", "num_layers", "scratch_size", "num_circuits", "num_heads")),
        *((name, c_void_p) for name in ("leaves", "layers", "circuit_of_node", "columns", "head_rows")),
        *((name, c_void_p) for name in ("sums", "scaled", "inner", "peaks", "lowest", "scratch")),
    )


class _Level(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("folds", "outer", "first_node", "first_row", "sums_width", "inputs_width")),
        *((name, c_void_p) for name in ("sums", "inputs", "losses")),
    )


@dataclass
class LayerIndex:
    """The rows that the inner units n of a layer are products of, by n and by row; lists as in `kernels.c`.

    factors of n: factor[factor_start[n]:factor_start[n + 1]]; rows that fold f reads: target[target_start[f]:...], and
    the inner units that read the t-th of them: source[source_start[t]:...]. In a tree no other fold reads them.
    """

    factor_start: Index
    factor: Index
    target_start: Index
    target: Index
    source_start: Index
    source: Index

    @classmethod
    def of(cls, plan: LayerPlan) -> LayerIndex:
        """From the plan of a layer."""
        size, folds = len(plan.inputs.first), np.arange(len(plan.nodes) + 1)
        unit = np.concatenate([np.arange(size), *(slot.dst for slot in plan.inputs.more)])
        row = np.concatenate([plan.inputs.first, *(slot.src for slot in plan.inputs.more)])
        unit, row = unit[row > LOG_ZERO], row[row > LOG_ZERO]
        order = np.argsort(unit, kind="stable")
        factor_start, factor = np.searchsorted(unit[order], np.arange(size + 1)), row[order]
        _, first, group = np.unique(row[order], return_index=True, return_inverse=True)
        rank = np.empty_like(first)  # rows in the order of their first readers
        rank[np.argsort(first)] = np.arange(len(first))
        order = order[np.argsort(rank[group], kind="stable")]
        starts = np.flatnonzero(np.r_[True, row[order][1:] != row[order][:-1]][: len(order)])
        target_start = np.searchsorted(unit[order][starts], folds * plan.inner_units)
        found = (factor_start, factor, target_start, row[order][starts], np.r_[starts, len(order)], unit[order])
        return cls(*(part.astype(np.int32) for part in found))


class FusedWorkspace:
    """Buffers of one forward pass and, with `keep`, of a backward pass after it; see `Space` in kernels.c."""

    def __init__(self, engine: Engine, size: int, keep: bool, dtype: torch.dtype | None = None) -> None:
        self.layers, self.leaves = engine.inner_layers(), engine.leaf_layers()
        self.index = engine.layer_index()
        self.size, self.keep = size, keep
        self.least = 0.0  # of all peaks and sums, multiplied
        self.columns_G: Tensor | None = None
        self.blocks = -(-size // WIDTH)
        self.circuit_of_node = engine.circuit_of_node
        like = engine.like() if dtype is None else engine.like().to(dtype)
        found = library(like.dtype)
        assert found is not None
        self.library = found
        first_sum = engine.plan.layers[0].outer_start
        num_sums = engine.plan.num_value_rows - first_sum
        num_edges = sum(layer.num_folds * layer.inner_units for layer in self.layers)
        num_nodes = len(self.circuit_of_node)
        self.head_rows_GH = engine.roots
        self.sums_JVC = like.new_empty(self.blocks, num_sums, WIDTH)
        self.scaled_JVC = like.new_zeros(self.blocks, num_sums if keep else 0, WIDTH)  # unread rows stay 0
        self.inner_JEC = like.new_empty(self.blocks, num_edges if keep else 0, WIDTH)
        self.peaks_JNC = like.new_empty(self.blocks, num_nodes, WIDTH)
        self.lowest_JNC = torch.empty_like(self.peaks_JNC)
        self.largest_JNC = self.share_JNC = like.new_empty(0)
        self.scratch = like.new_empty(0)
        widest = max(layer.inner_units for layer in self.layers)
        self.scratch_size = (BLOCKS_AT_ONCE * widest + -(-widest // LARGEST_STRIP) * LARGEST_STRIP) * WIDTH
        is_table = [leaf.distribution.is_table for leaf in self.leaves]
        self.rows_grad = [
            like.new_zeros(leaf.num_folds * leaf.num_units if keep and leaf.accumulate and is_table else 0, size)
            for leaf, is_table in zip(self.leaves, is_table, strict=True)
        ]
        self.sums_FK4 = [  # of units that nothing reads they stay 0
            None
            if is_table or not keep
            else like.new_zeros(leaf.num_folds, leaf.num_units, NUM_SUMS, dtype=torch.float64)
            for leaf, is_table in zip(self.leaves, is_table, strict=True)
        ]
        self.shift_FB = [
            None if is_table else torch.zeros(leaf.num_folds, size, dtype=torch.int32)
            for leaf, is_table in zip(self.leaves, is_table, strict=True)
        ]
        self.largest_FB = [
            None if is_table else like.new_zeros(leaf.num_folds, size)
            for leaf, is_table in zip(self.leaves, is_table, strict=True)
        ]
        self.prepared: list[Tensor | None] = [None] * len(self.leaves)  # parameters as the kernels want them
        self.values: list[Tensor | None] = [None] * len(self.leaves)
        self.parameter_rows = [layer.parameter_rows for layer in self.layers]
        self.leaf_rows = [_leaf_rows(leaf) for leaf in self.leaves]
        self.own_rows = torch.arange(max(layer.num_folds for layer in self.layers))
        self.is_read = [self._reads_all(leaf) for leaf in self.leaves]
        self.leaf_structs = (_Leaf * len(self.leaves))()
        self.layer_structs = (_Layer * len(self.layers))()
        counts = (first_sum, num_sums, num_edges, num_nodes, len(self.leaves), len(self.layers), self.scratch_size)
        self.space = _Space(size, self.blocks, *counts, *engine.roots.shape)
        self._bind()

    def _bind(self) -> None:
        """Fill in what stays the same."""
        logistic = zip(self.shift_FB, self.largest_FB, strict=True)
        parts = zip(self.leaf_structs, self.leaves, self.leaf_rows, self.rows_grad, logistic, strict=True)
        for leaf_struct, leaf, (fold, table_row), rows, (shift, largest) in parts:
            leaf_struct.circuit = leaf.circuits.data_ptr()
            leaf_struct.shift = None if shift is None else shift.data_ptr()
            leaf_struct.largest = None if largest is None else largest.data_ptr()
            leaf_struct.start, leaf_struct.units = leaf.start, leaf.num_units
            leaf_struct.size, leaf_struct.folds = leaf.distribution.size, leaf.num_folds
            if isinstance(leaf.distribution, DiscretizedLogistic):
                leaf_struct.size, leaf_struct.last = NUM_SUMS, leaf.distribution.num_values - 1
            leaf_struct.fold, leaf_struct.table_row = fold.data_ptr(), table_row.data_ptr()
            leaf_struct.rows_grad = rows.data_ptr() if len(rows) else None
        edge = row = node = 0
        for struct, layer, index in zip(self.layer_structs, self.layers, self.index, strict=True):
            struct.folds, struct.outer, struct.units = layer.num_folds, layer.outer_units, layer.inner_units
            struct.first_edge, struct.first_row, struct.first_node = edge, row, node
            edge += layer.num_folds * layer.inner_units
            row += layer.num_folds * layer.outer_units
            node += layer.num_folds
            struct.parameter_rows = layer.parameter_rows.data_ptr()
            struct.grad_rows = (self.own_rows if layer.accumulate else layer.parameter_rows).data_ptr()
            if layer.edges is not None:
                edges = layer.edges.index
                struct.edge_start, struct.edge_column = edges.start.ctypes.data, edges.column.ctypes.data
                struct.by_column_start = edges.by_column_start.ctypes.data
                struct.by_column_row, struct.by_column_place = edges.outer.ctypes.data, edges.place.ctypes.data
            for name in ("factor_start", "factor", "target_start", "target", "source_start", "source"):
                setattr(struct, name, getattr(index, name).ctypes.data)
        self.space.leaves, self.space.layers = ctypes.addressof(self.leaf_structs), ctypes.addressof(self.layer_structs)
        self.space.circuit_of_node = self.circuit_of_node.data_ptr()
        self.space.head_rows = self.head_rows_GH.data_ptr()
        for name, buffer in (("sums", self.sums_JVC), ("peaks", self.peaks_JNC), ("lowest", self.lowest_JNC)):
            setattr(self.space, name, buffer.data_ptr())
        if self.scaled_JVC.numel():
            self.space.scaled, self.space.inner = self.scaled_JVC.data_ptr(), self.inner_JEC.data_ptr()

    def forward(self, batch: Batch, tables: Sequence[Tensor], columns_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """log p of all heads in nats, (G, H, B), and what their values were divided by, (G, B); see `run_linear`.

        columns_G: how many of the first examples each circuit needs; others are left out, in a backward pass as well,
        and have any values.
        """
        self.columns_G = None if columns_G is None else columns_G.to(torch.int64).contiguous()
        self.space.columns = None if self.columns_G is None else self.columns_G.data_ptr()
        self._point(batch, tables, [None] * len(tables), [None] * len(self.layers))
        self.library.forward(ctypes.byref(self.space), self._threads())
        value_GHB = self.sums_JVC.new_empty(*self.head_rows_GH.shape, self.size)
        fraction_GB = self.sums_JVC.new_empty(len(self.head_rows_GH), self.blocks * WIDTH)
        exponent_GB = torch.empty(fraction_GB.shape, dtype=torch.int32)
        pointers = (fraction_GB.data_ptr(), exponent_GB.data_ptr(), value_GHB.data_ptr())
        self.least = self.library.finish(ctypes.byref(self.space), *pointers)
        log_GB = fraction_GB.log2_().add_(exponent_GB)[:, : self.size]
        return value_GHB.log2_().add_(log_GB[:, None]).div_(BITS_PER_NAT), log_GB

    def backward(
        self,
        batch: Batch,
        tables: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        grad_GHB: Tensor,
        statistics: Sequence[Tensor | None],
    ) -> None:
        """From the gradient of the heads to that of all parameters, written to `grads`.

        What EM needs besides goes to `statistics`, one tensor (P, K, T) for every input layer that has any.
        """
        tied = [
            None if grads[layer.group] is None or not layer.accumulate else self._grad_buffer(layer, tables)
            for layer in self.layers
        ]
        self._point(batch, tables, grads, tied)
        for leaf, is_read in zip(self.leaves, self.is_read, strict=True):
            grad = grads[leaf.group]
            if grad is not None and not is_read:
                grad.zero_()
        if self.columns_G is not None:  # what is left out is not written
            for buffer in (*self.rows_grad, *(sums for sums in self.sums_FK4 if sums is not None)):
                buffer.zero_()
        grad_GHB = grad_GHB.contiguous()
        threads = self._threads()
        self.library.backward(ctypes.byref(self.space), grad_GHB.data_ptr(), threads)
        for layer, found_FHK in zip(self.layers, tied, strict=True):
            grad = grads[layer.group]
            if found_FHK is not None and grad is not None:
                grad.index_add_(0, layer.parameter_rows, found_FHK)
        self._collect_ties(grads, threads)
        self._collect_sums(tables, grads, statistics)

    def _point(
        self, batch: Batch, tables: Sequence[Tensor], grads: Sequence[Tensor | None], tied: Sequence[Tensor | None]
    ) -> None:
        """Show the kernels where parameters, examples and gradients of this step are."""
        for number, (leaf_struct, leaf) in enumerate(zip(self.leaf_structs, self.leaves, strict=True)):
            grad, table, sums = grads[leaf.group], tables[leaf.group], self.sums_FK4[number]
            assert batch.values[number].is_contiguous()
            assert batch.values[number].dtype == torch.int64
            if isinstance(leaf.distribution, DiscretizedLogistic):
                self.prepared[number] = table = leaf.distribution.prepared(table)
                self.values[number] = values = batch.values[number].to(table.dtype)
                leaf_struct.values = values.data_ptr()
            leaf_struct.table = table.data_ptr()
            leaf_struct.x = batch.values[number].data_ptr()
            leaf_struct.observed = None if batch.observed is None else batch.observed[number].data_ptr()
            leaf_struct.table_grad = None if grad is None or leaf.accumulate or sums is not None else grad.data_ptr()
            leaf_struct.sums = None if grad is None or sums is None else sums.data_ptr()
        for struct, layer, buffer in zip(self.layer_structs, self.layers, tied, strict=True):
            grad = grads[layer.group] if buffer is None else buffer
            struct.weight = tables[layer.group].data_ptr()
            struct.weight_grad = None if grad is None else grad.data_ptr()

    def _reads_all(self, leaf: InputLayer) -> bool:
        """Whether something reads every unit of these inputs, so that every row of their gradient is written."""
        targets = np.concatenate([index.target for index in self.index])
        return int(((targets >= leaf.start) & (targets < leaf.stop)).sum()) == leaf.stop - leaf.start

    def _grad_buffer(self, layer: Layer, tables: Sequence[Tensor]) -> Tensor:
        """Gradients of tied weights, a row per fold."""
        return tables[layer.group].new_empty(layer.num_folds, *tables[layer.group].shape[1:])

    def _threads(self) -> int:
        """Number of threads, each with its scratch memory."""
        threads = torch.get_num_threads()
        if len(self.scratch) < threads * self.scratch_size:
            self.scratch = self.sums_JVC.new_empty(threads * self.scratch_size)
            self.space.scratch = self.scratch.data_ptr()
        return threads

    def is_large(self, tiny: float) -> bool:
        """See `LinearWorkspace`."""
        return bool(self.least >= tiny)

    def heads(self, roots: Tensor) -> Tensor:
        """See `LinearWorkspace`."""
        first = self.space.first_sum
        rows = roots.clamp_min(first) - first  # what a circuit has not is looked up somewhere
        return self._columns(self.sums_JVC[:, rows.flatten()]).view(*roots.shape, self.size)

    def error(self, bound: ErrorBound, largest_input_LB: Tensor) -> Tensor:
        """See `ErrorBound.error`; of the last batch, in double precision."""
        levels = (_Level * len(bound.levels))()
        for struct, layer, level in zip(levels, self.layer_structs, bound.levels, strict=True):
            struct.folds, struct.outer = layer.folds, layer.outer
            struct.first_node, struct.first_row = layer.first_node, layer.first_row
            struct.sums_width, struct.inputs_width = level.sums.shape[1], level.inputs.shape[1]
            for name in ("sums", "inputs", "losses"):
                setattr(struct, name, getattr(level, name).data_ptr())
        if not len(self.share_JNC):
            self.largest_JNC = torch.empty_like(self.peaks_JNC)
            self.share_JNC = torch.empty(self.peaks_JNC.shape, dtype=torch.float64)
        out_GB = torch.empty(len(bound.roots), self.size, dtype=torch.float64)
        largest_input_LB, smallest = largest_input_LB.contiguous(), torch.finfo(self.peaks_JNC.dtype).tiny
        buffers = (bound.roots, self.share_JNC, self.largest_JNC, out_GB)
        self.library.bound_error(
            *(ctypes.byref(self.space), ctypes.addressof(levels), len(bound.levels)),
            *(largest_input_LB.data_ptr(), smallest, *(buffer.data_ptr() for buffer in buffers), self._threads()),
        )
        return out_GB

    def _columns(self, blocks_JRC: Tensor) -> Tensor:
        """Rows by blocks of columns to (rows, B)."""
        return blocks_JRC.transpose(0, 1).flatten(1)[:, : self.size]

    def _collect_ties(self, grads: Sequence[Tensor | None], threads: int) -> None:
        """Sum what tied inputs contribute to their rows."""
        for number, leaf in enumerate(self.leaves):
            grad = grads[leaf.group]
            if grad is None or not leaf.accumulate or self.sums_FK4[number] is not None:
                continue
            order = torch.argsort(leaf.parameter_rows, stable=True)
            counts = torch.bincount(leaf.parameter_rows, minlength=len(grad))
            start = functional.pad(counts.cumsum(0), (1, 0))
            struct = ctypes.byref(self.leaf_structs, number * ctypes.sizeof(_Leaf))
            rows = (len(grad), start.data_ptr(), order.data_ptr())
            self.library.collect_ties(struct, *rows, self.size, grad.data_ptr(), threads)

    def _collect_sums(
        self, tables: Sequence[Tensor], grads: Sequence[Tensor | None], statistics: Sequence[Tensor | None]
    ) -> None:
        """Gradients and statistics of logistic inputs, from what the kernels summed over examples."""
        for leaf, sums_FK4, found_PKT in zip(self.leaves, self.sums_FK4, statistics, strict=True):
            grad, family = grads[leaf.group], leaf.distribution
            if grad is None or sums_FK4 is None or not isinstance(family, DiscretizedLogistic):
                continue
            params_FKS = leaf.parameters_of(tables[leaf.group], 0, leaf.num_folds)
            leaf.add_rows(grad, family.gradient_from(params_FKS, sums_FK4).to(grad.dtype), 0)
            if found_PKT is not None:
                found_PKT.index_add_(0, leaf.parameter_rows, -family.statistics_from(params_FKS, sums_FK4))


class WideWorkspace(FusedWorkspace):
    """The same in double precision, for a few examples that single precision cannot hold."""

    def __init__(self, engine: Engine, size: int, keep: bool) -> None:
        super().__init__(engine, size, keep, torch.float64)
        self.wide: list[Tensor] = []

    def forward(self, batch: Batch, tables: Sequence[Tensor], columns_G: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self.wide = [table.double() for table in tables]
        return super().forward(batch, self.wide, columns_G)

    def backward(
        self,
        batch: Batch,
        tables: Sequence[Tensor],
        grads: Sequence[Tensor | None],
        grad_GHB: Tensor,
        statistics: Sequence[Tensor | None],
    ) -> None:
        wide = [None if grad is None else torch.zeros_like(grad, dtype=torch.float64) for grad in grads]
        super().backward(batch, self.wide, wide, grad_GHB.double(), statistics)
        for grad, found in zip(grads, wide, strict=True):
            if grad is not None and found is not None:
                limit = torch.finfo(grad.dtype).max  # beyond it are gradients of parameters that are 0, or as good as 0
                grad.copy_(found.clamp_(-limit, limit))


def _leaf_rows(leaf: InputLayer) -> tuple[Tensor, Tensor]:
    """The fold of every unit, and its row of the table."""
    units = torch.arange(leaf.num_folds * leaf.num_units)
    fold = units // leaf.num_units
    return fold.int(), (leaf.parameter_rows[fold] * leaf.num_units + units % leaf.num_units).int()

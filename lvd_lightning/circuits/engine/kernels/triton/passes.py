"""The general pass of a circuit, forward and backward, in the kernels of this package: a few launches per layer.

A workspace and a gradient space are filled as PyTorch operations fill them, with one exception: sums that got too small
(see `layer_kernels.py`) are marked in `space.sums` and treated by the kernels alone.

Shapes: F folded nodes, H outer units, K inner units, B batch, P parameter rows, S categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.kernels.triton import interprets, layer_kernels, on, table_kernels
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.batch import Batch
    from lvd_lightning.circuits.engine.engine import Engine
    from lvd_lightning.circuits.engine.layers import InputLayer, Layer
    from lvd_lightning.circuits.engine.workspace import GradientSpace, Workspace

__all__ = ["TILES", "Tiles", "backward", "backward_inputs", "forward", "has_kernel"]


@dataclass
class Tiles:
    """Sizes of the blocks that a program computes, powers of two of at least 16; smaller where there is less to do.

    The defaults take 48 KiB of shared memory at most. They were chosen by that, not by measurements:
    `benchmarks/gpu.py --tune` compares others.
    """

    units: int = 64  # rows of a matrix product
    columns: int = 64
    depth: int = 32  # what is summed at once
    warps: int = 4
    stages: int = 3


TILES = Tiles()
#: Units and examples of a program that only moves numbers.
MOVED = 32


def forward(engine: Engine, batch: Batch, tables: Sequence[Tensor], space: Workspace) -> None:
    """Fill a workspace with the values of all rows."""
    with on(space.values.device):
        _forward(engine, batch, tables, space)


def _forward(engine: Engine, batch: Batch, tables: Sequence[Tensor], space: Workspace) -> None:
    for number, leaf in enumerate(engine.leaf_layers()):
        observed_FB = None if batch.observed is None else batch.observed[number]
        if has_kernel(leaf):
            _look_up(leaf, space.values, tables[leaf.group], batch.values[number], observed_FB)
        else:
            table = tables[leaf.group] if leaf.group >= 0 else None
            leaf(space.values, table, batch.values[number], observed_FB)
    space.underflow.clear()
    for layer in engine.inner_layers():
        if not _has_kernels(layer):
            layer(space, tables[layer.group], careful=True)
        elif layer.is_sum:
            _forward_sums(layer, space, tables[layer.group], engine.matmul_precision)
        else:
            _multiply(layer, space.values, layer.outer_rows(space.values, 0, layer.num_folds), None)


def backward(
    engine: Engine,
    space: Workspace,
    tables: Sequence[Tensor],
    gradient: GradientSpace,
    grads: Sequence[Tensor | None],
) -> None:
    """From the gradient of the heads in `gradient` to that of all inner units and weights."""
    precision = engine.matmul_precision
    with on(space.values.device):
        for layer in reversed(engine.inner_layers()):
            if not _has_kernels(layer):
                layer.backward(space, gradient, tables[layer.group], grads[layer.group])
            elif layer.is_sum:
                _backward_sums(layer, space, gradient, tables[layer.group], grads[layer.group], precision)
            else:
                _pull(layer, gradient, layer.inner_rows(gradient.inner, 0, layer.num_folds), None)


def has_kernel(leaf: InputLayer) -> bool:
    """Whether kernels look inputs up in tables: with atomic additions on the way back, whose order may vary."""
    return leaf.group >= 0 and leaf.distribution.is_table and not torch.are_deterministic_algorithms_enabled()


def _has_kernels(layer: Layer) -> bool:
    """Kronecker products that are not stored are multiplied by PyTorch, which looks for underflow and waits for it."""
    return not isinstance(layer, KroneckerLayer)


def backward_inputs(
    leaf: InputLayer, inner_grad: Tensor, table_PKS: Tensor, x_FB: Tensor, observed_FB: Tensor | None, out_PKS: Tensor
) -> None:
    """Add the gradient for a table to `out_PKS` (rows that only this layer owns are overwritten)."""
    with on(out_PKS.device):
        _backward_inputs(leaf, inner_grad, table_PKS, x_FB, observed_FB, out_PKS)


def _backward_inputs(
    leaf: InputLayer, inner_grad: Tensor, table_PKS: Tensor, x_FB: Tensor, observed_FB: Tensor | None, out_PKS: Tensor
) -> None:
    if not leaf.accumulate:
        leaf.parameters_of(out_PKS, 0, leaf.num_folds).zero_()
    units = _tile(leaf.num_units, 16)
    rows = leaf.gradient.table(leaf.num_folds)
    table_kernels.backward_table[(leaf.num_folds * -(-leaf.num_units // units),)](
        inner_grad,
        rows.rows,
        rows.first,
        rows.count,
        _whole(table_PKS),
        leaf.parameter_rows,
        x_FB,
        x_FB if observed_FB is None else observed_FB,
        _whole(out_PKS),
        leaf.num_units,
        table_PKS.shape[-1],
        x_FB.shape[1],
        MASKED=observed_FB is not None,
        UNITS=units,
        COLUMNS=_tile(x_FB.shape[1], MOVED),
    )


def _look_up(leaf: InputLayer, values: Tensor, table_PKS: Tensor, x_FB: Tensor, observed_FB: Tensor | None) -> None:
    units = _tile(leaf.num_units, 16)
    table_kernels.look_up[(leaf.num_folds * -(-leaf.num_units // units),)](
        _whole(table_PKS),
        leaf.parameter_rows,
        x_FB,
        x_FB if observed_FB is None else observed_FB,
        values[leaf.start : leaf.stop],
        leaf.num_units,
        table_PKS.shape[-1],
        x_FB.shape[1],
        MASKED=observed_FB is not None,
        UNITS=units,
        COLUMNS=_tile(x_FB.shape[1], MOVED),
    )


def _multiply(layer: Layer, values: Tensor, out_FKB: Tensor, peak_F1B: Tensor | None) -> None:
    """Inner units: logarithms, or with `peak_F1B` (to be filled in) linear values divided by it."""
    rows, size = layer.inputs.table(layer.num_folds), out_FKB.shape[2]
    columns = _tile(size, MOVED)
    layer_kernels.multiply[(layer.num_folds * -(-size // columns),)](
        values,
        rows.rows,
        rows.first,
        rows.count,
        out_FKB,
        out_FKB if peak_F1B is None else peak_F1B,
        layer.inner_units,
        size,
        SCALED=peak_F1B is not None,
        UNITS=_tile(layer.inner_units, MOVED),
        COLUMNS=columns,
    )


def _forward_sums(layer: Layer, space: Workspace, weight_PHK: Tensor, precision: str) -> None:
    (bound,) = space.bound[layer.number]
    _multiply(layer, space.values, bound.inner, bound.scale)
    rows, size, weight_PHK = layer.inputs.table(layer.num_folds), bound.inner.shape[2], _weights(layer, weight_PHK)
    units, columns = _tile(layer.outer_units, TILES.units), _tile(size, TILES.columns)
    programs = (layer.num_folds * -(-layer.outer_units // units) * -(-size // columns),)
    lost = torch.empty(programs, dtype=torch.int32, device=space.values.device)
    found = (bound.sums, bound.out, lost, layer.outer_units, layer.inner_units, size)
    layer_kernels.mix[programs](
        *(bound.inner, bound.scale, weight_PHK, layer.parameter_rows),
        *found,
        KEEP=space.keep,
        **_arithmetic(precision),
        OUTER=units,
        DEPTH=_tile(layer.inner_units, TILES.depth),
        COLUMNS=columns,
        **_schedule(),
    )
    layer_kernels.mend_sums[programs](
        *(weight_PHK, layer.parameter_rows, space.values, rows.rows, rows.first, rows.count),
        *found,
        KEEP=space.keep,
        OUTER=units,
        COLUMNS=columns,
    )


def _pull(layer: Layer, gradient: GradientSpace, out_FHB: Tensor, sums_FHB: Tensor | None) -> Tensor:
    """Gradients of outer units, over their sums if given; returns where sums were lost, by tiles of columns."""
    rows, size = layer.gradient.table(layer.num_folds), out_FHB.shape[2]
    columns = _tile(size, TILES.columns)
    tiles = -(-size // columns)
    lost = torch.empty(layer.num_folds, tiles, dtype=torch.int32, device=out_FHB.device)
    layer_kernels.pull[(layer.num_folds * tiles,)](
        gradient.inner,
        rows.rows,
        rows.first,
        rows.count,
        out_FHB if sums_FHB is None else sums_FHB,
        out_FHB,
        lost,
        layer.outer_units,
        size,
        IS_SUM=sums_FHB is not None,
        UNITS=_tile(layer.outer_units, MOVED),
        COLUMNS=columns,
    )
    return lost


def _backward_sums(
    layer: Layer,
    space: Workspace,
    gradient: GradientSpace,
    weight_PHK: Tensor,
    weight_grad_PHK: Tensor | None,
    precision: str,
) -> None:
    (forward,) = space.bound[layer.number]
    size = forward.inner.shape[2]
    scaled_FHB = gradient.scaled[: layer.num_folds * layer.outer_units * size].view(forward.out.shape)
    lost = _pull(layer, gradient, scaled_FHB, forward.sums)
    weight_PHK, grad_FKB = _weights(layer, weight_PHK), layer.inner_rows(gradient.inner, 0, layer.num_folds)
    below, above = layer.inputs.table(layer.num_folds), layer.gradient.table(layer.num_folds)
    sizes = (layer.outer_units, layer.inner_units, size)
    # What sums that were lost need: they are computed from values, not from scaled numbers.
    exact = (
        *(space.values, below.rows, below.first, below.count),
        *(gradient.inner, above.rows, above.first, above.count),
        *(forward.sums, forward.out, *sizes),
    )
    inner_units, outer_units = (_tile(width, TILES.units) for width in (layer.inner_units, layer.outer_units))
    columns = _tile(size, TILES.columns)
    num_inner, num_outer = -(-layer.inner_units // inner_units), -(-layer.outer_units // outer_units)
    programs = (layer.num_folds * num_inner * -(-size // columns),)
    layer_kernels.backward_inner[programs](
        *(scaled_FHB, forward.inner, weight_PHK, layer.parameter_rows, grad_FKB, *sizes),
        **_arithmetic(precision),
        INNER=inner_units,
        DEPTH=_tile(layer.outer_units, TILES.depth),
        COLUMNS=columns,
        **_schedule(),
    )
    layer_kernels.mend_inner[programs](
        *(lost, weight_PHK, layer.parameter_rows, grad_FKB, *exact), INNER=inner_units, COLUMNS=columns
    )
    if weight_grad_PHK is None:
        return
    out, out_rows = _whole(weight_grad_PHK), layer.parameter_rows
    if layer.accumulate or layer.edges is not None:
        out = torch.empty(layer.num_folds, *weight_PHK.shape[1:], dtype=out.dtype, device=out.device)
        out_rows = torch.arange(layer.num_folds, device=out.device)
    programs = (layer.num_folds * num_outer * num_inner,)
    layer_kernels.backward_weight[programs](
        *(scaled_FHB, forward.inner, out, out_rows, *sizes),
        **_arithmetic(precision),
        OUTER=outer_units,
        INNER=inner_units,
        DEPTH=_tile(size, TILES.depth),
        **_schedule(),
    )
    layer_kernels.mend_weight[programs](
        *(lost, weight_PHK, layer.parameter_rows, out, out_rows, *exact),
        OUTER=outer_units,
        INNER=inner_units,
        COLUMNS=columns,
    )
    if layer.edges is not None:
        layer.edges.write(weight_grad_PHK, out, 0)
    elif layer.accumulate:
        weight_grad_PHK.index_add_(0, layer.parameter_rows, out)


def _arithmetic(precision: str) -> dict[str, Any]:
    return {"PRECISION": precision, "EMULATE": interprets()}


def _schedule() -> dict[str, Any]:
    return {"num_warps": TILES.warps, "num_stages": TILES.stages}


def _tile(size: int, largest: int) -> int:
    """A power of two, at least 16, no larger than needed."""
    return min(largest, max(16, 1 << (size - 1).bit_length()))


def _weights(layer: Layer, stored: Tensor) -> Tensor:
    """Tables of all rows; made for the purpose where only live edges are stored."""
    return _whole(stored if layer.edges is None else layer.edges.dense(stored))


def _whole(table: Tensor) -> Tensor:
    """The kernels count on rows of parameters that follow each other."""
    assert table.is_contiguous()
    return table

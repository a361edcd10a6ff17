"""Which padded shapes nodes are folded at: a few layers, with little padding.

After pruning and growing, nearly every node has a shape of its own. A layer for each would spend its time on starting
operations, one shape for all on padding.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

__all__ = ["LAYER_COST", "Shape", "merge_shapes"]

Shape = tuple[int, int]
Widths = NDArray[np.float64]

#: What a layer costs beside its arithmetic, in rows of a workspace: less on a CPU, much more on a GPU.
LAYER_COST = 256
#: Edges that cost as much as one row: the matrix product is cheaper than the passes over its operands.
EDGES_PER_ROW = 64
#: More shapes than this are rounded before they are compared.
MOST_SHAPES = 256


def merge_shapes(counts: Mapping[Shape, int], num_layers: int = 1) -> dict[Shape, Shape]:
    """The padded shape (outer, inner) of every shape among nodes that could be one layer.

    Shapes merge, pair by pair, as long as layers saved are worth more than the padding costs.

    counts: nodes of each shape. num_layers: layers that the nodes of one shape make (they may lie on several levels).
    """
    layer_cost = LAYER_COST * num_layers
    rounded = _round_shapes(counts)
    shapes = sorted(set(rounded.values()))
    outer, inner = np.array(shapes, dtype=np.float64).T
    nodes = np.zeros(len(shapes))
    for shape, count in counts.items():
        nodes[shapes.index(rounded[shape])] += count
    merged = np.arange(len(shapes))  # shape -> the shape that stands for its merged set
    loss = np.stack([_padding_cost(outer, inner, nodes, k) for k in range(len(shapes))]) - layer_cost
    while len(shapes) > 1:
        a, b = (int(found) for found in np.unravel_index(loss.argmin(), loss.shape))
        if loss[a, b] >= 0:
            break
        outer[a], inner[a], nodes[a] = max(outer[a], outer[b]), max(inner[a], inner[b]), nodes[a] + nodes[b]
        nodes[b] = 0
        merged[merged == b] = a
        loss[b, :] = loss[:, b] = np.inf
        fresh = np.where(nodes > 0, _padding_cost(outer, inner, nodes, a) - layer_cost, np.inf)
        loss[a, :] = loss[:, a] = fresh
    position = {shape: int(merged[k]) for k, shape in enumerate(shapes)}
    return {shape: (int(outer[position[to]]), int(inner[position[to]])) for shape, to in rounded.items()}


def _padding_cost(outer: Widths, inner: Widths, nodes: Widths, k: int) -> Widths:
    """What padding costs if set k merges with each other set; infinite with itself."""
    both = _work(np.maximum(outer, outer[k]), np.maximum(inner, inner[k]))
    cost = nodes * (both - _work(outer, inner)) + nodes[k] * (both - _work(outer[k], inner[k]))
    cost[k] = np.inf
    return cost


def _work(outer: Widths, inner: Widths) -> Widths:
    return outer + inner + outer * inner / EDGES_PER_ROW


def _round_shapes(counts: Mapping[Shape, int]) -> dict[Shape, Shape]:
    """Shapes as they are if they are few, else with widths rounded up, by as little as makes them few."""
    for parts in (0, 16, 8, 4, 2):
        rounded = {shape: (_round_up(shape[0], parts), _round_up(shape[1], parts)) for shape in counts}
        if len(set(rounded.values())) <= MOST_SHAPES:
            break
    return rounded


def _round_up(width: int, parts: int) -> int:
    """The next multiple of a power of two, of which at least `parts` make up the width."""
    step = 1 << max(0, (width // parts).bit_length() - 1) if parts else 1
    return -(-width // step) * step

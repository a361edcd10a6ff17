"""Which sum nodes mix Kronecker products that need not be stored, and the rows of factors that they read instead.

Shapes: F nodes, P products of a node, I and J units of their two factors.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lvd_lightning.circuits.graph import CircuitGraph, Node

__all__ = ["LEAST_LINEAR", "LEAST_UNITS", "Grid", "factor_rows", "grid_of"]

#: (I, J).
Grid = tuple[int, int]
#: Products with fewer units are stored. From here on a step takes less memory, and no more time.
LEAST_UNITS = 25
#: The same where linear values would do (trees over tables), which are faster: a step takes as long from here on.
LEAST_LINEAR = 256


def grid_of(graph: CircuitGraph, index: int, is_inlined: Collection[int]) -> Grid | None:
    """(I, J) of a sum whose children are Kronecker products of two factors with I and J units, every one of them.

    None if one is something else or of another size or has other consumers (is not in `is_inlined`).
    """
    node = graph.nodes[index]
    if node.tied_to is not None:
        return None
    found = {_pair(graph, graph.nodes[child]) if child in is_inlined else None for child in node.children}
    grid = found.pop()
    return None if found else grid


def factor_rows(starts: Sequence[tuple[int, int]], grid: Grid, num_products: int, padding: int) -> NDArray[Any]:
    """Rows of V that a sum node reads: I of the first and J of the second factor, product by product, (P (I + J),).

    starts: the first rows of both factors of every product. padding: the row for products that the node lacks.
    """
    out = np.full((num_products, sum(grid)), padding, dtype=np.int64)
    for row, (first, second) in zip(out, starts, strict=False):
        row[: grid[0]] = first + np.arange(grid[0])
        row[grid[0] :] = second + np.arange(grid[1])
    return out.reshape(-1)


def _pair(graph: CircuitGraph, node: Node) -> Grid | None:
    """The units of the two factors of a product that has a unit for each pair of them, in order."""
    if not node.kronecker or node.units is None or len(node.children) != 2:
        return None
    first, second = (graph.nodes[child].num_units for child in node.children)
    i, j = node.units.cpu().numpy().T
    unit = np.arange(first * second)
    is_ordered = len(i) == len(unit) and (i == unit // second).all() and (j == unit % second).all()
    return (first, second) if is_ordered else None

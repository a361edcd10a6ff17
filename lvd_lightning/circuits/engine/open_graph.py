"""Graphs laid open for surgery: NumPy parameters of owners, and all units of a graph in one vector.

Vectors over units (`used`, `split`, ...) hold the units of node i at `at(i)`. Shapes: N units of a node, M units of all
its children together.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvd_lightning.circuits.engine.plan import ParameterGroup
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["OpenGraph", "any_of_class", "open_graphs", "units_or_none"]

Array = NDArray[Any]


class OpenGraph:
    """A graph without its parameters, and these as arrays. Its nodes belong to the circuit: copy them before a change.

    weight, live: (N, M) of every sum node that owns its parameters. params: (N, size) of every such input node.
    """

    def __init__(self, graph: CircuitGraph) -> None:
        self.graph = graph
        self.weight: dict[int, Array] = {}
        self.live: dict[int, Array] = {}
        self.params: dict[int, Array] = {}
        bounds = np.cumsum([0] + [node.num_units for node in graph.nodes])
        self.num_units = int(bounds[-1])
        self._slices = [slice(a, b) for a, b in itertools.pairwise(bounds.tolist())]
        groups: dict[int, list[int]] = defaultdict(list)
        for index, node in enumerate(graph.nodes):
            if node.tied_to is not None:
                groups[node.tied_to].append(index)
        self.ties = [[owner, *others] for owner, others in groups.items()]
        self.tied = {index for members in self.ties for index in members}

    def at(self, index: int) -> slice:
        """Where the units of a node lie."""
        return self._slices[index]

    def owner(self, index: int) -> int:
        """The node whose parameters this node uses."""
        tied_to = self.graph.nodes[index].tied_to
        return index if tied_to is None else tied_to

    def factors(self, index: int) -> Array:
        """Units that the units of a product multiply, int (N, children)."""
        node = self.graph.nodes[index]
        if node.units is not None:
            return node.units.cpu().numpy()
        return np.repeat(np.arange(node.num_units)[:, None], len(node.children), 1)

    def blocks(self, index: int) -> list[slice]:
        """Columns that belong to every child of a sum."""
        sizes = [self.graph.nodes[child].num_units for child in self.graph.nodes[index].children]
        bounds = np.cumsum([0, *sizes]).tolist()
        return [slice(a, b) for a, b in itertools.pairwise(bounds)]

    def columns(self, index: int) -> Array:
        """Places of all units of all children, (M,)."""
        found = [self._slices[child] for child in self.graph.nodes[index].children]
        return np.concatenate([np.arange(part.start, part.stop) for part in found])

    def closed(self) -> CircuitGraph:
        """The graph with its parameters (copied), as it was."""
        nodes = [copy.copy(node) for node in self.graph.nodes]
        for index, node in enumerate(nodes):
            if node.tied_to is not None:
                node.weight, node.params = nodes[node.tied_to].weight, nodes[node.tied_to].params
            elif index in self.weight:
                node.weight = torch.from_numpy(self.weight[index].copy())
            elif index in self.params:
                node.params = torch.from_numpy(self.params[index].copy())
        return CircuitGraph(nodes, self.graph.root, dict(self.graph.latents))

    def classes(self) -> Array | None:
        """Units that must double together get equal numbers; None if nothing is tied.

        Nodes with one matrix have their rows in common and, since a column means a child's unit to each of them, the
        units of their children at equal columns.
        """
        if not self.ties:
            return None
        sets: list[Array] = []
        for members in self.ties:
            sets.append(np.stack([np.arange(self.at(index).start, self.at(index).stop) for index in members]))
            if self.graph.nodes[members[0]].kind == "sum":
                sets.append(np.stack([self.columns(index) for index in members]))
        classes = np.arange(self.num_units)
        while True:
            before = classes.copy()
            for places in sets:
                np.minimum.at(classes, places, np.broadcast_to(classes[places].min(0), places.shape))
            if np.array_equal(classes, before):
                return classes


def any_of_class(classes: Array | None, chosen: Array) -> Array:
    """Units of whose class one is chosen."""
    if classes is None:
        return chosen
    found: Array = np.bincount(classes, chosen, len(classes)) > 0
    return found[classes]


def units_or_none(factors: Array, sizes: Sequence[int]) -> Tensor | None:
    """`Node.units` of a product over children of these sizes: None if unit k multiplies unit k of every child."""
    if all(size == len(factors) for size in sizes) and (factors == np.arange(len(factors))[:, None]).all():
        return None
    return torch.from_numpy(np.ascontiguousarray(factors))


def open_graphs(
    structures: Sequence[CircuitGraph],
    groups: Sequence[ParameterGroup],
    tables: Sequence[Tensor],
    masks: Sequence[Tensor | None],
) -> list[OpenGraph]:
    """Graphs with the parameters in `tables`, as views: replace the arrays, do not write to them.

    Args:
        structures: of all circuits, without parameters.
        groups: of the plan that they were compiled to.
        tables: the parameters of every group, (rows, units, alternatives), whatever the layout.
        masks: live edges of every group, of the same shape; None if all are.
    """
    opened = [OpenGraph(structure) for structure in structures]
    for group, table, mask in zip(groups, tables, masks, strict=True):
        values = table.detach().cpu().numpy()
        live = np.broadcast_to(True, values.shape) if mask is None else mask.cpu().numpy()
        for row, (g, index) in enumerate(group.owners):
            source = opened[g]
            node = source.graph.nodes[index]
            if group.kind == "sum":
                inner = sum(source.graph.nodes[child].num_units for child in node.children)
                source.weight[index] = values[row, : node.num_units, :inner]
                source.live[index] = live[row, : node.num_units, :inner]
            else:
                source.params[index] = values[row, : node.num_units]
    return opened

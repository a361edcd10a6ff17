"""Which units of a pruned graph are still used, and the graph of these.

Shapes: N units of a node, M units of all its children together.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvd_lightning.circuits.engine.open_graph import OpenGraph, units_or_none
from lvd_lightning.circuits.graph import CircuitGraph, Node

__all__ = ["find_used", "shrink"]

Array = NDArray[Any]

#: A sum that needs less than this part of a child it shares gets a product of its own that picks the units.
SELECT_BELOW = 0.75


def find_used(graph: OpenGraph) -> tuple[Array, list[bool]]:
    """Which units, and which nodes, are still used from the heads."""
    used: Array = np.zeros(graph.num_units, dtype=bool)
    used[graph.at(graph.graph.root)] = True
    while True:
        reached = _sweep_down(graph, used)
        before = used.copy()
        for members in graph.ties:
            found = [graph.at(index) for index in members if reached[index]]
            rows = np.logical_or.reduce([used[at] for at in found]) if found else False
            for at in found:
                used[at] = rows
        if np.array_equal(used, before):
            return used, reached


def _sweep_down(graph: OpenGraph, used: Array) -> list[bool]:
    """Mark in `used` what the marked units use; returns which nodes are reached."""
    nodes = graph.graph.nodes
    reached = [False] * len(nodes)
    reached[graph.graph.root] = True
    for index in reversed(range(len(nodes))):
        node, mine = nodes[index], used[graph.at(index)]
        if not reached[index]:
            continue
        if node.kind == "input":
            assert node.distribution is not None
            mine |= node.distribution.is_evidence  # its units are the states of the evidence
        elif node.kind == "product":
            for child, factor in zip(node.children, graph.factors(index)[mine].T, strict=True):
                used[graph.at(child)][factor] = True
                reached[child] = True
        else:
            wanted = np.logical_or.reduce(graph.live[graph.owner(index)][mine], 0)
            for child, block in zip(node.children, graph.blocks(index), strict=True):
                used[graph.at(child)] |= wanted[block]
                reached[child] |= bool(wanted[block].any())
    return reached


def shrink(graph: OpenGraph, used: Array, reached: list[bool]) -> CircuitGraph:
    """The graph of the nodes that are reached, with the units that are used."""
    old = graph.graph
    out = CircuitGraph()
    place: dict[int, int] = {}  # old id -> new id
    first: dict[int, int] = {}  # owner of parameters -> new id of the first node that shares them
    kept = [np.flatnonzero(used[graph.at(index)]) for index in range(len(old.nodes))]
    for index, node in enumerate(old.nodes):
        if not reached[index]:
            continue
        new = copy.copy(node)
        new.num_units, new.tied_to = len(kept[index]), None
        if node.kind == "product":
            new.children = tuple(place[child] for child in node.children)
            new.units = _factors(graph, index, kept)
        else:
            owner = graph.owner(index)
            if node.kind == "sum":
                columns = _pick_columns(graph, index, kept, place, out, new)
            if owner in first:
                shared = out.nodes[first[owner]]
                new.params, new.weight, new.mask, new.tied_to = shared.params, shared.weight, shared.mask, first[owner]
            elif node.kind == "sum":
                new.weight, new.mask = _weights(graph.weight[owner], graph.live[owner], kept[index], columns)
            elif owner in graph.params:
                new.params = torch.from_numpy(graph.params[owner][kept[index]])
        place[index] = len(out.nodes)
        first.setdefault(graph.owner(index), place[index])
        out.nodes.append(new)
    out.root = place[old.root]
    out.latents = {name: place[index] for name, index in old.latents.items() if reached[index]}
    return out


def _factors(graph: OpenGraph, index: int, kept: list[Array]) -> Tensor | None:
    """`Node.units` of a pruned product."""
    node, mine = graph.graph.nodes[index], kept[index]
    if node.units is None and all(np.array_equal(kept[child], mine) for child in node.children):
        return None
    old = graph.factors(index)[mine].T
    new = [np.searchsorted(kept[child], column) for child, column in zip(node.children, old, strict=True)]
    return units_or_none(np.stack(new, 1), [len(kept[child]) for child in node.children])


def _pick_columns(
    graph: OpenGraph, index: int, kept: list[Array], place: dict[int, int], out: CircuitGraph, new: Node
) -> Array:
    """Set the children of a pruned sum; returns which old columns it mixes.

    Of a child that others use as well, and of which this sum needs little, it gets the needed units only.
    """
    node, live = graph.graph.nodes[index], graph.live[graph.owner(index)][kept[index]]
    select_below = 1.0 if index in graph.tied else SELECT_BELOW  # tied nodes have to mix the same columns
    children, columns = [], []
    for child, block in zip(node.children, graph.blocks(index), strict=True):
        found, needed = kept[child], np.flatnonzero(live[:, block].any(0))
        if len(needed) == 0:
            continue
        if len(needed) < select_below * len(found):
            units = torch.from_numpy(np.searchsorted(found, needed)[:, None])
            out.nodes.append(Node("product", len(needed), (place[child],), units=units))
            children.append(len(out.nodes) - 1)
            columns.append(block.start + needed)
        else:
            children.append(place[child])
            columns.append(block.start + found)
    new.children = tuple(children)
    return np.concatenate(columns)


def _weights(weight: Array, live: Array, rows: Array, columns: Array) -> tuple[Tensor, Tensor | None]:
    """Rows and columns of weights (copied) and their mask, None if all of it is live."""
    chosen = np.ix_(rows, columns)
    mask = live[chosen]
    return torch.from_numpy(weight[chosen]), None if mask.all() else torch.from_numpy(mask)

"""Which units of a growing graph become two, and the graph in which they have.

Shapes: N units of a node, M units of all its children together.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvd_lightning.circuits.engine.open_graph import OpenGraph, any_of_class, units_or_none
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.seeds import generator_for

__all__ = ["Doubling", "find_split", "flag"]

Array = NDArray[Any]

#: Mixing of the two copies of a child in the copies of a sum: the shares are 1 / (1 + CROSSING) and the rest.
CROSSING = 0.2
#: The least fraction of units that growth looks at, and the least mean flow of a unit that splits.
LEAST_FRACTION, LEAST_FLOW = 0.2, 1e-8
#: Bounds of the share of a first copy where a sum does not split, and of the factors that perturb weights and inputs.
SHARES, WEIGHT_FACTORS, INPUT_FACTORS = (0.1, 0.9), (0.1, 10.0), (0.1, 2.0)


def flag(graph: OpenGraph, mean_flow: Array, heads: list[int]) -> Array:
    """Units with much flow; of the heads those that grow."""
    classes = graph.classes()
    if classes is not None:  # tied units count like others: by the flow of one of them
        size = np.bincount(classes, minlength=len(classes)).clip(1)
        mean_flow = (np.bincount(classes, mean_flow, len(classes)) / size)[classes]
    num_heads = graph.graph.num_heads
    fraction = max(len(heads) / (len(heads) + num_heads), LEAST_FRACTION)
    flagged: Array = mean_flow >= max(np.quantile(mean_flow, 1 - fraction), LEAST_FLOW)
    flagged[graph.at(graph.graph.root)] = np.isin(np.arange(num_heads), heads)
    return flagged


def find_split(graph: OpenGraph, flagged: Array) -> Array:
    """Which units become two."""
    classes = graph.classes()
    fixed: Array = np.zeros(graph.num_units, dtype=bool)
    for index, node in enumerate(graph.graph.nodes):
        if node.distribution is not None and node.distribution.is_evidence:
            fixed[graph.at(index)] = True
    fixed = any_of_class(classes, fixed)
    flagged = flagged & ~fixed
    able = _find_able(graph, flagged, classes, fixed)
    split: Array = np.zeros(graph.num_units, dtype=bool)
    while True:
        found = any_of_class(classes, _sweep_split(graph, flagged, able, split))
        if classes is None or np.array_equal(found, split):
            return found
        split = found


def _find_able(graph: OpenGraph, flagged: Array, classes: Array | None, fixed: Array) -> Array:
    """Units that would differ from their copies: flagged inputs and sums, and products over such units."""
    nodes = graph.graph.nodes
    able = flagged.copy()
    for index, node in enumerate(nodes):
        if node.kind == "product":
            able[graph.at(index)] = False
    while True:
        for index, node in enumerate(nodes):
            if node.kind == "product":
                mine = able[graph.at(index)]
                for child, factor in zip(node.children, graph.factors(index).T, strict=True):
                    mine |= able[graph.at(child)][factor]
                mine &= ~fixed[graph.at(index)]
        found = any_of_class(classes, able) & ~fixed
        if classes is None or np.array_equal(found, able):
            return found
        able = found


def _sweep_split(graph: OpenGraph, flagged: Array, able: Array, split: Array) -> Array:
    """`split` and the units that split because of their own flow or of those above them."""
    split = split.copy()
    below_split_product, below_sum, below_split_sum = np.zeros((3, graph.num_units), dtype=bool)
    for index in reversed(range(len(graph.graph.nodes))):
        node, at = graph.graph.nodes[index], graph.at(index)
        mine = split[at]
        if index == graph.graph.root:
            mine |= flagged[at]
        elif node.kind == "product":
            wanted = below_split_product[at] | below_split_sum[at] | (below_sum[at] & flagged[at])
            mine |= able[at] & wanted
        else:
            mine |= flagged[at] & (below_sum[at] | below_split_product[at])
        if node.kind == "product":
            for child, factor in zip(node.children, graph.factors(index)[mine].T, strict=True):
                below_split_product[graph.at(child)][factor] = True
        elif node.kind == "sum":
            live = graph.live[graph.owner(index)]
            columns = np.logical_or.reduce(live, 0)
            split_columns = np.logical_or.reduce(live[mine], 0)
            for child, block in zip(node.children, graph.blocks(index), strict=True):
                below_sum[graph.at(child)] |= columns[block]
                below_split_sum[graph.at(child)] |= split_columns[block]
    return split


class Doubling:
    """Builds the graph in which the units of `split` have second copies, behind the old units of their nodes."""

    def __init__(self, graph: OpenGraph, split: Array, heads: list[int], sigma: float, seed: tuple[int, ...]) -> None:
        self.graph, self.sigma = graph, sigma
        self.of_shares, self.of_noise = (generator_for(*seed, name) for name in ("shares", "noise"))
        nodes = graph.graph.nodes
        self.doubled = [np.flatnonzero(split[graph.at(index)]) for index in range(len(nodes))]
        self.doubled[graph.graph.root] = np.array(heads, dtype=np.int64)

    def run(self) -> CircuitGraph:
        """The new graph; nodes keep their ids."""
        old = self.graph.graph
        out = CircuitGraph([], old.root, dict(old.latents))
        for index, node in enumerate(old.nodes):
            new = copy.copy(node)
            new.num_units += len(self.doubled[index])
            if node.kind == "product":
                sizes = [out.nodes[child].num_units for child in node.children]
                new.units = units_or_none(self._factors(index), sizes)
            elif node.tied_to is not None:
                owner = out.nodes[node.tied_to]
                new.params, new.weight, new.mask = owner.params, owner.weight, owner.mask
            elif node.kind == "sum":
                new.weight, new.mask = self._weights(index)
            elif index in self.graph.params:
                new.params = self._params(index, node)
            out.nodes.append(new)
        return out

    def _factors(self, index: int) -> Array:
        """First copies multiply what the old units did, second copies the second copies of it where there are some."""
        first = self.graph.factors(index)
        second = first[self.doubled[index]]
        for j, child in enumerate(self.graph.graph.nodes[index].children):
            size = self.graph.graph.nodes[child].num_units
            copy_of = np.arange(size)
            copy_of[self.doubled[child]] = size + np.arange(len(self.doubled[child]))
            second[:, j] = copy_of[second[:, j]]
        return np.concatenate([first, second])

    def _weights(self, index: int) -> tuple[Tensor, Tensor | None]:
        weight, live, rows = self.graph.weight[index], self.graph.live[index], self.doubled[index]
        num_rows, num_columns = weight.shape
        is_doubled = np.zeros(num_columns, dtype=bool)
        picked = []  # columns of the old matrix and, shifted by num_columns, of one for the second copies
        for child, block in zip(self.graph.graph.nodes[index].children, self.graph.blocks(index), strict=True):
            copies = block.start + self.doubled[child]
            is_doubled[copies] = True
            picked += [np.arange(block.start, block.stop), num_columns + copies]
        columns = np.concatenate(picked)
        share = np.ones(weight.shape)
        drawn = torch.rand(num_rows, int(is_doubled.sum()), generator=self.of_shares, dtype=torch.float64)
        share[:, is_doubled] = drawn.clamp(*SHARES).numpy()
        share[np.ix_(rows, is_doubled)] = 1 / (1 + CROSSING)
        first = weight * share
        rest = weight - first
        top = np.concatenate([first, rest], 1)
        bottom = np.concatenate([np.where(is_doubled, rest[rows], first[rows]), first[rows]], 1)
        new = np.concatenate([top, bottom])[:, columns]
        changed = np.concatenate([rows, num_rows + np.arange(len(rows))])
        if self.sigma > 0:
            new[changed] = _normalised(new[changed] * self._noise(new[changed].shape, WEIGHT_FACTORS))
        mask = np.concatenate([live, live[rows]])[:, columns % num_columns]
        return torch.from_numpy(new.astype(weight.dtype)), None if mask.all() else torch.from_numpy(mask)

    def _params(self, index: int, node: Node) -> Tensor:
        params, rows = self.graph.params[index], self.doubled[index]
        new = np.concatenate([params, params[rows]])
        if self.sigma > 0 and len(rows):
            assert node.distribution is not None
            changed = np.concatenate([rows, len(params) + np.arange(len(rows))])
            noise = self._noise((len(changed), params.shape[1]), INPUT_FACTORS)
            old = torch.from_numpy(new[changed].astype(np.float64))
            new[changed] = node.distribution.perturbed(old, torch.from_numpy(noise)).numpy()
        return torch.from_numpy(new)

    def _noise(self, shape: tuple[int, ...], bounds: tuple[float, float]) -> Array:
        drawn = torch.randn(shape, generator=self.of_noise, dtype=torch.float64)
        factors: Array = (1 + self.sigma * drawn).clamp(*bounds).numpy()
        return factors


def _normalised(rows: Array) -> Array:
    out: Array = rows / rows.sum(1, keepdims=True)
    return out

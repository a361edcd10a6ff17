"""Compile graphs into a plan: which nodes fold into which layer, and which rows every layer reads.

Values of all units live in one matrix, a row per unit and a column per example. A plan says, with index arrays only,
how rows are computed from other rows; `layers.py` runs it.

Row space V (values): row 0 is log 1, row 1 is log 0, then the input layers, then sum and product layers level by level.
Row space E (edges' inner ends): row 0 is unused (zero gradient), then one row per head and circuit, then, for every sum
layer, the product units that it mixes (where these are Kronecker products: the units of their factors), and for every
stored product layer its units. Forward passes gather E from V; backward passes gather the gradient of V from that of E.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.engine import grids
from lvd_lightning.circuits.engine.buckets import Shape, merge_shapes
from lvd_lightning.circuits.engine.grids import Grid
from lvd_lightning.circuits.engine.sparse import EdgeIndex, Layout, pays
from lvd_lightning.circuits.graph import CircuitGraph, Node

__all__ = ["Gather", "InputPlan", "LayerPlan", "ParameterGroup", "Plan", "Slot", "compile_plan"]

Index = NDArray[Any]
NodeKey = tuple[int, int]  # (circuit, node)
LOG_ONE, LOG_ZERO = 0, 1
#: Products of more factors would often be too small for linear values.
MAX_LINEAR_FACTORS = 16
NO_ROWS: Index = np.zeros(0, dtype=np.int64)


@dataclass
class Slot:
    """`out[dst] += source[src]`; dst ascending and unique."""

    dst: Index
    src: Index


@dataclass
class Gather:
    """Rows that are sums of other rows: `out = source[first]`, then every further slot added."""

    first: Index
    more: list[Slot] = field(default_factory=list)


@dataclass
class ParameterGroup:
    """Parameters of one padded shape, stacked: `owners[p]` is the node whose parameters are row p.

    With `edges` there are only those of live edges, one after the other, and one layer that they belong to.
    """

    kind: str
    shape: tuple[int, int]
    distribution: Distribution | None = None
    owners: list[NodeKey] = field(default_factory=list)
    edges: EdgeIndex | None = None


@dataclass
class InputPlan:
    """Input nodes of one distribution and padded width: values fill V rows [start, start + folds * units)."""

    group: int
    parameter_rows: Index
    distribution: Distribution
    num_units: int
    nodes: list[NodeKey]
    circuits: Index
    variables: Index
    start: int
    gradient: Gather | None = None


@dataclass
class LayerPlan:
    """Folded nodes of one level and padded shape. A product layer has `group` -1 and equal inner and outer units.

    With a `grid` inner units are those of Kronecker products, and E has the units of their factors.
    """

    group: int
    parameter_rows: Index
    inner_units: int
    outer_units: int
    nodes: list[NodeKey]
    inputs: Gather
    inner_start: int
    outer_start: int
    gradient: Gather | None = None
    grid: Grid | None = None


class Bucket(NamedTuple):
    """What the nodes of a layer have in common: level, padded outer and inner width, kind; (0, 0) is no grid."""

    level: int
    outer: int
    inner: int
    is_sum: bool
    is_sparse: bool
    grid: Grid


@dataclass
class Plan:
    """Everything that a Circuit needs to run."""

    groups: list[ParameterGroup]
    inputs: list[InputPlan]
    layers: list[LayerPlan]
    num_value_rows: int
    num_edge_rows: int
    roots: Index  # [circuits, max heads], V rows; LOG_ZERO where a circuit has fewer heads
    num_levels: int
    base: dict[NodeKey, int]  # first V row of an input, sum or stored product node
    inner: dict[NodeKey, Index]  # product node -> its units' rows in E
    implicit: dict[NodeKey, tuple[int, int, int]]  # product without such rows -> layer, fold, first inner unit there
    is_slim_tree: bool  # every sum mixes the units of one child, every node has one consumer, products are small


def compile_plan(graphs: Sequence[CircuitGraph], layout: Layout = "dense") -> Plan:
    """Fold all nodes of one level and shape, over all circuits; `layout` is that of pruned sum nodes."""
    return _Compiler(graphs, layout).run()


class _Compiler:
    def __init__(self, graphs: Sequence[CircuitGraph], layout: Layout) -> None:
        self.graphs = graphs
        self.layout = layout
        self.inlined: set[NodeKey] = set()
        self.level: dict[NodeKey, int] = {}
        self.base: dict[NodeKey, int] = {}
        self.groups: list[ParameterGroup] = []
        self.group_of: dict[object, int] = {}
        self.row_of_owner: dict[NodeKey, int] = {}
        self.inner: dict[NodeKey, Index] = {}
        self.implicit: dict[NodeKey, tuple[int, int, int]] = {}
        self.grids: dict[NodeKey, Grid] = {}

    def run(self) -> Plan:
        self._find_levels()
        is_slim_tree = all(_is_slim_tree(graph) for graph in self.graphs)
        self._find_grids(grids.LEAST_LINEAR if is_slim_tree and self._has_linear_inputs() else grids.LEAST_UNITS)
        buckets = self._find_buckets()
        inputs = self._place_inputs(buckets)
        layers, num_values, num_edges = self._place_layers(buckets, inputs)
        roots = self._find_roots()
        self._plan_gradients(inputs, layers, roots)
        return Plan(
            self.groups,
            inputs,
            layers,
            num_values,
            num_edges,
            roots,
            1 + max(self.level.values()),
            self.base,
            self.inner,
            self.implicit,
            is_slim_tree and not self.grids,
        )

    def _node(self, key: NodeKey) -> Node:
        return self.graphs[key[0]].nodes[key[1]]

    def _find_levels(self) -> None:
        """A node's level is the longest path below it; a product with one consumer, a sum, is part of that sum."""
        for g, graph in enumerate(self.graphs):
            consumers: dict[int, list[int]] = defaultdict(list)
            for index, node in enumerate(graph.nodes):
                for child in node.children:
                    consumers[child].append(index)
            for index, node in enumerate(graph.nodes):
                below = max((self.level[g, child] for child in node.children), default=-1)
                users = consumers[index]
                inline = node.kind == "product" and len(users) == 1 and graph.nodes[users[0]].kind == "sum"
                if inline:
                    self.inlined.add((g, index))
                self.level[g, index] = below if inline else below + 1

    def _has_linear_inputs(self) -> bool:
        families = {node.distribution for graph in self.graphs for node in graph.nodes if node.kind == "input"}
        return all(family is not None and family.is_linear for family in families)

    def _find_grids(self, least_units: int) -> None:
        """Sum nodes over Kronecker products, of at least so many units each, that are not stored."""
        inlined: list[set[int]] = [set() for _ in self.graphs]
        for g, index in self.inlined:
            inlined[g].add(index)
        for g, graph in enumerate(self.graphs):
            owners = {node.tied_to for node in graph.nodes}
            for index, node in enumerate(graph.nodes):
                if node.kind == "sum" and index not in owners and not pays(node.mask, self.layout):
                    grid = grids.grid_of(graph, index, inlined[g])
                    if grid is not None and grid[0] * grid[1] >= least_units:
                        self.grids[g, index] = grid

    def _inner_size(self, key: NodeKey) -> int:
        node = self._node(key)
        if node.kind == "product":
            return node.num_units
        return sum(self._node((key[0], child)).num_units for child in node.children)

    def _find_buckets(self) -> dict[Bucket, list[NodeKey]]:
        """Nodes to fold, in the order of execution."""
        keys = [
            (g, index)
            for g, graph in enumerate(self.graphs)
            for index, node in enumerate(graph.nodes)
            if node.kind != "input" and (g, index) not in self.inlined
        ]
        shapes = self._fold_shapes([key for key in keys if self._node(key).kind == "sum"])
        sparse = self._find_sparse(list(shapes))
        buckets: dict[Bucket, list[NodeKey]] = defaultdict(list)
        for key in keys:
            width = self._node(key).num_units
            outer, inner = shapes.get(key, (width, width))
            grid = self.grids.get(key, (0, 0))
            buckets[Bucket(self.level[key], outer, inner, key in shapes, key in sparse, grid)].append(key)
        for nodes in buckets.values():  # most factors first, so that later slots of a gather fill a prefix
            nodes.sort(key=lambda key: -self._num_factors(key))
        return dict(sorted(buckets.items()))

    def _find_sparse(self, sums: list[NodeKey]) -> set[NodeKey]:
        """Sum nodes whose live edges alone are stored: not those of the heads, and none that is tied."""
        tied = {self._owner(key) for key in sums if self._node(key).tied_to is not None}
        return {
            key
            for key in sums
            if key[1] != self.graphs[key[0]].root
            and self._owner(key) not in tied
            and pays(self._node(key).mask, self.layout)
        }

    def _fold_shapes(self, sums: list[NodeKey]) -> dict[NodeKey, Shape]:
        """The padded shape of every sum node.

        Tied nodes, whose parameters are stored once, agree across levels. Heads keep to themselves: among inner nodes
        of one shape they would be the only reason for a mask.
        """
        tied = {self._owner(key) for key in sums if self._node(key).tied_to is not None}
        exact = {key: (self._node(key).num_units, self._inner_size(key)) for key in sums}
        pools: dict[object, list[NodeKey]] = defaultdict(list)
        for key in sums:
            is_root = key[1] == self.graphs[key[0]].root
            kind = (self.level[key], is_root, self.grids.get(key))
            pools["tied" if self._owner(key) in tied else kind].append(key)
        shapes: dict[NodeKey, Shape] = {}
        for keys in pools.values():
            num_layers = len({self.level[key] for key in keys})
            merged = merge_shapes(Counter(exact[key] for key in keys), num_layers)
            shapes.update({key: merged[exact[key]] for key in keys})
        return shapes

    def _fold_widths(self, inputs: list[NodeKey]) -> dict[NodeKey, int]:
        """The padded width of every input node; the states of soft evidence are as many as they are."""
        families: dict[Distribution, list[NodeKey]] = defaultdict(list)
        for key in inputs:
            distribution = self._node(key).distribution
            assert distribution is not None
            families[distribution].append(key)
        widths = {key: self._node(key).num_units for key in inputs}
        for family, keys in families.items():
            if not family.is_evidence:
                merged = merge_shapes(Counter((family.size, widths[key]) for key in keys))
                widths.update({key: merged[family.size, widths[key]][1] for key in keys})
        return widths

    def _owner(self, key: NodeKey) -> NodeKey:
        tied_to = self._node(key).tied_to
        return key if tied_to is None else (key[0], tied_to)

    def _num_factors(self, key: NodeKey) -> int:
        node = self._node(key)
        if node.kind == "product":
            return len(node.children)
        return max(
            len(self._node((key[0], child)).children) if (key[0], child) in self.inlined else 1
            for child in node.children
        )

    def _place_inputs(self, buckets: dict[Bucket, list[NodeKey]]) -> list[InputPlan]:
        """Order input nodes as their first consumers come, so that most gathers of them are plain slices."""
        order: dict[NodeKey, None] = {}
        for nodes in buckets.values():
            for key in nodes:
                g = key[0]
                for child in self._node(key).children:
                    found = self._node((g, child)).children if (g, child) in self.inlined else (child,)
                    for leaf in found:
                        if self._node((g, leaf)).kind == "input":
                            order[g, leaf] = None
        for g, graph in enumerate(self.graphs):  # a root that is itself an input
            order.update({(g, i): None for i, node in enumerate(graph.nodes) if node.kind == "input"})
        widths = self._fold_widths(list(order))
        folds: dict[tuple[Distribution, int], list[NodeKey]] = defaultdict(list)
        for key in order:
            distribution = self._node(key).distribution
            assert distribution is not None
            folds[distribution, widths[key]].append(key)
        plans, start = [], 2
        for (distribution, width), nodes in folds.items():
            group, rows = self._parameters("input", (width, distribution.size), distribution, nodes)
            plans.append(
                InputPlan(
                    group,
                    rows,
                    distribution,
                    width,
                    nodes,
                    np.array([g for g, _ in nodes], dtype=np.int64),
                    np.array([self._node(key).variable for key in nodes], dtype=np.int64),
                    start,
                )
            )
            for position, key in enumerate(nodes):
                self.base[key] = start + position * width
            start += len(nodes) * width
        return plans

    def _parameters(
        self, kind: str, shape: tuple[int, int], distribution: Distribution | None, nodes: list[NodeKey]
    ) -> tuple[int, Index]:
        """The group of these nodes' parameters, and the row of each; tied nodes share a row."""
        if distribution is not None and distribution.size == 0:
            return -1, NO_ROWS
        index = self.group_of.setdefault((kind, shape, distribution), len(self.groups))
        if index == len(self.groups):
            self.groups.append(ParameterGroup(kind, shape, distribution))
        rows = []
        for key in nodes:
            owner = self._owner(key)
            if owner not in self.row_of_owner:
                self.row_of_owner[owner] = len(self.groups[index].owners)
                self.groups[index].owners.append(owner)
            rows.append(self.row_of_owner[owner])
        return index, np.array(rows, dtype=np.int64)

    def _sparse_parameters(self, shape: tuple[int, int], nodes: list[NodeKey]) -> tuple[int, Index]:
        """A group of its own for the live edges of these nodes."""
        masks = [mask for mask in (self._node(key).mask for key in nodes) if mask is not None]
        self.groups.append(ParameterGroup("sum", shape, None, list(nodes), EdgeIndex.of(masks, *shape)))
        return len(self.groups) - 1, np.arange(len(nodes), dtype=np.int64)

    def _place_layers(
        self, buckets: dict[Bucket, list[NodeKey]], inputs: list[InputPlan]
    ) -> tuple[list[LayerPlan], int, int]:
        values = 2 + sum(len(plan.nodes) * plan.num_units for plan in inputs)
        edges = 1 + len(self.graphs) * max(graph.num_heads for graph in self.graphs)
        layers: list[LayerPlan] = []
        for (_, outer, inner, is_sum, is_sparse, grid), nodes in buckets.items():
            group, rows = -1, NO_ROWS
            if is_sparse:
                group, rows = self._sparse_parameters((outer, inner), nodes)
            elif is_sum:
                group, rows = self._parameters("sum", (outer, inner), None, nodes)
            if sum(grid):
                gather = self._gather_factors(nodes, grid, inner, len(layers))
            else:
                gather = self._gather_inputs(nodes, inner, edges)
            plan = LayerPlan(group, rows, inner, outer, nodes, gather, edges, values, grid=grid if sum(grid) else None)
            layers.append(plan)
            for position, key in enumerate(nodes):
                self.base[key] = values + position * outer
            values += len(nodes) * outer
            edges += len(gather.first)
        return layers, values, edges

    def _gather_inputs(self, nodes: list[NodeKey], inner: int, edge_start: int) -> Gather:
        """Which rows of V add up (in log space) to the inner units of these nodes."""
        num_slots = max(self._num_factors(key) for key in nodes)
        table = np.full((num_slots, len(nodes), inner), LOG_ONE, dtype=np.int64)
        table[0] = LOG_ZERO
        counts = np.zeros(num_slots, dtype=np.int64)
        for position, key in enumerate(nodes):
            column = 0
            edge = edge_start + position * inner
            node, g = self._node(key), key[0]
            parts = [key[1]] if node.kind == "product" else list(node.children)
            for part in parts:
                factors = self._factors((g, part), stored=node.kind == "product")
                width = len(factors[0])
                for slot, rows in enumerate(factors):
                    table[slot, position, column : column + width] = rows
                    counts[slot] = position + 1
                if node.kind == "product" or (g, part) in self.inlined:
                    self.inner[g, part] = np.arange(edge + column, edge + column + width)
                column += width
        more = []
        for slot in range(1, num_slots):
            size = int(counts[slot]) * inner
            more.append(Slot(np.arange(size, dtype=np.int64), table[slot].reshape(-1)[:size]))
        return Gather(table[0].reshape(-1), more)

    def _gather_factors(self, nodes: list[NodeKey], grid: Grid, inner: int, layer: int) -> Gather:
        """Which rows of V are the factors of the Kronecker products of these nodes."""
        size = grid[0] * grid[1]
        rows = []
        for fold, (g, index) in enumerate(nodes):
            children = self.graphs[g].nodes[index].children
            pairs = [self.graphs[g].nodes[child].children for child in children]
            starts = [(self.base[g, first], self.base[g, second]) for first, second in pairs]
            rows.append(grids.factor_rows(starts, grid, inner // size, LOG_ZERO))
            self.implicit.update({(g, child): (layer, fold, size * p) for p, child in enumerate(children)})
        return Gather(np.concatenate(rows))

    def _factors(self, key: NodeKey, stored: bool) -> list[Index]:
        """V rows of the factors of every unit of a child: several for a product that is not stored itself."""
        node, g = self._node(key), key[0]
        if not (stored or key in self.inlined):
            return [self.base[key] + np.arange(node.num_units)]
        units = None if node.units is None else node.units.cpu().numpy()
        return [
            self.base[g, child] + (np.arange(node.num_units) if units is None else units[:, j])
            for j, child in enumerate(node.children)
        ]

    def _find_roots(self) -> Index:
        roots = np.full((len(self.graphs), max(graph.num_heads for graph in self.graphs)), LOG_ZERO, dtype=np.int64)
        for g, graph in enumerate(self.graphs):
            roots[g, : graph.num_heads] = self.base[g, graph.root] + np.arange(graph.num_heads)
        return roots

    def _plan_gradients(self, inputs: list[InputPlan], layers: list[LayerPlan], roots: Index) -> None:
        """Turn 'E gathers V' around: for every row of V, the rows of E that it feeds."""
        values: list[Index] = [roots.reshape(-1)]
        edges: list[Index] = [1 + np.arange(roots.size)]
        for layer in layers:
            start = layer.inner_start
            values.append(layer.inputs.first)
            edges.append(start + np.arange(len(layer.inputs.first)))
            for slot in layer.inputs.more:
                values.append(slot.src)
                edges.append(start + slot.dst)
        value, edge = np.concatenate(values), np.concatenate(edges)
        used = value > LOG_ZERO
        value, edge = value[used], edge[used]
        order = np.lexsort((edge, value))
        value, edge = value[order], edge[order]
        first = np.r_[True, value[1:] != value[:-1]]
        starts = np.flatnonzero(first)
        rank = np.arange(len(value)) - starts[np.cumsum(first) - 1]
        plans: list[InputPlan | LayerPlan] = [*inputs, *layers]
        for plan in plans:
            if isinstance(plan, InputPlan):
                low, size = plan.start, len(plan.nodes) * plan.num_units
            else:
                low, size = plan.outer_start, len(plan.nodes) * plan.outer_units
            a, b = np.searchsorted(value, [low, low + size])
            plan.gradient = _consumers(value[a:b] - low, edge[a:b], rank[a:b], size)


def _is_slim_tree(graph: CircuitGraph) -> bool:
    """Whether linear values, scaled per sum node, will do: see `workspace.LinearWorkspace`."""
    uses = [0] * len(graph.nodes)
    for node in graph.nodes:
        for child in node.children:
            uses[child] += 1
    return all(
        uses[index] <= 1
        and (node.kind != "sum" or len(node.children) == 1)
        and (node.kind != "product" or len(node.children) <= MAX_LINEAR_FACTORS)
        for index, node in enumerate(graph.nodes)
    ) and all(
        graph.nodes[child].kind != "product"
        for node in graph.nodes
        if node.kind == "product"
        for child in node.children
    )


def _consumers(rows: Index, edges: Index, rank: Index, size: int) -> Gather:
    gather = Gather(np.zeros(size, dtype=np.int64))
    gather.first[rows[rank == 0]] = edges[rank == 0]
    for slot in range(1, 1 + int(rank.max(initial=0))):
        chosen = rank == slot
        gather.more.append(Slot(rows[chosen], edges[chosen]))
    return gather

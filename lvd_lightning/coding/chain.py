"""The chain rule of a batch of circuits: derivatives at one variable after the other, for many pictures at once.

Shapes: R rows (units of all nodes of all circuits), B pictures, F folded nodes, N outer units, K inner units, U input
units of a variable, S factors of a product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.coding.exact import Weights, flushed, products
from lvd_lightning.coding.schedule import Step, schedule

__all__ = ["Chain", "Walk"]

Size = tuple[int, int]


@dataclass
class _Operation:
    """Nodes that are computed together.

    out: rows (F, N) or (n,) that are written; those of units that are none lead to a row of its own.
    into: rows that are read: (F, K) of a sum, (S, n) of a product, the first of them a derivative if one goes down.
    size: of sums, that of their tables; index: (F,), the number of every node's.
    spread: of products whose units are chosen: zeros and ones (units of the child, n) that add up what arrives there.
    """

    is_down: bool
    is_first: bool
    out: Tensor
    into: Tensor
    size: Size = (0, 0)
    index: Tensor | None = None
    spread: Tensor | None = None


class Chain:
    """Circuits over the same variables, ready for the chain rule.

    Args:
        graphs: with their parameters; sums at their roots.
        order: of the variables.

    Attributes:
        num_rows: R, numbers that are kept for every picture, twice.
        inputs: by variable the input nodes, as (graph, node), in the order of their units.
    """

    def __init__(self, graphs: Sequence[CircuitGraph], order: Sequence[int], device: torch.device) -> None:
        self.graphs, self.order, self.device = list(graphs), list(order), device
        self._first: list[list[int]] = []
        rows = 0
        for graph in self.graphs:
            starts = []
            for node in graph.nodes:
                starts.append(rows)
                rows += node.num_units
            self._first.append(starts)
        self.num_rows = rows
        self._one, self._zero, self._nowhere = rows, rows + 1, rows + 2
        self.inputs: dict[int, list[tuple[int, int]]] = {variable: [] for variable in self.order}
        for g, graph in enumerate(self.graphs):
            for index, node in enumerate(graph.nodes):
                if node.kind == "input":
                    self.inputs[node.variable].append((g, index))
        self.input_rows = {
            variable: self._on(torch.cat([self._rows(g, index) for g, index in nodes]))
            for variable, nodes in self.inputs.items()
        }
        self.head_rows = [self._on(self._rows(g, graph.root)) for g, graph in enumerate(self.graphs)]
        self._tables = _Tables()
        plans = [schedule(graph, self.order) for graph in self.graphs]
        self.operations = [
            self._folded([(g, step) for g, plan in enumerate(plans) for step in plan[number]])
            for number in range(len(self.order) + 1)
        ]
        self.weights = self._tables.stacked(device)

    def _rows(self, g: int, index: int) -> Tensor:
        start = self._first[g][index]
        return torch.arange(start, start + self.graphs[g].nodes[index].num_units)

    def _on(self, rows: Tensor) -> Tensor:
        return rows.to(self.device)

    def _folded(self, steps: Sequence[tuple[int, Step]]) -> list[_Operation]:
        """Steps of one level and kind together, in the order of the levels."""
        groups: dict[tuple[int, ...], list[tuple[int, Step]]] = defaultdict(list)
        for g, step in steps:
            groups[self._kind(g, step)].append((g, step))
        return [
            operation
            for kind in sorted(groups)
            for operation in ([self._sums(groups[kind])] if kind[1] else self._products(groups[kind]))
        ]

    def _kind(self, g: int, step: Step) -> tuple[int, ...]:
        node = self.graphs[g].nodes[step.node]
        is_sum, is_down = node.kind == "sum", step.slot >= 0
        sizes = (0, 0)
        if is_sum:
            inner = self._inner_units(g, node, step.slot)
            sizes = (_padded(node.num_units), _padded(inner))
        return step.level, int(is_sum), int(is_down), int(step.is_first), *sizes

    def _inner_units(self, g: int, node: Node, slot: int) -> int:
        """Units of one child, or of all children."""
        children = node.children if slot < 0 else (node.children[slot],)
        return sum(self.graphs[g].nodes[child].num_units for child in children)

    def _sums(self, steps: Sequence[tuple[int, Step]]) -> _Operation:
        is_down = steps[0][1].slot >= 0
        outer, inner, index = [], [], []
        for g, step in steps:
            node = self.graphs[g].nodes[step.node]
            children = node.children if step.slot < 0 else (node.children[step.slot],)
            outer.append(self._rows(g, step.node))
            inner.append(torch.cat([self._rows(g, child) for child in children]))
            owner = step.node if node.tied_to is None else node.tied_to
            slot = step.slot if len(node.children) > 1 else -1
            index.append(self._tables.number((g, owner, slot), self._block(g, step)))
        number_N, number_K = _padded(max(map(len, outer))), _padded(max(map(len, inner)))
        read, written = (outer, inner) if is_down else (inner, outer)
        sizes = (number_N, number_K) if is_down else (number_K, number_N)
        return _Operation(
            is_down=is_down,
            is_first=steps[0][1].is_first,
            into=self._on(_filled(read, sizes[0], self._zero)),
            out=self._on(_filled(written, sizes[1], self._nowhere)),
            size=(number_N, number_K),
            index=torch.tensor(index, device=self.device),
        )

    def _block(self, g: int, step: Step) -> Tensor:
        """The weights that a step takes, float64 (N, K)."""
        node = self.graphs[g].nodes[step.node]
        assert node.weight is not None
        weight = node.weight.detach().cpu().double()
        if step.slot < 0:
            return weight
        sizes = [self.graphs[g].nodes[child].num_units for child in node.children]
        start = sum(sizes[: step.slot])
        return weight[:, start : start + sizes[step.slot]]

    def _products(self, steps: Sequence[tuple[int, Step]]) -> list[_Operation]:
        """Products of children unit by unit as one operation; such with chosen units each as one of its own, when they
        go down, since several units may lead to one."""
        plain: list[tuple[Tensor, list[Tensor]]] = []
        out = []
        for g, step in steps:
            node = self.graphs[g].nodes[step.node]
            factors = []
            for place, child in enumerate(node.children):
                rows = self._rows(g, child)
                factors.append(rows if node.units is None else rows[node.units[:, place]])
            own = self._rows(g, step.node)
            if step.slot < 0:
                plain.append((own, factors))
                continue
            target = factors.pop(step.slot)
            if node.units is None:
                plain.append((target, [own, *factors]))
                continue
            child = node.children[step.slot]
            spread = torch.zeros(self.graphs[g].nodes[child].num_units, len(own), dtype=torch.float64)
            spread[node.units[:, step.slot], torch.arange(len(own))] = 1.0
            into = torch.stack([own, *factors])
            rows = self._rows(g, child)
            down = _Operation(True, step.is_first, self._on(rows), self._on(into), spread=self._on(spread))
            out.append(down)
        if plain:
            longest = max(len(factors) for _, factors in plain)
            nothing = torch.full((1,), self._one)
            into = torch.cat(
                [
                    torch.stack([*factors, *[nothing.expand(len(target))] * (longest - len(factors))])
                    for target, factors in plain
                ],
                1,
            )
            target = torch.cat([target for target, _ in plain])
            first = steps[0][1]
            out.append(_Operation(first.slot >= 0, first.is_first, self._on(target), self._on(into)))
        return out


class Walk:
    """One way through the variables of a `Chain` for some pictures.

    chain: the circuits.
    heads: float64 (heads of all circuits, B), how much each head counts, circuit by circuit.
    """

    def __init__(self, chain: Chain, heads: Tensor) -> None:
        self.chain, self.place = chain, 0
        self.up_RB = torch.ones(chain.num_rows + 3, heads.shape[1], dtype=torch.float64, device=chain.device)
        self.up_RB[chain.num_rows + 1 :] = 0.0
        self.down_RB = torch.zeros_like(self.up_RB)
        self.down_RB[torch.cat(chain.head_rows)] = heads

    def coefficients(self) -> Tensor:
        """The derivatives at the inputs of the next variable, float64 (U, B): what p(its value | unit) is multiplied
        with, and summed, for p(what was observed before, value), but for a factor that all values share."""
        self._run(self.place)
        return self.down_RB[self.chain.input_rows[self.chain.order[self.place]]]

    def observe(self, likelihood_UB: Tensor) -> None:
        """Go on to the variable after this one, of which p(its value | unit) is given, or multiples of that."""
        self.up_RB[self.chain.input_rows[self.chain.order[self.place]]] = flushed(likelihood_UB)
        self.place += 1

    def values(self) -> Tensor:
        """p(all that was observed | head) of the heads of all circuits, float64 (heads, B), but for a shared factor."""
        self._run(len(self.chain.order))
        return self.up_RB[torch.cat(self.chain.head_rows)]

    def _run(self, number: int) -> None:
        for operation in self.chain.operations[number]:
            rows_RB = self.down_RB if operation.is_down else self.up_RB
            if operation.index is not None:
                weights = self.chain.weights[operation.size]
                multiply = weights.down if operation.is_down else weights.up
                found = multiply(operation.index, rows_RB[operation.into])
            else:
                found = rows_RB[operation.into[0]]
                for rows in operation.into[1:]:
                    found = flushed(found * self.up_RB[rows])
                if operation.spread is not None:
                    found = products(operation.spread[None], found[None], 1)[0]
            rows_RB[operation.out] = found if operation.is_first else rows_RB[operation.out] + found


class _Tables:
    """The weights of all sums, each once, stacked by size."""

    def __init__(self) -> None:
        self._blocks: dict[Size, list[Tensor]] = defaultdict(list)
        self._numbers: dict[tuple[int, int, int], int] = {}

    def number(self, owner: tuple[int, int, int], block: Tensor) -> int:
        """The place of a block (N, K) among those of its size; `owner` says whose it is."""
        if owner not in self._numbers:
            size = (_padded(block.shape[0]), _padded(block.shape[1]))
            padded = torch.zeros(size, dtype=torch.float64)
            padded[: block.shape[0], : block.shape[1]] = block
            self._blocks[size].append(padded)
            self._numbers[owner] = len(self._blocks[size]) - 1
        return self._numbers[owner]

    def stacked(self, device: torch.device) -> dict[Size, Weights]:
        """All of them, by size."""
        return {size: Weights(torch.stack(blocks)).to(device) for size, blocks in self._blocks.items()}


def _padded(size: int) -> int:
    """The next power of two."""
    return 1 << (size - 1).bit_length()


def _filled(rows: Sequence[Tensor], size: int, blank: int) -> Tensor:
    """Rows of several nodes as (F, size)."""
    out = torch.full((len(rows), size), blank)
    for number, found in enumerate(rows):
        out[number, : len(found)] = found
    return out

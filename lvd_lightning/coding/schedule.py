"""What has to be computed, and in which order, for one conditional of a circuit after the other.

The conditionals of a variable given those before it follow from the derivatives of p at its inputs (Darwiche 2003).
From one variable to the next most numbers stay as they are: a node's value changes with the variables of its scope
alone, and the derivative at a node with those outside of it. Which ones are out of date depends on the graph and on the
order of the variables, not on the numbers, so it is settled once. Where variables come in the order of a tree that is
two or three nodes for each of them in place of all.

Reference: Darwiche, A Differential Approach to Inference in Bayesian Networks, JACM 2003.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["Step", "order_of_inputs", "schedule"]


class Step(NamedTuple):
    """One number vector that is computed.

    level: steps of one level do not depend on each other.
    node: whose value ("up"), or from which a derivative goes down.
    slot: -1 for values; else the number of the child that the derivative goes to.
    is_first: of derivatives: whether it is the first that arrives at the child, else it is added to what is there.
    """

    level: int
    node: int
    slot: int = -1
    is_first: bool = True


def order_of_inputs(graph: CircuitGraph) -> list[int]:
    """The variables in the order in which a walk from the root comes to them."""
    order: list[int] = []
    seen: set[int] = set()
    waiting, visited = [graph.root], set[int]()
    while waiting:
        index = waiting.pop()
        if index in visited:
            continue
        visited.add(index)
        node = graph.nodes[index]
        if node.kind == "input" and node.variable not in seen:
            seen.add(node.variable)
            order.append(node.variable)
        # What is put there last is visited first: inputs, which hang on the latent that the walk is at.
        waiting += sorted(node.children, key=lambda child: graph.nodes[child].kind == "input")
    return order


def schedule(graph: CircuitGraph, order: Sequence[int]) -> list[list[Step]]:
    """The steps before every variable in `order`, and those after the last one, which give the values of the heads.

    At first all values are 1 (nothing is observed) and there are no derivatives but those of the root. Behind the steps
    of a variable come its derivatives, then it is observed.
    """
    return _Scheduler(graph, order).steps()


class _Scheduler:
    def __init__(self, graph: CircuitGraph, order: Sequence[int]) -> None:
        self.graph, self.order = graph, order
        self.scopes = graph.scope_bits()
        self.parents: list[list[tuple[int, int]]] = [[] for _ in graph.nodes]
        for index, node in enumerate(graph.nodes):
            for slot, child in enumerate(node.children):
                self.parents[child].append((index, slot))
        self.inputs: dict[int, list[int]] = {}
        for index, node in enumerate(graph.nodes):
            if node.kind == "input":
                self.inputs.setdefault(node.variable, []).append(index)
        self.fresh_up = [True] * len(graph.nodes)
        self.fresh_down = [index == graph.root for index in range(len(graph.nodes))]
        self.found: list[Step] = []
        self.level_up: dict[int, int] = {}
        self.level_down: dict[int, int] = {}

    def steps(self) -> list[list[Step]]:
        out = []
        for variable in self.order:
            self._begin()
            for index in self.inputs[variable]:
                self._want_down(index)
            out.append(self.found)
            bit = 1 << variable
            for index, scope in enumerate(self.scopes):
                if scope & bit:
                    self.fresh_up[index] = self.graph.nodes[index].kind == "input"
                else:
                    self.fresh_down[index] = False
        self._begin()
        self._want_up(self.graph.root)
        return [*out, self.found]

    def _begin(self) -> None:
        self.found, self.level_up, self.level_down = [], {}, {}

    def _want_up(self, index: int) -> int:
        """The level at which a value is there; -1 if it is already."""
        stale, waiting = set[int](), [index]
        while waiting:
            node = waiting.pop()
            if not self.fresh_up[node] and node not in stale:
                stale.add(node)
                waiting += self.graph.nodes[node].children
        for node in sorted(stale):  # children come before parents
            level = 1 + max(self.level_up.get(child, -1) for child in self.graph.nodes[node].children)
            self.found.append(Step(level, node))
            self.level_up[node], self.fresh_up[node] = level, True
        return self.level_up.get(index, -1)

    def _want_down(self, index: int) -> None:
        """See that a derivative is there."""
        stale, waiting = set[int](), [index]
        while waiting:
            node = waiting.pop()
            if not self.fresh_down[node] and node not in stale:
                stale.add(node)
                waiting += [parent for parent, _ in self.parents[node]]
        for node in sorted(stale, reverse=True):
            self._arrive(node)

    def _arrive(self, index: int) -> None:
        level = -1
        for number, (parent, slot) in enumerate(self.parents[index]):
            level = max(level, self.level_down.get(parent, -1))
            if self.graph.nodes[parent].kind == "product":
                children = self.graph.nodes[parent].children
                level = max([level, *(self._want_up(child) for place, child in enumerate(children) if place != slot)])
            level += 1
            self.found.append(Step(level, parent, slot, number == 0))
        self.level_down[index], self.fresh_down[index] = level, True

"""What training circuits takes: a small circuit is built, and counted as many times as there will be of it.

Shapes: B examples, P parts, G circuits, S slots, K latent values.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.io import pack_structure
from lvd_lightning.planning import ESTIMATE, PlanRequest

__all__ = ["WORK", "Conditionals", "TableSizes", "grown", "saved_bytes", "training_memory", "tree_prior_sizes"]

WORK = "weights of edges and inputs of the circuits that examples go to, once for each example and epoch"


@dataclass(frozen=True)
class TableSizes:
    """Sizes of circuits that run as one: sums over them, so that they can be added and multiplied.

    numbers: in their tables. sums: numbers of the statistics, always in double precision, of inputs that are no tables;
    such inputs average these in place of flows. averaged: numbers of the other tables. parameters: free ones. rows: of
    values and of inner units, which a pass computes for every example. edges: weights that an example meets. text:
    bytes of their structure.
    """

    numbers: int = 0
    sums: int = 0
    averaged: int = 0
    parameters: int = 0
    rows: int = 0
    edges: int = 0
    text: int = 0

    @classmethod
    def of(cls, circuit: pc.Circuit) -> TableSizes:
        """Those of a circuit."""
        sums = averaged = edges = 0
        for number, (table, group) in enumerate(zip(circuit.stored(), circuit.plan.groups, strict=True)):
            statistics = circuit.engine.statistics_of(number, table)
            sums += 0 if statistics is None else statistics.numel()
            averaged += table.numel() if statistics is None else 0
            edges += table.numel() if group.kind == "sum" else table.shape[0] * table.shape[1]
        text, tensors = pack_structure(circuit.structures)
        size = len(text) + sum(tensor.nbytes for tensor in tensors.values())
        numbers, plan = sum(table.numel() for table in circuit.stored()), circuit.plan
        rows = plan.num_value_rows + plan.num_edge_rows
        return cls(numbers, sums, averaged, circuit.num_parameters, rows, edges, size)

    def __mul__(self, count: int) -> TableSizes:
        return TableSizes(*(count * value for value in vars(self).values()))

    def __add__(self, other: TableSizes) -> TableSizes:
        return TableSizes(*(one + two for one, two in zip(vars(self).values(), vars(other).values(), strict=True)))

    def tables(self, width: int) -> int:
        """Bytes of the tables; width: of a number."""
        return self.numbers * width

    def gradients(self, width: int) -> int:
        """Bytes of gradients and statistics: what a step sums over ranks."""
        return self.numbers * width + self.sums * 8

    def averages(self, width: int, rule: str) -> int:
        """Bytes of moving averages, which Anemone keeps."""
        return self.averaged * width + self.sums * 8 if rule == "anemone" else 0


@dataclass(frozen=True)
class Conditionals:
    """What the stage of conditional circuits leaves: how large they are, and how many latent values they have.

    num_circuits: G. num_states: K.
    """

    sizes: TableSizes
    num_circuits: int
    num_states: int


def training_memory(
    sizes: TableSizes, request: PlanRequest, rule: str, slots: int, first: TableSizes | None = None
) -> dict[str, int]:
    """Bytes of circuits in EM.

    slots: examples that every circuit is given in a pass.
    first: a part of the whole whose passes run by themselves, by default all of it.
    """
    width, passed = request.bytes_per_number, sizes if first is None else first
    # Values and inner units forward, the gradients of both backward.
    return {
        "parameters": sizes.tables(width),
        "flows": sizes.gradients(width),
        "averages of flows": sizes.averages(width, rule),
        f"activations ({ESTIMATE})": 2 * passed.rows * slots * width,
    }


def saved_bytes(sizes: TableSizes, request: PlanRequest) -> int:
    """Of the file that `pc.save` writes."""
    return sizes.tables(request.bytes_per_number) + sizes.text


def polynomial(build: Callable[[int], TableSizes], size: int, degree: int = 2) -> TableSizes:
    """Sizes of what is too large to be built, from small ones of the same kind.

    They are polynomials in the number of states: so many of them say all.
    """
    points = list(range(2, 3 + degree))
    if size <= max(points):
        return build(size)
    found = [build(point) for point in points]
    totals = []
    for values in zip(*(vars(sizes).values() for sizes in found), strict=True):
        total = 0
        for point, value in zip(points, values, strict=True):
            above = math.prod(size - other for other in points if other != point)
            below = math.prod(point - other for other in points if other != point)
            total += value * above * (math.factorial(degree) // below)
        totals.append(total // math.factorial(degree))
    return TableSizes(*totals)


def tree_prior_sizes(num_parts: int, num_states: int, num_units: int | None) -> TableSizes:
    """Sizes of a prior over the latents of parts: a tree over them or, with `num_units`, a hidden one."""
    parents = torch.arange(-1, num_parts - 1)  # any tree has tables of the same sizes
    if num_units is not None and num_units < num_states:
        return TableSizes.of(pc.Circuit(pc.hclt(parents, num_units, pc.SoftEvidence(num_states))))
    return polynomial(lambda k: TableSizes.of(pc.Circuit(pc.hclt(parents, k, pc.SoftEvidence(k)))), num_states)


def grown(circuit: pc.Circuit, targets: list[int]) -> pc.Circuit:
    """A circuit in which as many heads have become two, round by round, as there may be of them after it."""
    for target in targets:
        count = min(target - circuit.num_heads, circuit.num_heads)
        if count <= 0:
            continue
        flows = pc.Flows(circuit)
        leaves = [layer.distribution.num_outcomes or 2 for layer in circuit.plan.inputs]
        drawn = torch.randint(min(leaves), (1, 64, circuit.num_variables), generator=torch.Generator().manual_seed(0))
        flows.add(drawn, head=torch.arange(64)[None] % circuit.num_heads)
        circuit = pc.Circuit(pc.grow(circuit, flows, heads=[list(range(count))], generator=torch.Generator()))
    return circuit

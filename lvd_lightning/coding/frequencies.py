"""Whole-number frequencies of every value of every variable of an example, given all values before it.

The parts of an example come one after the other, in the order of the prior's tree. Before a part the posterior over its
latent value, given the parts before, is exact: p(z_i | x_1 .. x_i-1). It says how much each head counts in the mixture

    p(x_i | x_1 .. x_i-1) = sum_k p(z_i = k | x_1 .. x_i-1) p(x_i | z_i = k),

and the chain rule goes on inside of it, variable by variable. After the part p(x_i | z_i = k) is evidence for the
prior. So an entropy coder needs no bits back: it never codes a latent value.

Shapes: B examples, P parts (positions), K latent values, U input units of a variable, V values.
"""

from __future__ import annotations

import hashlib
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.coding.chain import Chain, Walk
from lvd_lightning.coding.exact import MANTISSA, flushed, rounded_down
from lvd_lightning.coding.leaf_tables import leaf_table
from lvd_lightning.coding.schedule import order_of_inputs
from lvd_lightning.models.assembled import AssembledCircuit

__all__ = ["PRECISION", "Coding", "FrequencyTables"]

#: Frequencies of a variable's values add up to at most 2^PRECISION.
PRECISION = 24
#: Bits of p(value | unit) in a mixture of units.
_LEAF_BITS = 20


class _Leaf(NamedTuple):
    """Of one variable: p(value | unit) in whole numbers, (V, U), and relative to the unit that has most, (U, V)."""

    whole_VU: Tensor
    relative_UV: Tensor


class FrequencyTables:
    """The conditionals of an assembled circuit, made ready.

    Args:
        circuit: the model; it may lie on any device.
        device: where frequencies are computed, which are the same everywhere.

    Attributes:
        steps: (part, variable of the part) in the order of coding.
        numbers_per_example: float64 numbers that are kept for every example while it is coded.

    Raises:
        ValueError: a variable is continuous.
    """

    def __init__(self, circuit: AssembledCircuit, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        prior = circuit.prior.to_graph()
        assert isinstance(prior, CircuitGraph)
        self.positions = order_of_inputs(prior)
        self._prior = Chain([prior], self.positions, self.device)
        graphs = circuit.conditional.to_graph()
        assert isinstance(graphs, list)
        index = circuit.head_index  # latent values count the heads of a set circuit by circuit, as chains do
        sets = [list(range(len(graphs)))]
        if not index.tied:
            set_G = index.position(torch.arange(len(graphs))).tolist()
            sets = [
                [g for g, found in enumerate(set_G) if found == position] for position in range(len(self.positions))
            ]
        self._order = order_of_inputs(graphs[0])
        self._chains = [Chain([graphs[g] for g in members], self._order, self.device) for members in sets]
        self._leaves = [{variable: self._leaf(chain, variable) for variable in self._order} for chain in self._chains]
        self.steps = [(position, variable) for position in self.positions for variable in self._order]
        self.numbers_per_example = 2 * (self._prior.num_rows + max(chain.num_rows for chain in self._chains))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all numbers that frequencies are made of."""
        found = hashlib.sha256(repr((self.positions, self._order, PRECISION, _LEAF_BITS)).encode())
        for chain in (self._prior, *self._chains):
            for size, weights in sorted(chain.weights.items()):
                found.update(repr(size).encode())
                for table in (weights.whole_FNK, weights.scale_FN1):
                    found.update(table.cpu().contiguous().numpy().data)
        for leaves in self._leaves:
            for leaf in leaves.values():
                for table in leaf:
                    found.update(table.cpu().contiguous().numpy().data)
        return found.hexdigest()

    def chain_at(self, position: int) -> tuple[Chain, dict[int, _Leaf]]:
        """The circuits of a position, and their leaves."""
        number = position if len(self._chains) > 1 else 0
        return self._chains[number], self._leaves[number]

    def begin(self, count: int) -> Coding:
        """The way through `count` examples together, at their first variable."""
        return Coding(self, count)

    def _leaf(self, chain: Chain, variable: int) -> _Leaf:
        nodes = [chain.graphs[g].nodes[index] for g, index in chain.inputs[variable]]
        tables = []
        for family, members in groupby(nodes, key=lambda node: node.distribution):
            assert family is not None
            given = [torch.empty(node.num_units, 0) if node.params is None else node.params for node in members]
            tables.append(leaf_table(family, torch.cat(given)))
        p_UV = torch.cat(tables)
        most_V = p_UV.amax(0)
        relative_UV = flushed(torch.where(most_V > 0, p_UV / torch.where(most_V > 0, most_V, 1.0), 1.0))
        whole_VU = (p_UV * 2.0**_LEAF_BITS).round().T.contiguous()
        return _Leaf(whole_VU.to(self.device), relative_UV.to(self.device))


class Coding:
    """Where some examples are on their way: at a variable that is asked for frequencies, then told its values."""

    def __init__(self, tables: FrequencyTables, count: int) -> None:
        self.tables, self.number = tables, 0
        root = torch.ones(1, count, dtype=torch.float64, device=tables.device)
        self._prior = Walk(tables._prior, root)
        self._enter()

    def frequencies(self) -> Tensor:
        """Those of the values of the next variable, whole numbers in float64 (B, V) on the CPU, rows of at most
        2^`PRECISION`; what is too rare has 0."""
        _, variable = self.tables.steps[self.number]
        whole_VU = self._leaves[variable].whole_VU
        weight_UB = _or_ones(self._walk.coefficients())
        bits = MANTISSA - _LEAF_BITS - (2 * len(weight_UB) - 1).bit_length()
        mixed_VB = whole_VU @ rounded_down(weight_UB, bits)[0]
        total_B = mixed_VB.sum(0)
        share_B = (2.0**PRECISION - 2.0 * len(mixed_VB)) / torch.where(total_B > 0, total_B, 1.0)
        return (mixed_VB * share_B).floor().T.cpu()

    def observe(self, values: Tensor) -> None:
        """Go on to the next variable; values: int64 (B,), of the one that frequencies were asked of."""
        _, variable = self.tables.steps[self.number]
        self._walk.observe(self._leaves[variable].relative_UV[:, values.to(self.tables.device)])
        self.number += 1
        if self.number % len(self.tables._order) == 0:
            self._prior.observe(_or_ones(self._walk.values()))
            if self.number < len(self.tables.steps):
                self._enter()

    def _enter(self) -> None:
        """Begin a part."""
        position, _ = self.tables.steps[self.number]
        chain, self._leaves = self.tables.chain_at(position)
        self._walk = Walk(chain, _or_ones(self._prior.coefficients()))


def _or_ones(found_UB: Tensor) -> Tensor:
    """Numbers of which the largest of every column is 1; all are 1 where nothing is left of them: what comes next is
    then coded as if nothing were known, at the cost of some bits."""
    most_B = found_UB.amax(0)
    return torch.where(most_B > 0, flushed(found_UB / torch.where(most_B > 0, most_B, 1.0)), 1.0)

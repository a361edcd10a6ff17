"""Cluster, head and latent value: three names for what models a part, and how one follows from another.

Shapes: G circuits, T heads of all circuits, K latent values, P positions, S sets of circuits (1 or P).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lvd_lightning import circuits as pc

__all__ = ["HeadIndex"]


class HeadIndex:
    """The heads of a batch of circuits, counted through: circuit 0 first.

    Either all positions share the circuits (they are tied), and a latent value is the number of a head; or every
    position has a set of circuits of its own, set by set, and a latent value is the number of a head within the set.
    Arguments may be on any device, where the answer is, too.

    Args:
        heads_per_circuit: how many heads each circuit has.
        num_sets: 1 if all positions share the circuits; else how many positions there are.

    Attributes:
        num_values: K, the latent values of a position.
        num_circuits: G.
        tied: whether all positions share the circuits.

    Raises:
        ValueError: the circuits do not fall into sets of K heads.

    Example:
        >>> shared = HeadIndex([1, 2])
        >>> circuit, head = shared.locate(torch.tensor([[0, 2, 1]]))  # of three positions
        >>> circuit.tolist(), head.tolist()
        ([[0, 1, 1]], [[0, 1, 0]])
        >>> shared.value(circuit, head).tolist()
        [[0, 2, 1]]
        >>> own = HeadIndex([1, 2, 3], num_sets=2)  # one position has two circuits, the other one
        >>> own.locate(torch.tensor([[2, 2]]))
        (tensor([[1, 2]]), tensor([[1, 2]]))
    """

    def __init__(self, heads_per_circuit: Sequence[int], num_sets: int = 1) -> None:
        heads_G = torch.tensor(heads_per_circuit, dtype=torch.int64)
        ends_G = heads_G.cumsum(0)
        self.num_values = int(heads_G.sum()) // num_sets
        self.num_circuits = len(heads_G)
        self.tied = num_sets == 1
        ends_S = self.num_values * torch.arange(1, num_sets + 1)
        if not bool(torch.isin(ends_S, ends_G).all()) or ends_S[-1] != ends_G[-1]:
            raise ValueError(
                f"conditional: a circuit has heads of two positions; every {self.num_values} are one's, got "
                f"{int(heads_G.sum())} heads for {num_sets} positions"
            )
        first_G = ends_G - heads_G
        circuit_T = torch.arange(len(heads_G)).repeat_interleave(heads_G)
        tables = _Tables(
            circuit_T=circuit_T,
            head_T=torch.arange(len(circuit_T)) - first_G[circuit_T],
            first_G=first_G,
            circuit_S=circuit_T[ends_S - self.num_values],
        )
        self._tables = {torch.device("cpu"): tables}

    @classmethod
    def of(cls, conditional: pc.Circuit, num_values: int, num_positions: int) -> HeadIndex:
        """That of circuits for so many latent values; how many heads they have says whether positions share them.

        Raises:
            ValueError: there are neither K heads nor K for each position.
        """
        heads = [structure.num_heads for structure in conditional.structures]
        if sum(heads) == num_values:
            return cls(heads)
        if sum(heads) != num_values * num_positions:
            raise ValueError(
                f"conditional: has {sum(heads)} heads, expected {num_values} (tied over positions) or "
                f"{num_values * num_positions} (one set per position)"
            )
        return cls(heads, num_positions)

    def locate(self, value: Tensor, position: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Which circuit, and which of its heads, each latent value stands for.

        value: int64 of any shape.
        position: int64, broadcast with `value`; by default the last dimension of `value` is that of positions.
        """
        if not self.tied:
            value = value + self.num_values * self._positions(value, position)
        tables = self._on(value.device)
        return tables.circuit_T[value], tables.head_T[value]

    def value(self, circuit: Tensor, head: Tensor) -> Tensor:
        """The latent value that a head of a circuit stands for, int64; both integers of any shape."""
        return (self._on(circuit.device).first_G[circuit] + head) % self.num_values

    def circuit(self, cluster: Tensor, position: Tensor | None = None) -> Tensor:
        """The circuit of each cluster, int64; clusters are counted anew at every position that has its own circuits.

        cluster, position: as `value` and `position` of `locate`.
        """
        if self.tied:
            return cluster
        return cluster + self._on(cluster.device).circuit_S[self._positions(cluster, position)]

    def position(self, circuit: Tensor) -> Tensor:
        """The position that each circuit belongs to, int64; 0 where all positions share them."""
        return self._on(circuit.device).first_G[circuit] // self.num_values

    def _positions(self, like: Tensor, position: Tensor | None) -> Tensor:
        return torch.arange(like.shape[-1], device=like.device) if position is None else position

    def _on(self, device: torch.device) -> _Tables:
        """The tables on a device, where they are kept from then on."""
        if device not in self._tables:
            self._tables[device] = _Tables(*(table.to(device) for table in self._tables[torch.device("cpu")]))
        return self._tables[device]


class _Tables(NamedTuple):
    """Circuit and place within it of every head, the first head of every circuit, the first circuit of every set."""

    circuit_T: Tensor
    head_T: Tensor
    first_G: Tensor
    circuit_S: Tensor

"""Circuits that ranks divide among themselves: which a rank holds, how heavy they are, how their tables are exchanged.

Shapes: G circuits of all ranks, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.ranks import rank_and_size

__all__ = ["Members", "TableRows", "balanced_owners", "circuit_cost"]


@dataclass(frozen=True)
class Members:
    """Which of all circuits this rank holds.

    owner: int64 (G,), the rank of each circuit.
    heads: how many heads each circuit has.

    Example:
        >>> members = Members(torch.tensor([0, 1, 0]), (1, 2, 1))
        >>> members.own.tolist(), members.num_circuits, members.num_heads  # of the only process
        ([0, 2], 3, 2)
    """

    owner: Tensor
    heads: tuple[int, ...]

    @property
    def own(self) -> Tensor:
        """The numbers of this rank's circuits, ascending, int64."""
        return self.of_rank(rank_and_size()[0])

    def of_rank(self, rank: int) -> Tensor:
        """Those of another rank."""
        return (self.owner == rank).nonzero()[:, 0]

    @property
    def num_circuits(self) -> int:
        return len(self.owner)

    @property
    def num_heads(self) -> int:
        """Heads of the circuit that has the most."""
        return max(self.heads)

    def places(self) -> Tensor:
        """The place of each circuit among this rank's, int64 (G,); -1 for those of others."""
        place_G = torch.full((self.num_circuits,), -1)
        own = self.own
        place_G[own] = torch.arange(len(own))
        return place_G


def balanced_owners(cost: Sequence[float], num_ranks: int) -> Tensor:
    """A rank for every circuit, so that all ranks have about equal sums of costs, int64 (G,).

    The heaviest circuit left goes to the rank that has least: no rank has more than 4/3 of what is best (Graham, 1969).

    Raises:
        ValueError: fewer circuits than ranks.

    Example:
        >>> balanced_owners([4.0, 1.0, 3.0, 2.0], 2).tolist()
        [0, 0, 1, 1]
    """
    if len(cost) < num_ranks:
        raise ValueError(
            f"sharding: {len(cost)} circuits do not go round {num_ranks} ranks: use fewer ranks, or sharding: data"
        )
    load, owner = [0.0] * num_ranks, [0] * len(cost)
    for g in sorted(range(len(cost)), key=lambda g: (-cost[g], g)):
        rank = min(range(num_ranks), key=lambda rank: (load[rank], rank))
        owner[g] = rank
        load[rank] += cost[g]
    return torch.tensor(owner)


def circuit_cost(graph: pc.CircuitGraph) -> float:
    """What an example in a circuit costs: its live edges and input units."""
    total = 0
    for node in graph.nodes:
        if node.kind == "sum":
            widths = sum(graph.nodes[child].num_units for child in node.children)
            total += node.num_units * widths if node.mask is None else int(node.mask.sum())
        elif node.kind == "input":
            total += node.num_units
    return float(total)


class TableRows:
    """Where the parameters of some circuits are in the tables of two batches that both have them.

    Either may fold, pad and lay out its nodes in its own way.

    Args:
        source, target: the batches.
        number: of every circuit of the target its number in the source, -1 where the source has none.
    """

    def __init__(self, source: pc.Circuit, target: pc.Circuit, number: Sequence[int]) -> None:
        self.source, self.target = source, target
        place = {
            owner: (group, row)
            for group, found in enumerate(source.plan.groups)
            for row, owner in enumerate(found.owners)
        }
        rows: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for group, found in enumerate(target.plan.groups):
            for row, (g, node) in enumerate(found.owners):
                if number[g] >= 0:
                    from_group, from_row = place[number[g], node]
                    rows.setdefault((group, from_group), []).append((row, from_row))
        self.rows = {
            groups: (torch.tensor([one for one, _ in pairs]), torch.tensor([other for _, other in pairs]))
            for groups, pairs in rows.items()
        }

    @torch.no_grad()
    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Copy rows of numbers laid out as the parameters of the source, or statistics of inputs, in place."""
        of_source: dict[int, Tensor] = {}
        of_target: dict[int, Tensor] = {}
        for (group, from_group), (to_rows, from_rows) in self.rows.items():
            if from_group not in of_source:
                of_source[from_group] = _dense(self.source, from_group, source[from_group])
            if group not in of_target:
                of_target[group] = _dense(self.target, group, target[group])
            given, taking = of_source[from_group], of_target[group]
            # Either may be padded more than the other; what both have room for holds all parameters.
            units, inner = min(given.shape[1], taking.shape[1]), min(given.shape[2], taking.shape[2])
            taking[to_rows, :units, :inner] = given[from_rows, :units, :inner].to(taking)
        for group, taking in of_target.items():
            edges = self.target.engine.edges(group)
            if edges is not None:
                edges.write(target[group], taking, 0)


def _dense(circuit: pc.Circuit, group: int, values: Tensor) -> Tensor:
    return values if values.ndim == 3 else circuit.engine.dense(group, values)

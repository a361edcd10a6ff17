"""How large the circuits of a batch are."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from lvd_lightning import circuits as pc
from lvd_lightning.ranks import summed

__all__ = ["CircuitSize"]


@dataclass(frozen=True)
class CircuitSize:
    """clusters: circuits; heads: of all of them; edges: live ones into sum units; parameters: free ones."""

    clusters: int
    heads: int
    edges: int
    parameters: int

    @classmethod
    def of(cls, circuit: pc.Circuit) -> CircuitSize:
        """The size of a circuit or batch of circuits."""
        edges = 0
        for graph in circuit.structures:
            for node in graph.nodes:
                if node.kind == "sum" and node.mask is not None:
                    edges += int(node.mask.sum())
                elif node.kind == "sum":
                    edges += node.num_units * sum(graph.nodes[child].num_units for child in node.children)
        heads = sum(graph.num_heads for graph in circuit.structures)
        return cls(circuit.num_circuits, heads, edges, circuit.num_parameters)

    def of_all_ranks(self) -> CircuitSize:
        """The sum over ranks that have circuits of their own; all have to call."""
        return CircuitSize(*(int(total) for total in summed(torch.tensor(list(asdict(self).values())))))

    def figures(self, when: str) -> dict[str, float]:
        """For a logger: "clusters_<when>", "heads_<when>", ..."""
        return {f"{name}_{when}": float(value) for name, value in asdict(self).items()}

"""log p(z) of a tree over the latents themselves: one number of a table for every edge, instead of a pass.

Shapes: B examples, P latents, K states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning import circuits as pc

__all__ = ["TreeLookup"]


@dataclass(frozen=True)
class _Edge:
    """p(z_variable | z_parent) is row `row` of a parameter group, as (row, K, K), or (row, 1, K) at the root."""

    variable: int
    parent: int
    group: int
    row: int


@dataclass(frozen=True)
class TreeLookup:
    """Where the tables of a tree are among the parameters of its circuit.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> prior = pc.Circuit(pc.hclt([-1, 0], 3, pc.SoftEvidence(3)))
        >>> lookup = TreeLookup.of(prior)
        >>> z = torch.cartesian_prod(torch.arange(3), torch.arange(3))
        >>> print(f"{lookup.log_prob(prior.probabilities(), z).exp().sum():.4f}")
        1.0000
        >>> TreeLookup.of(pc.Circuit(pc.hclt([-1, 0], 2, pc.SoftEvidence(3)))) is None  # hidden states
        True
    """

    edges: tuple[_Edge, ...]

    @classmethod
    def of(cls, prior: pc.Circuit) -> TreeLookup | None:
        """That of a circuit over soft evidence; None if it is no such tree, or stores the edges that pruning left."""
        (graph,) = prior.structures
        place = {owner: (n, row) for n, group in enumerate(prior.plan.groups) for row, owner in enumerate(group.owners)}
        variable_of = {node: v for v, node in graph.latents.items()}
        edges = []
        for v, latent in graph.latents.items():
            below = [graph.nodes[child] for child in graph.nodes[latent].children]
            if sum(node.kind == "input" and node.variable == v for node in below) != 1:
                return None
            if not all(node.kind == "input" or node.children[0] in variable_of for node in below):
                return None
        for index, node in enumerate(graph.nodes):
            if node.kind != "sum":
                continue
            if len(node.children) != 1 or node.children[0] not in variable_of or (0, index) not in place:
                return None
            number, row = place[0, index]
            if prior.engine.edges(number) is not None:
                return None
            above = [u for u, latent in graph.latents.items() if index in graph.nodes[latent].children]
            if (len(above) != 1) if index != graph.root else (node.num_units != 1):
                return None
            edges.append(_Edge(variable_of[node.children[0]], above[0] if above else -1, number, row))
        return cls(tuple(edges)) if len(edges) == len(graph.latents) else None

    def log_prob(self, tables: Sequence[Tensor], z: Tensor) -> Tensor:
        """log p(z) in nats, (B,); z: int64 (B, P); tables: the normalised parameters of the circuit."""
        found = torch.zeros(len(z), dtype=tables[self.edges[0].group].dtype, device=z.device)
        for edge in self.edges:
            table_KK = tables[edge.group][edge.row]
            above = z[:, edge.parent] if edge.parent >= 0 else torch.zeros_like(z[:, 0])
            found += table_KK[above, z[:, edge.variable]].log()
        return found

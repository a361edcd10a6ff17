"""Hidden Chow-Liu trees whose first parameters come from data: latents start as quantiles of their variables.

Shapes: N examples, D variables, H latent states, C categories.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions import Categorical
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.hclt import hclt

__all__ = ["hclt_from_data"]


def hclt_from_data(
    x: Tensor,
    parents: Tensor,
    num_latents: int,
    leaf: Categorical,
    *,
    smoothing: float = 0.5,
    generator: torch.Generator | None = None,
) -> CircuitGraph:
    """An HCLT whose latent y_v is, to begin with, the quantile of x_v among `num_latents`.

    Ranks (ties in random order) cut every variable's examples into `num_latents` equal parts. Leaves are the values
    counted in each part, edges count which parts occur together, and both are smoothed: towards the variable's
    marginal and towards uniform. From there EM needs few steps, where random parameters need epochs, because
    neighbouring variables already agree on what their latents mean.

    Args:
        x: integers (N, D), with N of a few hundred or more.
        parents: (D,), from `chow_liu_tree`.
        num_latents: H.
        leaf: Categorical (or Bernoulli).
        smoothing: share of the counts that the smoothing adds.
    """
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != len(parents):
        raise ValueError(f"x: expected integers of shape (examples, {len(parents)}), got {tuple(x.shape)}")
    if not smoothing > 0:
        raise ValueError(f"smoothing: must be positive, or some parameters are zero for good, got {smoothing}")
    leaf.check_values(x)
    x = x.long()
    state_ND = _quantiles(x, num_latents, generator)
    leaves_DHC = _leaf_counts(x, state_ND, num_latents, leaf.num_categories)
    marginal_D1C = leaves_DHC.sum(1, keepdim=True) + 0.05
    marginal_D1C /= marginal_D1C.sum(-1, keepdim=True)
    leaves_DHC += smoothing * len(x) / num_latents * marginal_D1C
    leaves_DHC /= leaves_DHC.sum(-1, keepdim=True)
    edges_DHH = _edge_counts(state_ND, parents, num_latents) + smoothing * len(x) / num_latents**2
    edges_DHH /= edges_DHH.sum(-1, keepdim=True)
    graph = hclt(parents, num_latents, leaf, generator=generator)
    variable_of = {node: v for v, node in graph.latents.items()}
    for node in graph.nodes:
        if node.kind == "input":
            node.params = leaves_DHC[node.variable]
        elif node.kind == "sum":
            v = variable_of[node.children[0]]
            uniform = torch.full((1, num_latents), 1.0 / num_latents)
            node.weight = edges_DHH[v] if int(parents[v]) >= 0 else uniform
    return graph


def _quantiles(x_ND: Tensor, num_latents: int, generator: torch.Generator | None) -> Tensor:
    """Which of `num_latents` equal parts each value falls into, ties in random order; int64 (N, D)."""
    jittered = x_ND.double() + torch.rand(x_ND.shape, generator=generator, dtype=torch.float64)
    rank_ND = jittered.argsort(0).argsort(0)
    return rank_ND * num_latents // len(x_ND)


def _leaf_counts(x_ND: Tensor, state_ND: Tensor, num_latents: int, num_categories: int) -> Tensor:
    size = x_ND.shape[1]
    cell = (torch.arange(size) * num_latents + state_ND) * num_categories + x_ND
    counts = torch.bincount(cell.reshape(-1), minlength=size * num_latents * num_categories)
    return counts.view(size, num_latents, num_categories).float()


def _edge_counts(state_ND: Tensor, parents: Tensor, num_latents: int) -> Tensor:
    size = state_ND.shape[1]
    above_ND = state_ND[:, parents.clamp_min(0)]
    cell = (torch.arange(size) * num_latents + above_ND) * num_latents + state_ND
    return torch.bincount(cell.reshape(-1), minlength=size * num_latents**2).view(size, num_latents, -1).float()

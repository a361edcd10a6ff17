"""Priors over the latents of patches: Chow-Liu trees with the closed form from counts, and trees with extra latents."""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.checks import expect
from lvd_lightning.circuits.structures import chow_liu_tree
from lvd_lightning.models.head_index import HeadIndex

__all__ = ["chow_liu_prior", "clusters_tree", "hidden_prior", "latent_tree"]


def latent_tree(z: Tensor, num_states: int, max_examples: int = 20000) -> Tensor:
    """Chow-Liu tree over the latents z, int64 (N, P); parents (P,)."""
    return chow_liu_tree(z, num_categories=num_states, num_bins=num_states, max_examples=max_examples)


def clusters_tree(z: Tensor, heads: HeadIndex) -> Tensor:
    """Chow-Liu tree over the circuits that model the patches, if all positions share them; parents (P,).

    Which head of a circuit models a patch says little about other patches, and the cost of the tree is quadratic in
    the number of values.

    Args:
        z: int64 (N, P), latent values.
        heads: which circuit a value stands for; values themselves make the tree if every position has its own.
    """
    if not heads.tied:
        return latent_tree(z, heads.num_values)
    circuit_NP, _ = heads.locate(z)
    return latent_tree(circuit_NP, heads.num_circuits)


def chow_liu_prior(z: Tensor, num_states: int, parents: Tensor, pseudocount: float = 1.0) -> pc.Circuit:
    """The tree over z with maximum-likelihood parameters from counts (method of Chow and Liu, 1968).

    Every row p(z_v | z_pa(v) = k) gets `pseudocount` examples more, spread in proportion to the overall frequencies of
    the states (a thousandth of an example added to each), so that a state that was never seen next to another keeps a
    plausible probability there.

    Args:
        z: int64 (N, P), values below `num_states`.
        parents: (P,) from `latent_tree`.
    """
    expect(pseudocount > 0, "pseudocount", pseudocount, "more than 0, or some states are impossible for good")
    graph = pc.hclt(parents, num_states, pc.SoftEvidence(num_states))
    variable_of = {node: v for v, node in graph.latents.items()}
    overall_K = torch.bincount(z.reshape(-1), minlength=num_states).double() + 1e-3
    smooth_K = pseudocount * overall_K / overall_K.sum()
    for node in graph.nodes:
        if node.kind == "sum":
            v = variable_of[node.children[0]]
            weight = _counts(z, v, int(parents[v]), num_states) + smooth_K
            node.weight = (weight / weight.sum(1, keepdim=True)).to(torch.get_default_dtype())
    return pc.Circuit(graph)


def hidden_prior(num_states: int, num_latents: int, parents: Tensor, generator: torch.Generator) -> pc.Circuit:
    """A hidden Chow-Liu tree over z with `num_latents` states per latent, drawn at random."""
    return pc.Circuit(pc.hclt(parents, num_latents, pc.SoftEvidence(num_states), generator=generator))


def _counts(z: Tensor, v: int, above: int, num_states: int) -> Tensor:
    """How often z_v has each state, for each state of its parent: float64 (K, K), or (1, K) for the root."""
    if above < 0:
        return torch.bincount(z[:, v], minlength=num_states)[None].double()
    pairs = z[:, above] * num_states + z[:, v]
    return torch.bincount(pairs, minlength=num_states**2).view(num_states, num_states).double()

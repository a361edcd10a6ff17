"""Priors over the latents of patches: Chow-Liu trees and hidden Chow-Liu trees, both begun from counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.checks import expect
from lvd_lightning.circuits.structures import chow_liu_tree
from lvd_lightning.latents.kmeans import assign, fit_centroids
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.parts import ImagePatches, Parts

__all__ = ["chow_liu_prior", "clusters_tree", "edge_kinds", "hidden_prior", "latent_tree"]

#: Shrinkages to choose from, in examples; and how many smooth what is counted in all edges of a kind.
SHRINKAGES, KIND_PSEUDOCOUNT = (0.0, 5.0, 20.0, 80.0, 320.0), 20.0
#: One example in so many says which shrinkage is best.
HELD_OUT = 10
#: The share of a latent state that goes to states of other groups.
SPREAD = 0.05


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


def edge_kinds(parents: Tensor, parts: Parts) -> Tensor:
    """Which edges of a tree over parts lie alike, int64 (P,); -1 at the root.

    Edges between patches of an image are alike if a patch lies in the same direction and distance from its parent,
    between other parts if their numbers differ by as much.
    """
    child, parent = torch.arange(len(parents)), parents.clamp_min(0)
    across = 1
    if isinstance(parts, ImagePatches):
        across = parts.grid[1]
    down = child // across - parent // across
    right = child % across - parent % across
    kind = down * (2 * across + 1) + right
    _, kind = kind.unique(return_inverse=True)
    return torch.where(parents < 0, -1, kind)


def chow_liu_prior(
    z: Tensor,
    num_states: int,
    parents: Tensor,
    pseudocount: float = 1.0,
    kinds: Tensor | None = None,
    shrinkage: float | None = None,
) -> pc.Circuit:
    """The tree over z with maximum-likelihood parameters from counts (method of Chow and Liu, 1968).

    Every row p(z_v | z_pa(v) = k) gets `pseudocount` examples more, spread in proportion to the overall frequencies of
    the states (a thousandth of an example added to each), so that a state that was never seen next to another keeps a
    plausible probability there. Rows are drawn to those of all edges of their kind besides, by `shrinkage` examples:
    with many states an edge of its own has seen few examples of each, and what lies to the right of a state is much the
    same wherever it is.

    Args:
        z: int64 (N, P), values below `num_states`.
        parents: (P,) from `latent_tree`.
        kinds: (P,) from `edge_kinds`; None for no shrinkage.
        shrinkage: in examples; None: that of `SHRINKAGES` under which a tenth of the examples is likeliest when the
            others are counted.
    """
    expect(pseudocount > 0, "pseudocount", pseudocount, "more than 0, or some states are impossible for good")
    graph = pc.hclt(parents, num_states, pc.SoftEvidence(num_states))
    overall_K = torch.bincount(z.reshape(-1), minlength=num_states).double() + 1e-3
    edges = _Edges(z, parents, num_states, pseudocount * overall_K / overall_K.sum(), kinds)
    _set_transitions(graph, edges, _best_shrinkage(edges) if shrinkage is None else shrinkage)
    return pc.Circuit(graph)


def hidden_prior(
    z: Tensor,
    num_states: int,
    num_latents: int,
    parents: Tensor,
    generator: torch.Generator,
    pseudocount: float = 1.0,
    kinds: Tensor | None = None,
    shrinkage: float | None = None,
) -> pc.Circuit:
    """A hidden Chow-Liu tree over z with `num_latents` states per latent, whose first parameters are counted.

    The states of a position with like neighbours in the tree are put into one group (K-means of the square roots of
    p(z of the neighbours | z_v = k)). A latent begins as the group of its position's state: transitions are those
    counted between groups, and a group gives its states the probabilities counted in it, but a share of `SPREAD`, which
    goes to all states of the position: EM cannot give back what is 0. With as many latent states as states there is
    nothing to group: it is the tree over z.

    Args:
        z, num_states, parents, pseudocount: as for `chow_liu_prior`.
        kinds, shrinkage: of the tree over z, if it is that. Groups are numbered anew at every position, so that edges
            between them have nothing in common.
        generator: where K-means draws its starts, on the CPU.

    References:
        Liu, Zhang and Van den Broeck, ICLR 2023, section 3, for a hidden Chow-Liu tree over the latent variables.
    """
    if num_latents >= num_states:
        return chow_liu_prior(z, num_states, parents, pseudocount, kinds, shrinkage)
    expect(pseudocount > 0, "pseudocount", pseudocount, "more than 0, or some states are impossible for good")
    graph = pc.hclt(parents, num_latents, pc.SoftEvidence(num_states), generator=generator)
    group_VK = torch.stack([_groups(z, v, parents, num_states, num_latents, generator) for v in range(z.shape[1])])
    y_NP = group_VK.T.gather(0, z)
    overall_L = torch.bincount(y_NP.reshape(-1), minlength=num_latents).double() + 1e-3
    edges = _Edges(y_NP, parents, num_latents, pseudocount * overall_L / overall_L.sum(), None)
    _set_transitions(graph, edges, 0.0)
    for node in graph.nodes:
        if node.kind == "sum" and graph.nodes[node.children[0]].kind == "input":
            v = int(graph.nodes[node.children[0]].variable)
            count_K = torch.bincount(z[:, v], minlength=num_states).double() + 1e-3
            within_LK = torch.zeros(num_latents, num_states, dtype=torch.float64)
            within_LK[group_VK[v], torch.arange(num_states)] = count_K
            total_L1 = within_LK.sum(1, keepdim=True)
            overall_K = count_K / count_K.sum()
            within_LK = torch.where(total_L1 > 0, within_LK / total_L1.clamp_min(1e-300), overall_K)
            node.weight = ((1 - SPREAD) * within_LK + SPREAD * overall_K).to(torch.get_default_dtype())
    return pc.Circuit(graph)


def _groups(z: Tensor, v: int, parents: Tensor, num_states: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """The group of each state of z_v, int64 (K,), by the states of its neighbours in the tree."""
    above = int(parents[v])
    near = [*([above] if above >= 0 else []), *(parents == v).nonzero()[:, 0].tolist()]
    rows = []
    for other in near:
        count_KK = _counts(z, other, v, num_states)
        overall_K = torch.bincount(z[:, other], minlength=num_states).double()
        rows.append((count_KK + overall_K / len(z)) / (count_KK.sum(1, keepdim=True) + 1))
    if not rows:
        return torch.arange(num_states) % num_groups
    # Distances of square roots are those of distributions (Hellinger). Where fewer states differ, groups stay empty.
    points_KE = torch.cat(rows, 1).sqrt().float()
    distinct = len(points_KE.unique(dim=0))
    return assign(points_KE, fit_centroids(points_KE, min(num_groups, distinct), generator=generator))


@dataclass(frozen=True)
class _Edges:
    """The states y, int64 (N, P), that edges are counted from, and what smooths every row of counts, (K,)."""

    y: Tensor
    parents: Tensor
    num_states: int
    smooth_K: Tensor
    kinds: Tensor | None

    def tables(self, shrinkage: float) -> Iterator[tuple[int, Tensor]]:
        """Every variable with p(y_v | y_pa(v)), float64 (K, K), or (1, K) at the root."""
        shared = self._shared() if self.kinds is not None and shrinkage > 0 else {}
        for v, above in enumerate(self.parents.tolist()):
            weight_KK = _counts(self.y, v, above, self.num_states) + self.smooth_K
            if self.kinds is not None and int(self.kinds[v]) in shared:
                weight_KK += shrinkage * shared[int(self.kinds[v])]
            yield v, weight_KK / weight_KK.sum(1, keepdim=True)

    def _shared(self) -> dict[int, Tensor]:
        """Rows of the edges of each kind together, float64 (K, K); of kinds that have several edges."""
        assert self.kinds is not None
        count = torch.bincount(self.kinds[self.kinds >= 0], minlength=1)
        out = {}
        for kind in (count > 1).nonzero()[:, 0].tolist():
            members = (self.kinds == kind).nonzero()[:, 0].tolist()
            total_KK = sum(_counts(self.y, v, int(self.parents[v]), self.num_states) for v in members)
            total_KK = total_KK + KIND_PSEUDOCOUNT * self.smooth_K / self.smooth_K.sum()
            out[kind] = total_KK / total_KK.sum(1, keepdim=True)
        return out


def _best_shrinkage(edges: _Edges) -> float:
    """The one of `SHRINKAGES` under which one example in `HELD_OUT` is likeliest, if the others are counted."""
    held_out = torch.arange(len(edges.y)) % HELD_OUT == HELD_OUT - 1
    if edges.kinds is None or not bool(held_out.any()):
        return 0.0
    rest, seen = replace(edges, y=edges.y[~held_out]), edges.y[held_out]
    found = []
    for shrinkage in SHRINKAGES:
        total = 0.0
        for v, table_KK in rest.tables(shrinkage):
            above = int(edges.parents[v])
            rows = seen[:, above] if above >= 0 else torch.zeros_like(seen[:, 0])
            total += float(table_KK[rows, seen[:, v]].log().sum())
        found.append(total)
    return SHRINKAGES[max(range(len(found)), key=found.__getitem__)]


def _set_transitions(graph: pc.CircuitGraph, edges: _Edges, shrinkage: float) -> None:
    """Set the weights between latents, and of the root, to what is counted."""
    variable_of = {node: v for v, node in graph.latents.items()}
    nodes = {
        variable_of[node.children[0]]: node
        for node in graph.nodes
        if node.kind == "sum" and node.children[0] in variable_of
    }
    for v, table_KK in edges.tables(shrinkage):
        nodes[v].weight = table_KK.to(torch.get_default_dtype())


def _counts(z: Tensor, v: int, above: int, num_states: int) -> Tensor:
    """How often z_v has each state, for each state of its parent: float64 (K, K), or (1, K) for the root."""
    if above < 0:
        return torch.bincount(z[:, v], minlength=num_states)[None].double()
    pairs = z[:, above] * num_states + z[:, v]
    return torch.bincount(pairs, minlength=num_states**2).view(num_states, num_states).double()

r"""Entropy and Kullback-Leibler divergence of p(x, latents).

The latents are the choices of all sums. A unit that is reached chooses among its children by its weights, whatever was
chosen elsewhere, so by the chain rule

    H = sum_n TD(n) H(weights of n),   KL(p || q) = sum_n TD_p(n) KL(weights of n in p || weights of n in q),

over sum units, and over input units with their distributions, TD(n) being the probability that n is reached. Both bound
their counterparts for x alone from above: x tells less than x and the latents.

Shapes: G circuits, P parameter rows, K units, S numbers per unit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_type
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Distribution, Gaussian
from lvd_lightning.circuits.engine.batch import head_index
from lvd_lightning.circuits.engine.plan import LOG_ZERO, ParameterGroup
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["entropy", "kl"]


@torch.no_grad()
def entropy(circuit: Circuit, head: int | Tensor = 0) -> Tensor:
    r"""The entropy of p(x, latents) in nats, exact; an upper bound of that of p(x).

    With continuous variables it is a differential entropy. The latents of `SoftEvidence` are its only variables.

    Args:
        head: an int; for a batch of circuits also int64 (G,), a head for each.

    Returns:
        A number; for a batch of circuits (G,).

    Raises:
        ValueError: a graph in place of a circuit, or a circuit has no such head.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> coin = pc.CircuitGraph()
        >>> _ = coin.add_sum([coin.add_input(0, pc.Bernoulli(), 1, params=[[0.5, 0.5]])], 1)
        >>> print(f"{pc.entropy(pc.Circuit(coin)):.4f}")  # log 2
        0.6931
    """
    check_type("entropy: circuit", circuit, Circuit)
    terms = [
        _entropies(group, circuit.engine.dense(number, table))
        for number, (group, table) in enumerate(zip(circuit.plan.groups, circuit.probabilities(), strict=True))
    ]
    return _sum_over_rows(circuit, head, terms)


@torch.no_grad()
def kl(p: Circuit, q: Circuit, head: int | Tensor = 0) -> Tensor:
    r"""KL(p || q) of the joint distributions of x and latents in nats, exact; an upper bound of that of x alone.

    Infinite where p gives weight to what has none in q, as after pruning q.

    Args:
        p: a circuit.
        q: one of the same structure: the same nodes, edges between them and ties. Pruned edges (masks) may differ.
        head: an int; for a batch of circuits also int64 (G,), a head for each.

    Returns:
        A number; for a batch of circuits (G,).

    Raises:
        ValueError: graphs in place of circuits, the structures differ, or a circuit has no such head.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> coins = []
        >>> for heads in (0.5, 0.9):
        ...     coins.append(pc.CircuitGraph())
        ...     _ = coins[-1].add_sum([coins[-1].add_input(0, pc.Bernoulli(), 1, params=[[1 - heads, heads]])], 1)
        >>> print(f"{pc.kl(*map(pc.Circuit, coins)):.4f}")
        0.5108
    """
    check_type("kl: p", p, Circuit)
    check_type("kl: q", q, Circuit)
    _check_same(p, q)
    p, q = _all_dense(p), _all_dense(q)  # else their nodes may be grouped differently
    tables = zip(p.plan.groups, p.probabilities(), q.probabilities(), strict=True)
    return _sum_over_rows(p, head, [_divergences(group, first, second.to(first)) for group, first, second in tables])


def _all_dense(circuit: Circuit) -> Circuit:
    if all(group.edges is None for group in circuit.plan.groups):
        return circuit
    return type(circuit)(circuit.to_graph(), layout="dense").to(circuit.device)


def _sum_over_rows(circuit: Circuit, head: int | Tensor, terms_PK: list[Tensor]) -> Tensor:
    """The sum over all units of TD(n) times their terms, by circuit."""
    share_GH = torch.zeros_like(circuit.engine.roots, dtype=circuit.dtype)
    per_circuit = head.view(-1, 1) if isinstance(head, Tensor) and circuit.batched else head
    index_G1 = head_index(circuit.engine, per_circuit, 1)
    lacking = circuit.engine.roots.gather(1, index_G1)[:, 0] == LOG_ZERO
    if bool(lacking.any()):
        raise ValueError(f"head: circuits {lacking.nonzero()[:, 0].tolist()[:8]} of the batch lack the one asked for")
    reached = circuit.engine.top_down(circuit.probabilities(), share_GH.scatter_(1, index_G1, 1.0))
    out_G = share_GH.new_zeros(circuit.num_circuits)
    for group, term_PK, reached_PK in zip(circuit.plan.groups, terms_PK, reached, strict=True):
        owner = torch.tensor([g for g, _ in group.owners], device=out_G.device)
        out_G.index_add_(0, owner, torch.where(reached_PK > 0, reached_PK * term_PK, 0.0).sum(1))
    return out_G if circuit.batched else out_G[0]


def _entropies(group: ParameterGroup, table: Tensor) -> Tensor:
    """The entropy of every unit, (P, K)."""
    if isinstance(group.distribution, Gaussian):
        return table[..., 1].log() + 0.5 * math.log(2 * math.pi * math.e)
    weight = _probabilities(group.distribution, table)
    return -torch.special.xlogy(weight, weight).sum(-1)


def _divergences(group: ParameterGroup, first: Tensor, second: Tensor) -> Tensor:
    """KL(first || second) of every unit, (P, K)."""
    if isinstance(group.distribution, Gaussian):
        ratio = first[..., 1] / second[..., 1]
        distance = (first[..., 0] - second[..., 0]) / second[..., 1]
        return 0.5 * (ratio.square() + distance.square() - 1) - ratio.log()
    weight, other = (_probabilities(group.distribution, table) for table in (first, second))
    return (torch.special.xlogy(weight, weight) - torch.special.xlogy(weight, other)).sum(-1)


def _probabilities(distribution: Distribution | None, table: Tensor) -> Tensor:
    return table if distribution is None else distribution.probabilities(table)


def _check_same(p: Circuit, q: Circuit) -> None:
    if p.batched != q.batched or p.num_circuits != q.num_circuits:
        raise ValueError(f"kl: got {p.num_circuits} and {q.num_circuits}, expected two circuits of one structure")
    for g, (first, second) in enumerate(zip(p.structures, q.structures, strict=True)):
        if len(first.nodes) != len(second.nodes) or first.root != second.root:
            raise ValueError(
                f"kl: circuits {g} differ in structure: {len(first.nodes)} and {len(second.nodes)} nodes, roots "
                f"{first.root} and {second.root}; p and q have to come from one graph"
            )
        for index in range(len(first.nodes)):
            if not _agree(first, second, index):
                raise ValueError(f"kl: circuits {g} differ in node {index}; p and q have to come from one graph")


def _agree(first: CircuitGraph, second: CircuitGraph, index: int) -> bool:
    a, b = first.nodes[index], second.nodes[index]
    units_agree = (a.units is None) == (b.units is None)
    if a.units is not None and b.units is not None:
        units_agree = torch.equal(a.units.cpu(), b.units.cpu())
    names = ("kind", "num_units", "children", "variable", "distribution", "tied_to")
    return units_agree and all(getattr(a, name) == getattr(b, name) for name in names)

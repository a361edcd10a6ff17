"""Small circuits of every structure. Every builder takes a leaf and a number of heads, and draws from the global
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import lvd_lightning.circuits as pc

__all__ = ["ALL", "COMPOSED", "KRONECKER", "STRUCTURES"]


Builder = Callable[[pc.Distribution, int], pc.CircuitGraph]
CHAIN, STAR, BUSH = [-1, 0, 1, 2], [1, -1, 1, 1], [2, 2, -1, 2, 0]


def _hclt(parents: list[int], num_latents: int) -> Builder:
    return lambda leaf, heads: pc.hclt(torch.tensor(parents), num_latents=num_latents, leaf=leaf, num_heads=heads)


def _sparse_hclt(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """Structural zeros, among them a unit of a latent that no edge leads to."""
    graph = pc.hclt(torch.tensor(CHAIN), num_latents=3, leaf=leaf, num_heads=heads)
    for index, node in enumerate(graph.nodes):
        if node.kind == "sum":
            node.mask = torch.rand(node.weight.shape) < 0.6
            node.mask[:, index % node.mask.shape[1]] = True
            if index != graph.root:
                node.mask[:, (index + 1) % node.mask.shape[1]] = False
            node.weight = node.weight * node.mask / (node.weight * node.mask).sum(1, keepdim=True)
    return graph


def _shared_dag(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """Two decompositions that share a sum and an input node, ragged widths, explicit units, masks."""
    graph = pc.CircuitGraph()
    leaves = [graph.add_input(v, leaf, units) for v, units in enumerate((3, 2, 2, 3))]
    p01 = graph.add_product(leaves[:2], torch.tensor([[0, 0], [1, 1], [2, 1], [2, 0]]))
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 0, 1]]).bool()
    s01 = graph.add_sum([p01], 3, mask=mask)
    p23 = graph.add_product(leaves[2:], torch.tensor([[0, 0], [1, 2]]))
    s23 = graph.add_sum([p23], 2)
    other = graph.add_input(2, leaf, 2)
    p012 = graph.add_product([s01, other], torch.tensor([[2, 1], [0, 0], [1, 1]]))
    s012 = graph.add_sum([p012], 2)
    left = graph.add_product([s01, s23], torch.tensor([[0, 0], [1, 1], [2, 0]]))
    right = graph.add_product([s012, leaves[3]], torch.tensor([[0, 1], [1, 0]]))
    graph.root = graph.add_sum([left, right], heads)
    graph.latents = {0: p01, 1: p012, 2: left}
    return graph


def _tied_chain(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """A homogeneous hidden Markov model of length 4: one emission and one transition matrix."""
    graph = pc.CircuitGraph()
    emission = graph.add_input(3, leaf, 2)
    below, transition = emission, None
    for v in (2, 1, 0):
        step = graph.add_sum([below], 2, tied_to=transition)
        transition = step if transition is None else transition
        below = graph.add_product([step, graph.add_input(v, leaf, 2, tied_to=emission)])
        graph.latents[v] = below
    graph.root = graph.add_sum([below], heads)
    return graph


def _ragged(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """Two binary trees of regions; so many different widths that unequal nodes share a folded layer."""
    graph = pc.CircuitGraph()

    def two_edges(children: list[int], num_units: int) -> int:
        width = sum(graph.nodes[child].num_units for child in children)
        mask = torch.zeros(num_units, width, dtype=torch.bool)
        for row in mask:
            row[torch.randperm(width)[:2]] = True
        return graph.add_sum(children, num_units, mask=mask)

    tops = []
    for regions, wide in (((0, 1, 2, 3), 0), ((0, 2, 1, 3), 4)):
        sums = [two_edges([graph.add_input(v, leaf, wide + i + 1)], 9 - wide - i) for i, v in enumerate(regions)]
        pairs = []
        for a, b in ((0, 1), (2, 3)):
            units = torch.stack([torch.randint(0, 9 - wide - i, (3 + wide + b,)) for i in (a, b)], 1)
            pairs.append(two_edges([graph.add_product([sums[a], sums[b]], units)], 10 - wide + a))
        tops.append(graph.add_product(pairs, torch.tensor([[0, 0], [5, 6], [3, 1]])[: 2 + wide // 4]))
    graph.latents = {0: tops[0], 1: tops[1]}
    graph.root = graph.add_sum(tops, heads)
    return graph


def _rat_spn(num_vars: int, **settings: Any) -> Builder:
    return lambda leaf, heads: pc.rat_spn(num_vars, leaf=leaf, num_heads=heads, **settings)


def _poon_domingos(shape: tuple[int, int, int], **settings: Any) -> Builder:
    return lambda leaf, heads: pc.poon_domingos(shape, leaf=leaf, num_heads=heads, **settings)


def _hmm(length: int, num_states: int, homogeneous: bool) -> Builder:
    return lambda leaf, heads: pc.hmm(length, num_states, leaf=leaf, homogeneous=homogeneous, num_heads=heads)


def _trees(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """Two hidden Chow-Liu trees of different shapes, one of them with two heads."""
    parts = [_hclt(CHAIN, 2)(leaf, 2), _hclt(STAR, 2)(leaf, 1)]
    return pc.mixture(parts, num_heads=heads)


def _mixed(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """A mixture of a homogeneous hidden Markov model and a RAT-SPN, which share nothing but the variables."""
    parts = [
        _hmm(4, 2, homogeneous=True)(leaf, 1),
        _rat_spn(4, depth=1, num_repetitions=2, num_sums=2, num_leaves=2)(leaf, 1),
    ]
    return pc.mixture(parts, num_heads=heads)


def _leaf_circuits(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """A tree over two latents, each with a RAT-SPN below: of three and of two variables, a head for every state."""
    graph = pc.CircuitGraph()
    wide = pc.rat_spn(3, depth=2, num_repetitions=2, num_sums=2, num_leaves=2, leaf=leaf, num_heads=2)
    small = pc.rat_spn(
        2, depth=1, num_repetitions=1, num_sums=2, num_leaves=2, leaf=leaf, num_heads=3, product="kronecker"
    )
    first, second = graph.embed(wide, [4, 0, 2]), graph.embed(small, [1, 3])
    graph.latents = {1: graph.add_product([second])}
    graph.latents[0] = graph.add_product([first, graph.add_sum([graph.latents[1]], 2)])
    graph.root = graph.add_sum([graph.latents[0]], heads)
    return graph


def _embedded(leaf: pc.Distribution, heads: int) -> pc.CircuitGraph:
    """Two products over one embedded circuit, whose heads they share, and different circuits over the rest."""
    graph = pc.CircuitGraph()
    shared = graph.embed(_hclt([-1, 0], 2)(leaf, 2), [2, 0], latents=0)
    model = graph.embed(_hmm(2, 2, homogeneous=True)(leaf, 2), [1, 3], latents=2)
    apart = graph.add_product([graph.add_input(v, leaf, 3) for v in (3, 1)])
    tops = [
        graph.add_product([shared, model]),
        graph.add_product([shared, apart], torch.tensor([[0, 1], [1, 2], [1, 0]])),
    ]
    graph.latents.update({4: tops[0], 5: tops[1]})
    graph.root = graph.add_sum(tops, heads)
    return graph


STRUCTURES: dict[str, Builder] = {
    "chain": _hclt(CHAIN, 3),
    "star": _hclt(STAR, 3),
    "bush": _hclt(BUSH, 2),
    "pair": _hclt([-1, 0], 4),
    "single": _hclt([-1], 3),
    "sparse": _sparse_hclt,
    "shared": _shared_dag,
    "tied": _tied_chain,
    "ragged": _ragged,
}
RAT, PD, WIDTHS = {"num_repetitions": 2, "num_sums": 2}, {"delta": 1}, {"num_sums": 2, "num_leaves": 3}
#: With one discrete leaf each, and a density where one is named: what these add is structure.
COMPOSED: dict[str, tuple[Builder, tuple[str, ...]]] = {
    "rat": (_rat_spn(4, depth=2, num_leaves=2, **RAT), ("categorical", "gaussian")),
    "rat-widths": (_rat_spn(5, depth=1, num_repetitions=3, **WIDTHS), ("bernoulli",)),
    "rat-kronecker": (_rat_spn(4, depth=2, num_leaves=2, **RAT, product="kronecker"), ("bernoulli", "gaussian")),
    "rectangles": (_poon_domingos((2, 2, 1), num_units=2, **PD), ("categorical",)),
    "rectangles-kronecker": (_poon_domingos((1, 3, 1), num_units=2, **PD, product="kronecker"), ("categorical",)),
    "hmm": (_hmm(4, 2, homogeneous=False), ("categorical",)),
    "homogeneous": (_hmm(5, 2, homogeneous=True), ("bernoulli", "gaussian")),
    "trees": (_trees, ("categorical",)),
    "mixed": (_mixed, ("bernoulli",)),
    "leaf-circuits": (_leaf_circuits, ("bernoulli",)),
    "embedded": (_embedded, ("categorical", "gaussian")),
}
ALL = STRUCTURES | {name: build for name, (build, _) in COMPOSED.items()}
#: Growth is not defined for these.
KRONECKER = frozenset({"rat-kronecker", "rectangles-kronecker", "leaf-circuits"})

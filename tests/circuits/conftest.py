"""Small circuits of every structure, and their mathematics by enumeration in NumPy.

An induced tree picks one child at every sum it reaches and all children at every product: a joint state of the latent
variables. Log-likelihoods, posteriors, flows and maxima are sums and maxima over the list of all induced trees, which
shares no code and no recursion with the engine.

Shapes: B examples, D variables, T induced trees, H heads, K units, G circuits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

import lvd_lightning.circuits as pc

Array = NDArray[Any]
Flows = dict[int, Array]
Builder = Callable[[pc.Distribution, int], pc.CircuitGraph]


# Inputs whose parameters are not probabilities.


def is_table(node: pc.Node) -> bool:
    """Sums and categories: parameters are probabilities, and a row of flows says all."""
    return node.kind == "sum" or isinstance(node.distribution, pc.Categorical)


def logistic_edges(values: Array, mean: Array, scale: Array, num_values: int) -> tuple[Array, Array]:
    """Standardised edges of the bins of some values; those of the first and last value are infinite."""
    low = np.where(values > 0, values - 0.5, -np.inf)
    high = np.where(values < num_values - 1, values + 0.5, np.inf)
    return (low - mean) / scale, (high - mean) / scale


def table_of(distribution: pc.Distribution, params: Array) -> Array:
    """p(value | unit) of all values of a discrete distribution, shape (K, C)."""
    if isinstance(distribution, pc.Binomial):
        return stats.binom.pmf(np.arange(distribution.total + 1), distribution.total, params)
    if isinstance(distribution, pc.DiscretizedLogistic):
        values = np.arange(distribution.num_values)
        low, high = logistic_edges(values, params[:, :1], params[:, 1:], len(values))
        return np.where(
            low > 0, stats.logistic.sf(low) - stats.logistic.sf(high), special.expit(high) - special.expit(low)
        )
    return params


def functions_of(distribution: pc.Distribution, params: Array, x: Array) -> Array:
    """The functions of x (B,) whose sums an M-step needs, shape (T - 1, B); `params` of one unit.

    A logistic variable y is normal with a random precision r / scale^2: expectations of (r, r y, r y^2) given the bin
    of y. E[r | y] is -f'(z) / (z f(z)) for the density f of z, so those of r z and r z^2 are integrals of -f' and
    -z f' over the bin; that of r is replaced by a bound, its value at the z of the bin next to 0.
    """
    if isinstance(distribution, pc.Binomial):
        return np.stack([x])
    if isinstance(distribution, pc.Gaussian):
        return np.stack([x, x**2])
    mean, scale = params
    low, high = logistic_edges(x, mean, scale, distribution.num_values)
    mass = table_of(distribution, params[None])[0][x.astype(int)]
    at_low, at_high = stats.logistic.pdf(low), stats.logistic.pdf(high)
    times_low, times_high = (np.where(np.isfinite(z), z, 0) * f for z, f in ((low, at_low), (high, at_high)))
    first, second = (at_low - at_high) / mass, 1 + (times_low - times_high) / mass
    nearest = np.clip(0, low, high)
    bound = np.where(nearest == 0, 0.5, np.tanh(nearest / 2) / np.where(nearest == 0, 1, nearest))
    return np.stack(
        [bound, mean * bound + scale * first, mean**2 * bound + 2 * mean * scale * first + scale**2 * second]
    )


def expectations(distribution: pc.Distribution, params: Array) -> Array:
    """What `functions_of` are on average, shape (K, T - 1)."""
    if isinstance(distribution, pc.Binomial):
        return distribution.total * params
    mean, spread = params.T
    if isinstance(distribution, pc.Gaussian):
        return np.stack([mean, spread**2 + mean**2], 1)
    precision = 3.5 * special.zeta(3) / np.pi**2
    return np.stack([np.full_like(mean, precision), precision * mean, precision * mean**2 + spread**2], 1)


def most_likely(distribution: pc.Distribution, moments: Array) -> Array:
    """The parameters under which these expectations are most likely, within their bounds."""
    if isinstance(distribution, pc.Binomial):
        return np.clip(moments / distribution.total, distribution.min_prob, 1 - distribution.min_prob)
    if isinstance(distribution, pc.Gaussian):
        mean = moments[:, 0]
        return np.stack([mean, np.sqrt(np.maximum(moments[:, 1] - mean**2, distribution.min_std**2))], 1)
    mean = np.clip(moments[:, 1] / moments[:, 0], -distribution.num_values, 2 * distribution.num_values)
    variance = moments[:, 2] - 2 * mean * moments[:, 1] + mean**2 * moments[:, 0]
    scale = np.sqrt(np.maximum(variance, 0))
    return np.stack([mean, np.clip(scale, distribution.min_scale, 100 * distribution.num_values)], 1)


class Reference:
    """A circuit as the list of its induced trees, with parameters of its own that its M-steps change."""

    def __init__(self, graph: pc.CircuitGraph) -> None:
        self.nodes = graph.nodes
        self.num_heads = graph.num_heads
        self.root = graph.root
        self.owner = [index if node.tied_to is None else node.tied_to for index, node in enumerate(graph.nodes)]
        self.params: dict[int, Array] = {}
        self.live: dict[int, Array] = {}
        for index, node in enumerate(graph.nodes):
            tensor = node.weight if node.kind == "sum" else node.params
            if tensor is not None and node.tied_to is None:
                self.params[index] = tensor.detach().double().numpy().copy()
                self.live[index] = np.ones(tensor.shape) if node.mask is None else node.mask.double().numpy()
        memo: dict[tuple[int, int], list[dict[int, tuple[int, int]]]] = {}
        self.trees = [self._expand(graph.root, head, memo) for head in range(graph.num_heads)]

    def _expand(self, index: int, unit: int, memo: dict) -> list[dict[int, tuple[int, int]]]:
        """All induced trees below a unit: node -> (unit, column of the chosen edge or -1)."""
        if (index, unit) in memo:
            return memo[index, unit]
        node = self.nodes[index]
        if node.kind == "input":
            trees = [{index: (unit, -1)}]
        elif node.kind == "product":
            units = [unit] * len(node.children) if node.units is None else node.units[unit].tolist()
            below = [self._expand(child, u, memo) for child, u in zip(node.children, units, strict=True)]
            trees = [{k: v for part in parts for k, v in part.items()} for parts in itertools.product(*below)]
            trees = [tree | {index: (unit, -1)} for tree in trees]
        else:
            ends = [(child, u) for child in node.children for u in range(self.nodes[child].num_units)]
            columns = np.flatnonzero(self.live[self.owner[index]][unit])
            trees = [t | {index: (unit, int(c))} for c in columns for t in self._expand(*ends[c], memo)]
        memo[index, unit] = trees
        return trees

    def tree_weights(self, head: int) -> Array:
        """Product of the edge weights of every induced tree, shape (T,)."""
        weights = np.ones(len(self.trees[head]))
        for t, tree in enumerate(self.trees[head]):
            for index, (unit, column) in tree.items():
                if column >= 0:
                    weights[t] *= self.params[self.owner[index]][unit, column]
        return weights

    def joint(self, x: Any, observed: Any = None, *, head: int = 0, maximise: bool = False) -> Array:
        """p(observed part of x, induced tree) with shape (B, T); `maximise`: unobserved leaves at their modes."""
        x = np.asarray(x)
        observed = np.ones(x.shape[:2], bool) if observed is None else np.asarray(observed)
        leaves = {i: self._leaf(i, x, observed, maximise) for i, node in enumerate(self.nodes) if node.kind == "input"}
        joint = np.repeat(self.tree_weights(head)[None], len(x), 0)
        for t, tree in enumerate(self.trees[head]):
            for index, (unit, _) in tree.items():
                if index in leaves:
                    joint[:, t] *= leaves[index][:, unit]
        return joint

    def _leaf(self, index: int, x: Array, observed: Array, maximise: bool) -> Array:
        """Likelihoods of a node's units with shape (B, K), ones (or the modes') where the variable is not observed."""
        node = self.nodes[index]
        value = x[:, node.variable]
        if node.distribution.is_evidence:
            seen, rest = np.exp(value), np.ones(node.num_units)
        elif isinstance(node.distribution, pc.Gaussian):
            mean, std = self.params[self.owner[index]].T
            seen = np.exp(-0.5 * ((value[:, None] - mean) / std) ** 2) / (std * np.sqrt(2 * np.pi))
            rest = 1 / (std * np.sqrt(2 * np.pi))
        else:
            probs = table_of(node.distribution, self.params[self.owner[index]])
            seen, rest = probs.T[np.where(observed[:, node.variable], value, 0).astype(int)], probs.max(1)
        return np.where(observed[:, node.variable, None], seen, rest if maximise else 1.0)

    def log_prob(self, x: Any, observed: Any = None) -> Array:
        """Log-likelihoods of all heads, shape (B, H)."""
        with np.errstate(divide="ignore"):
            heads = [np.log(self.joint(x, observed, head=head).sum(1)) for head in range(self.num_heads)]
        return np.stack(heads, 1)

    def posterior(self, index: int, x: Any, observed: Any = None, *, head: int = 0) -> Array:
        """p(node reached, in its unit k | observed part of x), shape (B, K)."""
        joint = self.joint(x, observed, head=head)
        out = np.zeros((len(joint), self.nodes[index].num_units))
        for t, tree in enumerate(self.trees[head]):
            if index in tree:
                out[:, tree[index][0]] += joint[:, t]
        return out / joint.sum(1, keepdims=True)

    def log_max(self, x: Any, observed: Any = None, *, head: int = 0) -> Array:
        """log max over the induced trees and the values of the unobserved variables, shape (B,)."""
        return np.log(self.joint(x, observed, head=head, maximise=True).max(1))

    def flows(self, x: Any, head_weights: Any, observed: Any = None) -> Flows:
        """Flow of every edge, of every category of a table, and for other inputs sums of 1 and of `functions_of`."""
        x, head_weights = np.asarray(x), np.asarray(head_weights)
        observed = np.ones(x.shape[:2], bool) if observed is None else np.asarray(observed)
        flows = {i: np.zeros((len(p), self._num_sums(i))) for i, p in self.params.items()}
        at_inputs: dict[tuple[int, int], Array] = {}
        for head in range(self.num_heads):
            joint = self.joint(x, observed, head=head)
            total = joint.sum(1)  # an impossible example has no flow
            share = joint * (head_weights[:, head] * (total > 0) / np.where(total > 0, total, 1))[:, None]
            for t, tree in enumerate(self.trees[head]):
                for index, (unit, column) in tree.items():
                    if column >= 0:
                        flows[self.owner[index]][unit, column] += share[:, t].sum()
                    elif self.owner[index] in flows:
                        at_inputs[index, unit] = at_inputs.get((index, unit), 0.0) + share[:, t]
        for (index, unit), share in at_inputs.items():
            self._count(flows[self.owner[index]][unit], index, unit, x, observed, share)
        return flows

    def _count(self, out: Array, index: int, unit: int, x: Array, observed: Array, share: Array) -> None:
        """Add the sums of an input unit that has these shares of the examples."""
        node = self.nodes[index]
        seen = observed[:, node.variable]
        value, share = x[seen, node.variable], share[seen]
        if is_table(node):
            np.add.at(out, value.astype(int), share)
        else:
            functions = functions_of(node.distribution, self.params[self.owner[index]][unit], value)
            out += [share.sum(), *functions @ share]

    def top_down(self, head_share: Array) -> Flows:
        """Probability of reaching each unit of the parameters' owners from heads with these shares, shape (K,)."""
        reached = {index: np.zeros(len(params)) for index, params in self.params.items()}
        for head in range(self.num_heads):
            for tree, weight in zip(self.trees[head], self.tree_weights(head) * head_share[head], strict=True):
                for index, (unit, _) in tree.items():
                    if self.owner[index] in reached:
                        reached[self.owner[index]][unit] += weight
        return reached

    def em_step(self, flows: Flows, lr: float, pseudocount: float) -> None:
        """The mini-batch rule: parameters move towards those that the flows of this batch alone would give."""
        for index, flow in flows.items():
            total, statistics = self._totals(index, flow)
            moments, prior = self._moments(index), self._prior(index)
            target = (statistics + pseudocount * prior) / np.where(total > 0, total + pseudocount, 1)
            self._set(index, np.where(total > 0, (1 - lr) * moments + lr * target, moments), total > 0)

    def _num_sums(self, index: int) -> int:
        return self.params[index].shape[1] if is_table(self.nodes[index]) else 1 + self._moments(index).shape[1]

    def _totals(self, index: int, flow: Array) -> tuple[Array, Array]:
        """Flow of each unit, shape (K, 1), and the sums that expectation parameters are blended with."""
        if is_table(self.nodes[index]):
            return flow.sum(1, keepdims=True), flow
        return flow[:, :1], flow[:, 1:]

    def _moments(self, index: int) -> Array:
        """Expectation parameters: the probabilities themselves, or the expectations of `functions_of`."""
        params = self.params[index]
        return params if is_table(self.nodes[index]) else expectations(self.nodes[index].distribution, params)

    def _prior(self, index: int) -> Array:
        """What one pseudo-sample adds: the live edges evenly, or an input's current expectations."""
        if not is_table(self.nodes[index]):
            return self._moments(index)
        return self.live[index] / self.live[index].sum(1, keepdims=True)

    def _set(self, index: int, moments: Array, moved: Array) -> None:
        if not is_table(self.nodes[index]):
            moments = most_likely(self.nodes[index].distribution, moments)
        self.params[index] = np.where(moved, moments, self.params[index])


class AnemoneReference:
    """Anemone (arXiv 2505.19982) on the circuits of one folded batch, in expectation parameters."""

    def __init__(self, references: list[Reference], lr: float, momentum: float, pseudocount: float) -> None:
        self.references, self.lr, self.momentum, self.pseudocount = references, lr, momentum, pseudocount
        self.steps = 0
        self.average: list[Flows] = [{} for _ in references]
        self.root_flow = [np.zeros(reference.num_heads) for reference in references]

    def step(self, flows: list[Flows], root_flows: list[Array]) -> None:
        """One update from the flows of a batch and the flows of the heads, per circuit."""
        self.steps += 1
        m, correction = self.momentum, 1 - self.momentum**self.steps
        for g, batch in enumerate(flows):
            self.average[g] = {i: m * self.average[g].get(i, 0.0) + (1 - m) * flow for i, flow in batch.items()}
            self.root_flow[g] = m * self.root_flow[g] + (1 - m) * root_flows[g]
        total = sum(root.sum() for root in self.root_flow) / correction
        for g, reference in enumerate(self.references):
            reached = reference.top_down(self.root_flow[g] / correction / total)
            for index, flow in self.average[g].items():
                self._update(reference, index, flow / correction, reached[index][:, None], total)

    def _update(self, reference: Reference, index: int, flow: Array, reached: Array, total: float) -> None:
        unit_flow, statistics = reference._totals(index, flow)
        moments = reference._moments(index)
        new = self.lr / total * statistics + (1 - self.lr) * reached * moments
        new_unit = self.lr / total * unit_flow + (1 - self.lr) * reached
        denominator = total * new_unit + self.pseudocount
        target = (total * new + self.pseudocount * reference._prior(index)) / np.where(unit_flow > 0, denominator, 1)
        reference._set(index, np.where(unit_flow > 0, target, moments), unit_flow > 0)


# Structures. Every builder takes a leaf and a number of heads; drawing is seeded by the fixture.

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
# A floor that EM reaches, yet wide enough for the reference's linear densities.
LEAVES = {"categorical": pc.Categorical(3), "bernoulli": pc.Bernoulli(), "gaussian": pc.Gaussian(min_std=0.3)}
# Leaves that meet some structures only, which saves time: a tree, shared and tied nodes, padded layers.
LEAVES |= {"binomial": pc.Binomial(2), "logistic": pc.DiscretizedLogistic(3, min_scale=0.2), "mixed": pc.Gaussian()}
SOME = {"binomial": ("star", "tied", "ragged"), "logistic": ("star", "shared", "tied"), "mixed": ("chain", "shared")}
MIXTURE = (pc.Categorical(4), pc.Binomial(5), pc.Gaussian(min_std=0.3), pc.DiscretizedLogistic(6))


def mix(graph: pc.CircuitGraph) -> pc.CircuitGraph:
    """Give every variable a family of its own; of a graph without tied inputs."""
    for node in graph.nodes:
        if node.kind == "input":
            node.distribution = MIXTURE[node.variable]
            node.params = node.distribution.initial(node.num_units)
    return graph


def draw_values(distribution: pc.Distribution, number: int) -> Tensor:
    """Values of one variable, (number,)."""
    if isinstance(distribution, pc.Gaussian):
        return torch.randn(number)
    return torch.randint(0, num_values(distribution), (number,)).to(torch.get_default_dtype())


def num_values(distribution: pc.Distribution) -> int:
    """How many values a discrete variable has."""
    return len(table_of(distribution, distribution.initial(1).double().numpy())[0])


@dataclass
class Case:
    """A circuit, its enumeration, and examples: all worlds of discrete variables, or random rows."""

    graph: pc.CircuitGraph
    circuit: pc.Circuit
    reference: Reference
    x: Tensor
    observed: Tensor


def make_case(structure: str, leaf: str, num_heads: int, seed: int = 0) -> Case:
    """Build a case; masks hold a row with nothing and one with everything observed."""
    torch.manual_seed(seed)
    distribution = LEAVES[leaf]
    graph = ALL[structure](distribution, num_heads)
    if leaf == "mixed":
        mix(graph)
    num_vars = graph.num_variables
    families = {node.variable: node.distribution for node in graph.nodes if node.kind == "input"}
    for node in graph.nodes:  # distinct spreads: the initial ones are all alike
        if isinstance(node.distribution, pc.Gaussian | pc.DiscretizedLogistic) and node.tied_to is None:
            node.params[:, 1] = 0.5 + torch.rand(node.num_units)
    if leaf in ("gaussian", "mixed"):
        x = torch.stack([draw_values(families[v], 12) for v in range(num_vars)], 1)
    else:
        values = torch.arange(num_values(distribution))
        x = torch.cartesian_prod(*[values] * num_vars).view(-1, num_vars)
    observed = torch.rand(x.shape) < 0.6
    observed[0], observed[-1] = False, True
    return Case(graph, pc.Circuit(graph), Reference(graph), x, observed)


def _cases(leaves: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[Any]:
    """Pairs of structure and leaf; one, two and three heads in turn."""
    names = itertools.product(enumerate(STRUCTURES), enumerate(leaves))
    cases = [
        (structure, leaf, 1 + (i + j) % 3)
        for (i, structure), (j, leaf) in names
        if structure in SOME.get(leaf, STRUCTURES)
    ]
    for i, (structure, (_, some)) in enumerate(COMPOSED.items()):
        cases += [(structure, leaf, 1 + (i + j) % 3) for j, leaf in enumerate(some) if leaf in leaves]
    return [pytest.param(found, id="{}-{}-{}heads".format(*found)) for found in cases if found[0] not in skip]


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    """Correctness is judged in float64; a test of float32 asks for it."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(params=_cases(tuple(LEAVES)))
def case(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """Every structure with tables and Gaussians, or those that are listed with it; some with every other leaf."""
    return make_case(*request.param)


@pytest.fixture(params=_cases(tuple(LEAVES), skip=KRONECKER))
def growing(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """As `case`, without Kronecker products."""
    return make_case(*request.param)


@pytest.fixture(params=sorted(KRONECKER))
def kronecker(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """Structures with Kronecker products, two heads."""
    return make_case(request.param, "bernoulli", 2)


@pytest.fixture(params=_cases(("categorical", "bernoulli", "binomial", "logistic")))
def discrete(request: pytest.FixtureRequest, double_precision: None) -> Case:
    """The same with leaves whose worlds can be listed."""
    return make_case(*request.param)


@pytest.fixture
def build_case(double_precision: None) -> Callable[..., Case]:
    """`make_case(structure, leaf, num_heads, seed)` for tests that choose."""
    return make_case


@pytest.fixture
def enumerate_trees() -> type[Reference]:
    """The reference, for circuits that a test builds itself."""
    return Reference


@pytest.fixture
def anemone_reference() -> type[AnemoneReference]:
    """Anemone in NumPy."""
    return AnemoneReference

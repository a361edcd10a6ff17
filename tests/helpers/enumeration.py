"""The mathematics of small circuits by enumeration in NumPy.

An induced tree picks one child at every sum it reaches and all children at every product: a joint state of the latent
variables. Log-likelihoods, posteriors, flows and maxima are sums and maxima over the list of all induced trees, which
shares no code and no recursion with the engine.

Shapes: B examples, D variables, T induced trees, H heads, K units, G circuits.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

import lvd_lightning.circuits as pc
from helpers.families import expectations, functions_of, is_table, most_likely, prior_counts, table_of

__all__ = ["AnemoneReference", "Flows", "Reference"]

Array = NDArray[Any]
Flows = dict[int, Array]


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
            added = prior_counts(self.nodes[index].distribution, statistics)
            total, statistics = total + added.sum(1, keepdims=True), statistics + added
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
        added = prior_counts(reference.nodes[index].distribution, statistics)
        added_sum = added.sum(1, keepdims=True)
        unit_flow, statistics, reached = unit_flow + added_sum, statistics + added, reached + added_sum / total
        new = self.lr / total * statistics + (1 - self.lr) * reached * moments
        new_unit = self.lr / total * unit_flow + (1 - self.lr) * reached
        denominator = total * new_unit + self.pseudocount
        target = (total * new + self.pseudocount * reference._prior(index)) / np.where(unit_flow > 0, denominator, 1)
        reference._set(index, np.where(unit_flow > 0, target, moments), unit_flow > 0)

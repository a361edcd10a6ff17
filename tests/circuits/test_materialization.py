"""Latents made variables: what does not change, what they separate, and the closed form that they allow."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

CHAIN, STAR = [-1, 0, 1], [1, -1, 1]
LEAF = pc.Categorical(3)


def every_latent(graph: pc.CircuitGraph) -> list[frozenset[int]]:
    scopes = graph.scopes()
    return [scopes[node] for node in graph.latents.values()]


def two_trees(num_heads: int = 1) -> pc.CircuitGraph:
    """Trees of other shapes under one root."""
    return pc.mixture([pc.hclt(CHAIN, 2, LEAF, num_heads=2), pc.hclt([2, 2, -1], 2, LEAF)], num_heads=num_heads)


def kronecker() -> pc.CircuitGraph:
    return pc.rat_spn(4, depth=1, num_repetitions=1, num_sums=2, num_leaves=2, leaf=LEAF, product="kronecker")


def top_scopes(graph: pc.CircuitGraph) -> list[frozenset[int]]:
    """Of the root, and of what its first product multiplies."""
    scopes = graph.scopes()
    product = next(node for node in reversed(graph.nodes) if node.kind == "product")
    return list(dict.fromkeys([scopes[graph.root], *(scopes[child] for child in product.children)]))


BUILDS: dict[str, tuple[Callable[[], pc.CircuitGraph], Any]] = {
    "hclt": (lambda: pc.hclt(CHAIN, 2, LEAF), every_latent),
    "hclt-heads": (lambda: pc.hclt(STAR, 2, LEAF, num_heads=3), every_latent),
    "hmm": (lambda: pc.hmm(4, 2, leaf=LEAF), every_latent),
    "hmm-homogeneous": (lambda: pc.hmm(4, 3, leaf=LEAF, homogeneous=True, num_heads=2), every_latent),
    "rat_spn": (lambda: pc.rat_spn(4, depth=2, num_repetitions=1, num_sums=2, num_leaves=3, leaf=LEAF), top_scopes),
    "rat_spn-repetitions": (
        lambda: pc.rat_spn(4, depth=2, num_repetitions=2, num_sums=2, num_leaves=2, leaf=LEAF, num_heads=2),
        lambda graph: [range(4), [2], {0}],
    ),
    "kronecker": (kronecker, top_scopes),
    "poon_domingos": (lambda: pc.poon_domingos((2, 2, 1), num_units=2, delta=1, leaf=LEAF), lambda graph: [range(4)]),
    "poon_domingos-pixel": (
        lambda: pc.poon_domingos((1, 3, 1), num_units=2, delta=1, leaf=LEAF, num_heads=2),
        lambda graph: [[0], [1], [2]],
    ),
    "mixture": (two_trees, lambda graph: [range(3), [1]]),
    "mixture-heads": (lambda: two_trees(2), lambda graph: [[0], [2]]),
}


@pytest.fixture(params=BUILDS)
def built(request: pytest.FixtureRequest, double_precision: None) -> tuple[pc.CircuitGraph, list[list[int]]]:
    build, scopes = BUILDS[request.param]
    graph = build()
    return graph, [sorted(scope) for scope in scopes(graph)]


def all_worlds(sizes: list[int]) -> Tensor:
    return torch.tensor(list(itertools.product(*map(range, sizes))))


def joint_table(circuit: pc.Circuit, head: int) -> Tensor:
    """p(x, z) of all worlds, with an axis for each variable."""
    sizes = [0] * circuit.num_variables
    for node in circuit.structures[0].nodes:
        if node.kind == "input":
            sizes[node.variable] = node.distribution.size
    with torch.no_grad():
        return circuit.log_prob(all_worlds(sizes), head=head).exp().view(sizes)


def test_x_has_the_distribution_that_it_had(built: Any) -> None:
    graph, scopes = built
    circuit = pc.Circuit(pc.materialize(graph, scopes))
    x = all_worlds([3] * graph.num_variables)
    for head in range(graph.num_heads):
        table = joint_table(circuit, head)
        marginal = table.flatten(graph.num_variables).sum(-1).flatten()
        torch.testing.assert_close(marginal, pc.Circuit(graph).log_prob(x, head=head).exp().detach())
        assert table.sum().item() == pytest.approx(1, abs=1e-12)


def test_what_is_inside_a_scope_is_independent_of_the_rest_given_its_state(built: Any) -> None:
    graph, scopes = built
    for head, (number, scope) in itertools.product(range(graph.num_heads), enumerate(scopes)):
        table = joint_table(pc.Circuit(pc.materialize(graph, [scope])), head)
        rest = [v for v in range(graph.num_variables) if v not in scope]
        found = table.permute(graph.num_variables, *scope, *rest)
        found = found.reshape(len(found), 3 ** len(scope), 3 ** len(rest))
        inside, outside, total = found.sum(2, keepdim=True), found.sum(1, keepdim=True), found.sum((1, 2), keepdim=True)
        torch.testing.assert_close(found * total, inside * outside, rtol=1e-9, atol=1e-14)
        assert number < len(scopes)


def test_nested_scopes_separate_together(built: Any) -> None:
    """With all of them at once, each still separates its scope, with its latents inside, from the rest."""
    graph, scopes = built
    size = graph.num_variables
    table = joint_table(pc.Circuit(pc.materialize(graph, scopes)), 0)
    for number, scope in enumerate(scopes):
        inside = [*scope, *(size + i for i, other in enumerate(scopes) if set(other) < set(scope))]
        rest = [v for v in range(table.ndim) if v not in inside and v != size + number]
        found = table.permute(size + number, *inside, *rest)
        found = found.flatten(1 + len(inside)) if rest else found[..., None]
        found = found.flatten(1, len(inside))
        left, right = found.sum(2, keepdim=True), found.sum(1, keepdim=True)
        torch.testing.assert_close(found * found.sum((1, 2), keepdim=True), left * right, rtol=1e-9, atol=1e-14)


def test_the_state_is_that_of_the_latent() -> None:
    graph = pc.hclt(STAR, 3, LEAF)
    circuit, joint = pc.Circuit(graph), pc.Circuit(pc.materialize(graph, every_latent(graph)))
    x = all_worlds([3] * 3)
    for number, name in enumerate(graph.latents):
        rows = torch.cat([x, torch.zeros_like(x)], 1).repeat(3, 1)
        rows[:, 3 + number] = torch.arange(3).repeat_interleave(len(x))
        observed = torch.arange(6) < 3
        observed[3 + number] = True
        found = joint.log_prob(rows, observed=observed.expand(rows.shape)).exp().view(3, -1).T
        posterior = circuit.posterior(x, name)
        torch.testing.assert_close(found, (posterior * circuit.log_prob(x).exp()).detach())
        torch.testing.assert_close(
            joint.posterior(rows[: len(x)], name, observed=observed.expand(27, 6)) > 0.999,
            torch.tensor([True, False, False]).expand(27, 3),
        )


@pytest.mark.parametrize("name", ["hclt", "hclt-heads", "hmm"])
def test_all_latents_leave_no_choice_and_one_step_counts(name: str, enumerate_trees: Any) -> None:
    build, scopes = BUILDS[name]
    graph = pc.materialize(build(), scopes(build()))
    circuit = pc.Circuit(graph)
    table = joint_table(circuit, 0)
    worlds = all_worlds(list(table.shape))
    ways = enumerate_trees(graph).joint(worlds) > 0
    assert int(ways.sum(1).max()) == 1

    xz = circuit.sample(300, head=0, generator=torch.Generator().manual_seed(1))
    optimizer = pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0)
    counted = pc.Circuit(counted_parameters(graph, xz.numpy(), enumerate_trees))
    likelihoods = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = -circuit.log_prob(xz, head=0).sum()
        likelihoods.append(-loss.item())
        loss.backward()
        optimizer.step()
    assert likelihoods[1] > likelihoods[0]
    assert likelihoods[2] == pytest.approx(likelihoods[1], abs=1e-9)
    for found, expected in zip(circuit.tables, counted.tables, strict=True):
        torch.testing.assert_close(found.detach(), expected.detach(), rtol=1e-9, atol=1e-12)


def counted_parameters(graph: pc.CircuitGraph, xz: np.ndarray, enumerate_trees: Any) -> pc.CircuitGraph:
    """The graph with relative frequencies: how often the one tree of each example takes an edge or a value."""
    reference, out = enumerate_trees(graph), copy.deepcopy(graph)
    counts = {index: np.zeros(params.shape) for index, params in reference.params.items()}
    for row, tree in zip(xz, reference.joint(xz).argmax(1), strict=True):
        for index, (unit, column) in reference.trees[0][tree].items():
            if index in counts:
                counts[index][unit, row[graph.nodes[index].variable] if column < 0 else column] += 1
    for index, count in counts.items():
        node = out.nodes[index]
        table = node.weight if node.kind == "sum" else node.params
        seen = count.sum(1) > 0
        table[torch.from_numpy(seen)] = torch.from_numpy(count[seen] / count[seen].sum(1, keepdims=True))
    return out


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_pseudocounts_leave_the_meaning_of_a_state(rule: Any) -> None:
    graph = pc.hclt(CHAIN, 2, LEAF)
    joint = pc.Circuit(pc.materialize(graph, every_latent(graph))).float()
    optimizer = rule(joint, lr=0.5, pseudocount=10.0)
    for _ in range(3):
        optimizer.zero_grad()
        (-joint.log_prob(joint.sample(50))).sum().backward()
        optimizer.step()
    for node in joint.to_graph().nodes:
        if isinstance(node.distribution, pc.Indicator):
            assert torch.equal(node.params.sort()[0], torch.tensor([[0.0, 1.0]] * 2))
        elif node.kind == "input":
            assert (node.params > 0).all()


def test_files_growth_logits_and_masks(tmp_path: Any) -> None:
    graph = pc.hclt(STAR, 2, LEAF)
    joint = pc.Circuit(pc.materialize(graph, every_latent(graph)))
    xz = joint.sample(40)
    assert torch.equal(pc.load(pc.save(joint, tmp_path / "joint")).log_prob(xz), joint.log_prob(xz))
    logits = pc.Circuit(joint.to_graph(), parameterization="logits")
    torch.testing.assert_close(logits.log_prob(xz), joint.log_prob(xz))
    flows = pc.Flows(joint)
    flows.add(xz)
    for edited in (pc.grow(joint, flows, heads=[0], sigma=0.3), pc.prune(joint, flows, threshold=0.01)):
        for node in edited.nodes:
            if isinstance(node.distribution, pc.Indicator):
                assert ((node.params == 0) | (node.params == 1)).all()
    grown = pc.Circuit(pc.grow(joint, flows, heads=[0], sigma=0.0))
    torch.testing.assert_close(grown.log_prob(xz, head=0), joint.log_prob(xz, head=0))


def test_the_graph_stays_as_it_was() -> None:
    graph = pc.hmm(3, 2, leaf=LEAF, homogeneous=True)
    before = copy.deepcopy(graph)
    pc.materialize(graph, [range(3)])
    assert len(graph.nodes) == len(before.nodes)
    assert [node.children for node in graph.nodes] == [node.children for node in before.nodes]
    assert graph.latents == before.latents


def test_a_root_without_a_sum() -> None:
    graph = pc.CircuitGraph()
    graph.add_product([graph.add_input(v, LEAF, 2) for v in range(2)])
    circuit = pc.Circuit(pc.materialize(graph, [range(2), [1]]))
    heads = torch.stack([joint_table(circuit, head).sum((0, 1)) for head in range(2)])
    torch.testing.assert_close(heads, torch.diag_embed(torch.eye(2)))
    single = pc.CircuitGraph()
    single.add_input(0, LEAF, 2)
    found = joint_table(pc.Circuit(pc.materialize(single, [[0]])), 1)
    torch.testing.assert_close(found[:, 1], single.nodes[0].params[1])


def test_what_is_refused() -> None:
    chain = pc.hclt(CHAIN, 2, LEAF)
    two_chains = pc.mixture([chain, pc.hclt([1, 2, -1], 2, LEAF)])
    flat = pc.CircuitGraph()
    leaves = [flat.add_input(v, LEAF, 2) for v in range(3)]
    pair = flat.add_sum([flat.add_product(leaves[:2])], 2)
    flat.add_sum([flat.add_product([pair, leaves[2]]), flat.add_product(leaves)], 1)
    cases: list[tuple[pc.CircuitGraph, Any, str]] = [
        (chain, [[0, 1]], r"scopes\[0\]: no node has exactly the variables \[0, 1\]"),
        (two_chains, [[1, 2]], r"scopes\[0\]: product node \d+ cuts \[1, 2\]: it has a part of it together"),
        (flat, [[2], [0, 1]], r"scopes\[1\]: product node 6 cuts \[0, 1\]: it has its parts together"),
        (pc.CircuitGraph([*flat.nodes[:3]], 2), [[0]], "graph: nodes .* are used by no other node"),
        (chain, [[1, 2], (2, 1)], r"scopes\[1\]: is the same as scopes\[0\]"),
        (chain, [[]], r"scopes\[0\]: expected some of the variables 0..2, got \[\]"),
        (chain, [[3]], r"scopes\[0\]: expected some of the variables 0..2, got \[3\]"),
        (chain, [[0.5]], r"scopes\[0\]: expected some of the variables"),
        (chain, [], "scopes: got .*expected a list of sets of variables"),
        (chain, [0, 1], "scopes: got .*expected a list of sets of variables"),
        (pc.Circuit(chain), [[0]], "graph: got Circuit, expected a CircuitGraph; give its graph"),
        (pc.hclt(CHAIN, 2, pc.SoftEvidence(2)), [[0]], "soft evidence"),
    ]
    for graph, scopes, message in cases:
        with pytest.raises(ValueError, match=message):
            pc.materialize(graph, scopes)


def test_indicators() -> None:
    family = pc.Indicator(3)
    assert torch.equal(family.initial(4), torch.eye(3)[[0, 1, 2, 0]])
    for params in ([[0.5, 0.5, 0.0]], [[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]]):
        with pytest.raises(ValueError, match="a single 1 among zeros"):
            pc.CircuitGraph().add_input(0, family, 1, params=params)

"""Pruning against the enumeration of induced trees: exact zeros, ties, masks, shared nodes, ragged batches."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_structures
from helpers.edits import HCLTS, assert_same, assert_sound, count, dead_units, draw, kronecker_graph, put_zeros
from torch import Tensor

import lvd_lightning.circuits as pc


def kept_edges(reference: Any, x: Tensor, head: Tensor, threshold: float) -> dict[int, np.ndarray]:
    """The rule of pruning, edge by edge, from enumerated flows."""
    kept = {}
    flows = reference.flows(x, torch.eye(reference.num_heads)[head].numpy())
    for index, weight in reference.params.items():
        if reference.nodes[index].kind != "sum":
            continue
        kept[index] = np.zeros(weight.shape, dtype=bool)
        for n, row in enumerate(flows[index]):
            for c, flow in enumerate(row):
                kept[index][n, c] = flow > threshold * len(x)
            if not kept[index][n].any():
                live = np.flatnonzero(reference.live[index][n])
                kept[index][n, max(live, key=lambda c: (row[c], weight[n, c]))] = True
    return kept


def apply_edges(reference: Any, kept: dict[int, np.ndarray]) -> None:
    """Give the reference the renormalised weights of the edges that stay."""
    for index, keep in kept.items():
        weight = reference.params[index] * keep
        reference.params[index] = weight / weight.sum(1, keepdims=True)


def reachable_units(reference: Any, kept: dict[int, np.ndarray]) -> set[tuple[int, int]]:
    """All (node, unit) in an induced tree whose edges all stay."""
    found = set()
    for trees in reference.trees:
        for tree in trees:
            if all(c < 0 or kept[reference.owner[i]][unit, c] for i, (unit, c) in tree.items()):
                found |= {(i, unit) for i, (unit, _) in tree.items()}
    return found


@pytest.mark.parametrize(("threshold", "zeros"), [(0.0, True), (0.05, False)])
def test_pruning_by_the_rule(case: Any, threshold: float, zeros: bool, enumerate_trees: Callable[..., Any]) -> None:
    check_pruning(case, threshold, zeros, enumerate_trees)


@few_structures
@pytest.mark.parametrize(("threshold", "zeros"), [(0.0, False), (0.05, True), (1.0, False), (1.0, True)])
def test_pruning_with_other_settings(
    case: Any, threshold: float, zeros: bool, enumerate_trees: Callable[..., Any]
) -> None:
    check_pruning(case, threshold, zeros, enumerate_trees)


def check_pruning(case: Any, threshold: float, zeros: bool, enumerate_trees: Callable[..., Any]) -> None:
    """What is left is the old circuit with the renormalised weights of the edges that stay, and without dead units.

    Only the last head has examples.
    """
    graph = put_zeros(case.graph) if zeros else case.graph
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    x, head = draw(circuit, [graph.num_heads - 1])
    kept = kept_edges(reference, x, head, threshold)
    apply_edges(reference, kept)
    pruned = pc.prune(circuit, count(circuit, x, head), threshold)
    assert_sound(pruned)
    assert dead_units(pruned) == []
    found = pc.Circuit(pruned).log_prob(case.x)
    torch.testing.assert_close(found.detach(), torch.from_numpy(reference.log_prob(case.x)), rtol=1e-9, atol=1e-10)
    if all(node.tied_to is None for node in graph.nodes):
        expected = reachable_units(reference, kept)
        for kind in ("input", "sum"):
            number = sum(graph.nodes[index].kind == kind for index, _ in expected)
            assert sum(node.num_units for node in pruned.nodes if node.kind == kind) == number


def test_pruning_without_threshold_never_hurts_the_examples(case: Any) -> None:
    circuit = pc.Circuit(put_zeros(case.graph))
    x, head = draw(circuit, range(case.graph.num_heads), number=3)
    pruned = pc.Circuit(pc.prune(circuit, count(circuit, x, head), threshold=0.0))
    before, after = circuit.log_prob(x, head=head), pruned.log_prob(x, head=head)
    assert bool((after >= before - 1e-10).all())
    again = count(pruned, x, head)
    for index, node in enumerate(pruned.structures[0].nodes):
        if node.kind == "sum":
            flow = again.edges(index)
            mask = torch.ones_like(flow, dtype=torch.bool) if node.mask is None else node.mask
            visited = flow.sum(1) > 0
            assert bool((flow > 0)[visited][mask[visited]].all())


def test_zero_weights_go_without_a_trace(discrete: Any) -> None:
    """With flow on every edge of positive weight, nothing changes; only what was 0 is gone."""
    graph = put_zeros(discrete.graph)
    for node in graph.nodes:
        if node.params is not None and node.tied_to is None:
            node.params = discrete.graph.nodes[graph.nodes.index(node)].params
        elif node.params is not None:
            node.params = graph.nodes[node.tied_to].params
    circuit = pc.Circuit(graph)
    x = discrete.x.repeat(graph.num_heads, 1)
    head = torch.arange(graph.num_heads).repeat_interleave(len(discrete.x))
    pruned = pc.prune(circuit, count(circuit, x, head), threshold=0.0)
    torch.testing.assert_close(
        pc.Circuit(pruned).log_prob(discrete.x), circuit.log_prob(discrete.x), rtol=0, atol=1e-12
    )
    edges = [node for node in pruned.nodes if node.kind == "sum" and node.tied_to is None]
    assert sum(int((node.weight == 0).sum()) for node in edges) == sum(
        0 if node.mask is None else int((~node.mask).sum()) for node in edges
    )


@pytest.mark.parametrize("structure", [*HCLTS, "tied"])
def test_rows_that_lose_nothing_stay_bit_for_bit(structure: str, build_case: Callable[..., Any]) -> None:
    """Weights of single precision need not sum to one exactly; nothing is gone, so nothing is renormalised."""
    case = build_case(structure, "categorical", 2)
    circuit = case.circuit.float()
    flows = pc.Flows(circuit)
    for head in range(2):
        flows.add(case.x, head)
    assert_same(pc.prune(circuit, flows, threshold=0.0), circuit.to_graph(), rtol=0)


def test_units_keep_their_order(build_case: Callable[..., Any], enumerate_trees: Callable[..., Any]) -> None:
    """Of a latent with 3 states the middle one goes: its posterior has the two columns that stay."""
    graph = build_case("chain", "categorical", 1).graph
    latent = graph.nodes[graph.latents[1]]
    (above,) = [node for node in graph.nodes if node.kind == "sum" and graph.latents[1] in node.children]
    above.weight = above.weight * torch.tensor([1.0, 0.0, 1.0])
    above.weight = above.weight / above.weight.sum(1, keepdim=True)
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    x, head = draw(circuit, [0], 30)
    pruned = pc.prune(circuit, count(circuit, x, head), threshold=0.0)
    assert latent.num_units == 3
    assert pruned.nodes[pruned.latents[1]].num_units == 2
    assert pruned.nodes[pruned.latents[0]].num_units == 3
    expected = reference.posterior(graph.latents[1], x)[:, [0, 2]]
    np.testing.assert_allclose(pc.Circuit(pruned).posterior(x, 1), expected, atol=1e-12)


def test_a_latent_that_is_gone_leaves(build_case: Callable[..., Any]) -> None:
    """In the DAG, one of two decompositions below the root loses all its weight."""
    graph = build_case("shared", "categorical", 1).graph
    left, _ = graph.nodes[graph.root].children
    graph.nodes[graph.root].weight = torch.tensor([[0.0, 0.0, 0.0, 0.4, 0.6]])
    circuit = pc.Circuit(graph)
    x, head = draw(circuit, [0], 50)
    pruned = pc.prune(circuit, count(circuit, x, head), threshold=0.0)
    assert graph.latents[2] == left
    assert sorted(pruned.latents) == [0, 1]
    assert len(pruned.nodes[pruned.root].children) == 1
    torch.testing.assert_close(pc.Circuit(pruned).log_prob(x), circuit.log_prob(x))


def test_a_sum_picks_what_it_needs_of_a_shared_child() -> None:
    """Two sums over one product of 8 units need 3 units each, one of them in common."""
    graph = pc.CircuitGraph()
    shared = graph.add_product([graph.add_input(v, pc.Categorical(5), 8) for v in range(2)])
    sums = []
    for low in (0, 2):
        mask = torch.zeros(4, 8, dtype=torch.bool)
        mask[:, low : low + 3] = True
        sums.append(graph.add_sum([shared], 4, weight=torch.rand(4, 8) * mask))
    tops = [graph.add_product([found, graph.add_input(2, pc.Categorical(5), 4)]) for found in sums]
    graph.root = graph.add_sum(tops, 2)
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 5, (60, 3))
    pruned = pc.prune(circuit, count(circuit, x, torch.arange(60) % 2), threshold=0.0)
    assert_sound(pruned)
    assert dead_units(pruned) == []
    widths = sorted(tuple(node.weight.shape) for node in pruned.nodes if node.kind == "sum")
    assert widths == [(2, 8), (4, 3), (4, 3)]
    torch.testing.assert_close(pc.Circuit(pruned).log_prob(x), circuit.log_prob(x))
    again = pc.Circuit(pruned)
    twice = pc.prune(again, count(again, x, torch.arange(60) % 2), threshold=0.0)
    assert len(twice.nodes) == len(pruned.nodes)


def test_tied_sums_pick_the_same_columns() -> None:
    """A state that occurs at the first step alone stays an emission there; the tied transitions all do without it."""
    graph = pc.CircuitGraph()
    emission = graph.add_input(3, pc.Categorical(5), 4)
    below, transition = emission, None
    for v in (2, 1, 0):
        weight = torch.rand(4, 4) * torch.tensor([1.0, 1.0, 1.0, 0.0])
        step = graph.add_sum([below], 4, weight=None if transition else weight, tied_to=transition)
        transition = transition or step
        below = graph.add_product([step, graph.add_input(v, pc.Categorical(5), 4, tied_to=emission)])
    graph.root = graph.add_sum([below], 1)
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 5, (50, 4))
    pruned = pc.prune(circuit, count(circuit, x, torch.zeros(50, dtype=torch.int64)), threshold=0.0)
    assert_sound(pruned)
    assert dead_units(pruned) == []
    assert sorted({tuple(node.weight.shape) for node in pruned.nodes if node.kind == "sum"}) == [(1, 4), (4, 3)]
    torch.testing.assert_close(pc.Circuit(pruned).log_prob(x), circuit.log_prob(x))


def test_states_of_soft_evidence_stay() -> None:
    """Nothing uses the second state any more, but evidence for it still comes in."""
    graph = pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3))
    for node in graph.nodes:
        if node.weight is not None:
            node.weight = node.weight * torch.tensor([1.0, 0.0, 1.0])
            node.weight = node.weight / node.weight.sum(1, keepdim=True)
    circuit = pc.Circuit(graph)
    evidence = torch.randn(20, 2, 3)
    pruned = pc.prune(circuit, count(circuit, evidence, torch.zeros(20, dtype=torch.int64)), threshold=0.0)
    assert [node.num_units for node in pruned.nodes if node.kind == "input"] == [3, 3]
    assert [node.num_units for node in pruned.nodes if node.kind == "product"] == [2, 2]
    torch.testing.assert_close(pc.Circuit(pruned).log_prob(evidence), circuit.log_prob(evidence))


def test_pruning_a_kronecker_product(enumerate_trees: Callable[..., Any], tmp_path: Path) -> None:
    graph = kronecker_graph()
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    x = torch.randint(0, 4, (20, 2))
    kept = kept_edges(reference, x, torch.zeros(20, dtype=torch.int64), 0.12)
    apply_edges(reference, kept)
    pruned = pc.prune(circuit, count(circuit, x, torch.zeros(20, dtype=torch.int64)), 0.12)
    np.testing.assert_allclose(pc.Circuit(pruned).log_prob(x).detach(), reference.log_prob(x), atol=1e-10)
    (product,) = [node for node in pruned.nodes if node.kind == "product"]
    assert 0 < product.num_units < 6
    for circuit in (pc.Circuit(pruned), pc.load(pc.save(pc.Circuit(pruned), tmp_path / "pruned"))):
        with pytest.raises(ValueError, match="Kronecker"):
            pc.grow(circuit, count(circuit, x, torch.zeros(20, dtype=torch.int64)), [0])


def test_pruning_a_batch_of_circuits(build_case: Callable[..., Any], enumerate_trees: Callable[..., Any]) -> None:
    """Every circuit by its own examples, of which they have different numbers; the one without any stays as it is."""
    cases = [
        build_case("chain", "categorical", 2),
        build_case("ragged", "categorical", 3),
        build_case("bush", "categorical", 1),
    ]
    graphs = [put_zeros(case.graph) for case in cases]
    graphs[2] = build_case("star", "categorical", 1).graph
    circuit = pc.Circuit(graphs)
    x, weight = torch.zeros(3, 14, 4, dtype=torch.int64), torch.zeros(3, 14)
    head = torch.zeros(3, 14, dtype=torch.int64)
    expected = []
    for g, (graph, size) in enumerate(zip(graphs, (14, 6, 0), strict=True)):
        found = pc.Circuit(graph)
        x[g, :size], head[g, :size] = (part[:size] for part in draw(found, [graph.num_heads - 1], 14))
        weight[g, :size] = 1.0
        if size:
            expected.append(pc.prune(found, count(found, x[g, :size], head[g, :size]), 0.03))
    pruned = pc.prune(circuit, count(circuit, x, head, weight), 0.03)
    for found, graph in zip(pruned, [*expected, graphs[2]], strict=True):
        assert_same(found, graph)
    both = pc.Circuit(pruned)
    assert sum(table.numel() for table in both.tables) < sum(table.numel() for table in circuit.tables)


def test_pruned_circuits_take_less_memory() -> None:
    """Half of the units of every latent go: a quarter of the edges and half of the leaves are left."""
    graph = pc.hclt(torch.tensor([-1, 0, 0, 1, 1, 2]), 32, pc.Categorical(7))
    for node in graph.nodes:
        if node.kind == "sum":
            node.weight[:, 16:] = 0
            node.weight /= node.weight.sum(1, keepdim=True)
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 7, (300, 6))
    pruned = pc.Circuit(pc.prune(circuit, count(circuit, x, torch.zeros(300, dtype=torch.int64)), 0.0))
    assert sum(table.numel() for table in pruned.tables) == 5 * 16 * 16 + 16 + 6 * 16 * 7
    assert pruned.plan.num_value_rows < 0.55 * circuit.plan.num_value_rows
    assert pruned.plan.num_edge_rows < 0.55 * circuit.plan.num_edge_rows


@pytest.mark.parametrize("threshold", [-0.1, math.nan, math.inf])
def test_bad_thresholds_are_named(threshold: float, build_case: Callable[..., Any]) -> None:
    circuit = build_case("chain", "categorical", 1).circuit
    with pytest.raises(ValueError, match="threshold"):
        pc.prune(circuit, pc.Flows(circuit), threshold)

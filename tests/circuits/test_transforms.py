"""Prune and grow against the enumeration of induced trees: exact zeros, ties, masks, shared nodes, ragged batches."""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

HCLTS = ["chain", "star", "bush", "pair"]


def put_zeros(graph: pc.CircuitGraph, seed: int = 0) -> pc.CircuitGraph:
    """A copy in which about half of the weights, and a third of the categories, are exactly 0."""
    graph = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(seed)
    for index, node in enumerate(graph.nodes):
        if node.tied_to is not None:
            owner = graph.nodes[node.tied_to]
            node.params, node.weight = owner.params, owner.weight
            continue
        name, rate = ("weight", 0.5) if node.kind == "sum" else ("params", 0.67)
        found = getattr(node, name)
        if found is None or not (node.kind == "sum" or isinstance(node.distribution, pc.Categorical)):
            continue
        keep = torch.rand(found.shape, generator=generator) < (1 - rate if index == graph.root else rate)
        keep.scatter_(1, found.argmax(1, keepdim=True), True)
        setattr(node, name, found * keep / (found * keep).sum(1, keepdim=True))
    return graph


def draw(circuit: pc.Circuit, heads: Sequence[int], number: int = 7) -> tuple[Tensor, Tensor]:
    """Examples that are possible under their heads."""
    generator = torch.Generator().manual_seed(1)
    parts = [circuit.sample(number, head=head, generator=generator) for head in heads]
    return torch.cat(parts), torch.tensor(heads).repeat_interleave(number)


def count(circuit: pc.Circuit, x: Tensor, head: Tensor, weight: Tensor | None = None) -> pc.Flows:
    flows = pc.Flows(circuit)
    flows.add(x, head, weight)
    return flows


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


def dead_units(graph: pc.CircuitGraph) -> list[tuple[int, int]]:
    """Units that no path of live edges reaches from a head, nor from a unit that is kept for one that it is tied to."""
    owner = [index if node.tied_to is None else node.tied_to for index, node in enumerate(graph.nodes)]
    alike = {a: [b for b, found in enumerate(owner) if found == owner[a]] for a in range(len(owner))}
    todo = [(graph.root, head) for head in range(graph.num_heads)]
    seen = set(todo)
    while todo:
        index, unit = todo.pop()
        node = graph.nodes[index]
        if node.kind == "product":
            units = [unit] * len(node.children) if node.units is None else node.units[unit].tolist()
            below = list(zip(node.children, units, strict=True))
        elif node.kind == "sum":
            ends = [(child, k) for child in node.children for k in range(graph.nodes[child].num_units)]
            below = [end for c, end in enumerate(ends) if node.mask is None or node.mask[unit, c]]
        else:
            below = []
        below += [(other, unit) for other in alike[index]]
        todo += [found for found in below if found not in seen]
        seen |= set(below)
    return sorted({(index, unit) for index, node in enumerate(graph.nodes) for unit in range(node.num_units)} - seen)


def assert_sound(graph: pc.CircuitGraph) -> None:
    """Smooth, decomposable, normalised, zero outside the masks, tied nodes with the parameters of their owners."""
    graph.validate()
    for node in graph.nodes:
        if node.tied_to is not None:
            owner = graph.nodes[node.tied_to]
            assert (node.weight is owner.weight, node.params is owner.params, owner.tied_to) == (True, True, None)
        if node.kind == "sum":
            width = sum(graph.nodes[child].num_units for child in node.children)
            assert node.weight.shape == (node.num_units, width)
            torch.testing.assert_close(node.weight.sum(1), torch.ones(node.num_units))
            assert bool((node.weight >= 0).all())
            if node.mask is not None:
                assert bool((node.weight[~node.mask] == 0).all())
                assert bool(node.mask.any(1).all())
        elif node.kind == "product":
            for j, child in enumerate(node.children):
                units = torch.arange(node.num_units) if node.units is None else node.units[:, j]
                assert units.shape == (node.num_units,)
                assert int(units.max()) < graph.nodes[child].num_units
        elif node.params is not None:
            assert node.params.shape == (node.num_units, node.distribution.size)
            node.distribution.check_params(node.params)
    for index in graph.latents.values():
        assert graph.nodes[index].kind == "product"


# Pruning.


@pytest.mark.parametrize("threshold", [0.0, 0.05, 1.0])
@pytest.mark.parametrize("zeros", [False, True], ids=["positive", "zeros"])
def test_pruning_by_the_rule(case: Any, threshold: float, zeros: bool, enumerate_trees: Callable[..., Any]) -> None:
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


def kronecker_graph() -> pc.CircuitGraph:
    graph = pc.CircuitGraph()
    children = [graph.add_input(v, pc.Categorical(4), units) for v, units in enumerate((3, 2))]
    graph.root = graph.add_sum([graph.add_product(children, torch.cartesian_prod(torch.arange(3), torch.arange(2)))], 1)
    return graph


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


def assert_same(a: pc.CircuitGraph, b: pc.CircuitGraph, rtol: float = 1e-9) -> None:
    """Equal structures, and parameters up to rounding (rtol 0: bit for bit)."""
    assert (a.root, a.latents, len(a.nodes)) == (b.root, b.latents, len(b.nodes))
    for x, y in zip(a.nodes, b.nodes, strict=True):
        for name in ("kind", "num_units", "children", "variable", "distribution", "tied_to", "kronecker"):
            assert getattr(x, name) == getattr(y, name)
        for name in ("units", "mask"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)
        for name in ("params", "weight"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)


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


# Growing.


@pytest.mark.parametrize("zeros", [False, True], ids=["positive", "zeros"])
def test_growth_without_noise_changes_no_likelihood(growing: Any, zeros: bool) -> None:
    circuit = pc.Circuit(put_zeros(growing.graph) if zeros else growing.graph)
    num_heads = growing.graph.num_heads
    heads = [num_heads - 1, 0] if num_heads > 1 else [0]
    grown = pc.grow(circuit, count(circuit, *draw(circuit, heads)), heads, sigma=0.0)
    assert_sound(grown)
    before, after = circuit.log_prob(growing.x), pc.Circuit(grown).log_prob(growing.x)
    assert after.shape[1] == num_heads + len(heads)
    torch.testing.assert_close(after, before[:, [*range(num_heads), *heads]], rtol=1e-10, atol=1e-10)
    old_units, new_units = (sum(node.num_units for node in graph.nodes) for graph in (growing.graph, grown))
    assert new_units > old_units + len(heads)
    assert (grown.latents, len(grown.nodes)) == (growing.graph.latents, len(growing.graph.nodes))
    assert dead_units(grown) == dead_units(growing.graph)


@pytest.mark.parametrize("structure", HCLTS)
def test_growth_by_the_rule(structure: str, build_case: Callable[..., Any]) -> None:
    """In an HCLT: the states with the most flow double, leaves and sums with them, with the weights of Algorithm 1."""
    case = build_case(structure, "categorical", 3)
    graph = case.graph
    flows = count(case.circuit, *draw(case.circuit, [2, 1]))
    flow = np.concatenate([flows.units(index) for index in range(len(graph.nodes))]) / 14
    limit = max(np.quantile(flow, 1 - 2 / 5), 1e-8)
    flagged = {
        index: np.flatnonzero(flows.units(index) / 14 >= limit)
        for index, node in enumerate(graph.nodes)
        if node.kind == "product"
    }
    grown = pc.grow(case.circuit, flows, [2, 1], sigma=0.0)
    states = {index: product for product in flagged for index in graph.nodes[product].children}
    for index, (old, new) in enumerate(zip(graph.nodes, grown.nodes, strict=True)):
        if old.kind == "product":
            assert new.num_units == old.num_units + len(flagged[index])
            assert new.units is None
        elif old.kind == "input":
            torch.testing.assert_close(new.params, torch.cat([old.params, old.params[flagged[states[index]]]]))
        else:
            rows = np.array([2, 1]) if index == graph.root else flagged[states[index]]
            assert_split_weights(old.weight.numpy(), new.weight.numpy(), rows, flagged[old.children[0]])
    assert any(len(found) > 0 for found in flagged.values())


def assert_split_weights(old: np.ndarray, new: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> None:
    """Weight by weight: what the copies `rows` and the others give to doubled `columns` and the others."""
    n, m = old.shape
    assert new.shape == (n + len(rows), m + len(columns))
    for i in range(n):
        for j in range(m):
            if j not in columns:
                assert new[i, j] == old[i, j]
                continue
            copied = m + list(columns).index(j)
            if i in rows:
                assert new[i, [j, copied]] == pytest.approx(old[i, j] * np.array([1, 0.2]) / 1.2)
                bottom = new[n + list(rows).index(i)]
                assert bottom[[j, copied]] == pytest.approx(old[i, j] * np.array([0.2, 1]) / 1.2)
            else:
                assert new[i, j] + new[i, copied] == pytest.approx(old[i, j])
                assert 0.1 - 1e-9 <= new[i, j] / old[i, j] <= 0.9 + 1e-9
    for place, i in enumerate(rows):
        others = [j for j in range(m) if j not in columns]
        np.testing.assert_array_equal(new[n + place, others], old[i, others])


def uninformative(graph: pc.CircuitGraph) -> pc.CircuitGraph:
    """All units of an input are alike: flows are top-down probabilities."""
    for node in graph.nodes:
        if node.params is not None:
            node.params = node.params[:1].repeat(node.num_units, 1)
    return graph


def low_flow_graph() -> pc.CircuitGraph:
    """A leaf unit that all pairs share, whatever their flow; see the test of what splits."""
    graph = pc.CircuitGraph()
    first, second = graph.add_input(0, pc.Categorical(3), 1), graph.add_input(1, pc.Categorical(3), 5)
    pairs = graph.add_product([first, second], torch.tensor([[0, k] for k in range(5)]))
    weight = torch.tensor([[0.499, 0.5, 0.0, 0.0, 0.001], [0.0, 0.0, 0.4, 0.6, 0.0]])
    mixed = graph.add_sum([pairs], 2, weight=weight, mask=weight > 0)
    tops = graph.add_product([mixed, graph.add_input(2, pc.Categorical(3), 2)])
    graph.root = graph.add_sum([tops], 1, weight=torch.tensor([[0.9, 0.1]]))
    graph.latents = {0: pairs, 1: tops}
    return uninformative(graph)


def test_what_splits_in_a_dag() -> None:
    """An unflagged product over a doubled child splits if a parent splits, and else stays with the first copy."""
    graph = low_flow_graph()
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 3, (10, 3))
    grown = pc.grow(circuit, count(circuit, x, torch.zeros(10, dtype=torch.int64)), [0], sigma=0.0)
    first, second, pairs, mixed, third, tops, root = grown.nodes
    # Flagged: all flows of at least 0.449 among 17. Pair 4 has 0.0009, but its sum becomes two; pairs 2 and 3 do not.
    assert [node.num_units for node in (first, second, mixed, third, tops, root)] == [2, 7, 3, 3, 3, 2]
    assert pairs.units.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [0, 4], [1, 5], [1, 6], [1, 4]]
    assert tops.units is None
    assert mixed.mask[1].tolist() == [False, False, True, True, False, False, False, False]
    np.testing.assert_allclose(mixed.weight[1, 2:4], [0.4, 0.6])
    np.testing.assert_allclose(mixed.weight[2, [4, 7]], [0.001 * 0.2 / 1.2, 0.001 / 1.2])
    torch.testing.assert_close(pc.Circuit(grown).log_prob(x), circuit.log_prob(x).repeat(1, 2))


def test_a_head_that_does_not_grow_needs_nothing_twice() -> None:
    """Its flow counts (though it should not have been given any), but its little-used pair does not become two."""
    graph = pc.CircuitGraph()
    first, second = graph.add_input(0, pc.Categorical(3), 1), graph.add_input(1, pc.Categorical(3), 4)
    pairs = graph.add_product([first, second], torch.tensor([[0, k] for k in range(4)]))
    weight = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.999, 0.001]])
    graph.root = graph.add_sum([pairs], 2, weight=weight, mask=weight > 0)
    circuit = pc.Circuit(uninformative(graph))
    x = torch.randint(0, 3, (10, 2))
    grown = pc.grow(circuit, count(circuit, x, torch.tensor([0, 1] * 5)), [0], sigma=0.0)
    assert grown.nodes[pairs].units.tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 4]]


def test_tied_units_count_by_the_flow_of_one_of_them() -> None:
    """A homogeneous hidden Markov model whose states have, at every step, the flows 0.5, 0.3, 0.15 and 0.05."""
    graph = pc.CircuitGraph()
    shares = torch.tensor([0.5, 0.3, 0.15, 0.05])
    emission = graph.add_input(5, pc.Categorical(3), 4)
    below, transition = emission, None
    for v in range(4, -1, -1):
        step = graph.add_sum([below], 4, weight=None if transition else shares.repeat(4, 1), tied_to=transition)
        transition = transition or step
        below = graph.add_product([step, graph.add_input(v, pc.Categorical(3), 4, tied_to=emission)])
    graph.root = graph.add_sum([below], 1, weight=shares[None])
    owner = graph.nodes[emission]
    owner.params = owner.params[:1].repeat(4, 1)
    for node in graph.nodes:
        node.params = owner.params if node.kind == "input" else None
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 3, (10, 6))
    grown = pc.grow(circuit, count(circuit, x, torch.zeros(10, dtype=torch.int64)), [0], sigma=0.0)
    assert [node.num_units for node in grown.nodes] == [6] * (len(grown.nodes) - 1) + [2]
    torch.testing.assert_close(pc.Circuit(grown).log_prob(x), circuit.log_prob(x).repeat(1, 2))


def test_products_over_what_does_not_split_stay() -> None:
    """States of soft evidence cannot double, so neither do products over nothing else, however much flow they have."""
    graph = pc.hclt(torch.tensor([-1, 0, 0]), 3, pc.SoftEvidence(3))
    circuit = pc.Circuit(graph)
    evidence = torch.randn(20, 3, 3)
    grown = pc.grow(circuit, count(circuit, evidence, torch.zeros(20, dtype=torch.int64)), [0], sigma=0.0)
    sizes = [grown.nodes[grown.latents[v]].num_units for v in range(3)]
    assert sizes[1:] == [3, 3]
    assert sizes[0] > 3
    assert all(node.num_units == 3 for node in grown.nodes if node.kind == "input")
    torch.testing.assert_close(pc.Circuit(grown).log_prob(evidence), circuit.log_prob(evidence).repeat(1, 2))
    pruned = pc.prune(pc.Circuit(grown), count(pc.Circuit(grown), evidence, torch.arange(20) % 2), 0.05)
    assert all(node.num_units == 3 for node in pruned.nodes if node.kind == "input")
    assert bool(torch.isfinite(pc.Circuit(pruned).log_prob(evidence)).all())


def test_only_heads_that_grow_double(build_case: Callable[..., Any]) -> None:
    """Even if other heads have all the flow, or the growing one has none."""
    case = build_case("chain", "categorical", 3)
    grown = pc.grow(case.circuit, count(case.circuit, *draw(case.circuit, [0, 2])), [1], sigma=0.0)
    before, after = case.circuit.log_prob(case.x), pc.Circuit(grown).log_prob(case.x)
    torch.testing.assert_close(after, before[:, [0, 1, 2, 1]])


def test_units_with_next_to_no_flow_stay_single() -> None:
    """Whatever the quantile is: the floor is 1e-8 per example, and the examples are those of the circuit itself."""
    graph = pc.hclt(torch.tensor([-1, 0]), 6, pc.Categorical(3))
    shares = torch.tensor([1.0 - 2.4e-8, 2e-8, 1e-9, 1e-9, 1e-9, 1e-9])
    for node in uninformative(graph).nodes:
        if node.weight is not None:
            node.weight = shares.repeat(node.num_units, 1)
    circuit = pc.Circuit([graph, graph])
    x = torch.randint(0, 3, (2, 10, 2))
    flows = count(circuit, x, torch.zeros(2, 10, dtype=torch.int64), torch.tensor([[1.0], [1000.0]]).expand(2, 10))
    for grown in pc.grow(circuit, flows, [[0], [0]], sigma=0.0):
        assert [node.num_units for node in grown.nodes] == [8] * (len(graph.nodes) - 1) + [2]


def test_without_examples_only_the_heads_double(build_case: Callable[..., Any]) -> None:
    case = build_case("bush", "categorical", 2)
    flows = pc.Flows(case.circuit)
    flows.add(case.x, weight=torch.zeros(len(case.x)))
    grown = pc.grow(case.circuit, flows, [1], sigma=0.0)
    widths = [new.num_units - old.num_units for old, new in zip(case.graph.nodes, grown.nodes, strict=True)]
    assert widths == [0] * (len(widths) - 1) + [1]


def test_noise_stays_in_its_bounds() -> None:
    """Rows of copies differ from those without noise by factors whose ratios the clipping bounds; others do not."""
    graph = pc.hclt(torch.tensor([-1, 0, 0, 1]), 12, pc.Categorical(40), num_heads=2)
    circuit = pc.Circuit(graph)
    flows = count(circuit, *draw(circuit, [0], 50))
    plain, mild, wild = (pc.grow(circuit, flows, [0], s, torch.Generator().manual_seed(3)) for s in (0.0, 0.2, 50.0))
    spread: dict[str, list[float]] = {"sum": [], "input": []}
    touched = 0
    for index, (old, a, b, c) in enumerate(zip(graph.nodes, plain.nodes, mild.nodes, wild.nodes, strict=True)):
        if old.kind == "product":
            continue
        values = [node.weight if old.kind == "sum" else node.params for node in (a, b, c)]
        changed = (values[0] != values[2]).any(1)
        touched += int(changed.sum())
        assert int(changed.sum()) == 2 * (a.num_units - old.num_units)
        assert bool(changed[old.num_units :].all())
        torch.testing.assert_close(values[1][~changed], values[0][~changed], rtol=0, atol=0)
        if index == graph.root or not changed.any():
            continue
        bound = 100.0 if old.kind == "sum" else 20.0
        factors = (values[2] / values[0])[changed]
        assert bool((factors.amax(1) / factors.amin(1) <= bound * (1 + 1e-9)).all())
        torch.testing.assert_close(float((factors.amax(1) / factors.amin(1)).max()), bound)
        spread[old.kind] += (values[1] / values[0])[changed].flatten().tolist()
    assert touched > 20
    for found in spread.values():
        assert np.std(found) == pytest.approx(0.2, rel=0.15)
    assert_sound(mild)
    assert_sound(wild)


def test_noise_on_gaussians_is_relative_to_their_width(build_case: Callable[..., Any]) -> None:
    """Units and shifts of the data do not matter, except for the floor of the deviations."""
    case = build_case("chain", "gaussian", 1)
    grown = []
    for shift, scale in ((0.0, 1.0), (1000.0, 10.0)):
        graph = copy.deepcopy(case.graph)
        for node in graph.nodes:
            if node.params is not None:
                node.params = torch.stack([node.params[:, 0] * scale + shift, node.params[:, 1] * scale], 1)
        circuit = pc.Circuit(graph)
        flows = count(circuit, case.x * scale + shift, torch.zeros(len(case.x), dtype=torch.int64))
        grown.append(pc.grow(circuit, flows, [0], 0.1, torch.Generator().manual_seed(0)))
        assert_sound(grown[-1])
    moved = 0.0
    for a, b, old in zip(grown[0].nodes, grown[1].nodes, case.graph.nodes, strict=True):
        if a.params is not None:
            torch.testing.assert_close(b.params[:, 0], a.params[:, 0] * 10 + 1000)
            moved += float((a.params[: old.num_units] - old.params).abs().sum())
            free = a.params[:, 1] > 0.3
            torch.testing.assert_close(b.params[free, 1], a.params[free, 1] * 10)
    assert moved > 0


def test_a_generator_decides(growing: Any) -> None:
    flows = count(growing.circuit, *draw(growing.circuit, [0]))
    first, again, other = (
        pc.grow(growing.circuit, flows, [0], generator=torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert_same(first, again, rtol=0)
    with pytest.raises(AssertionError):
        assert_same(first, other)
    old_state = torch.get_rng_state()
    pc.grow(growing.circuit, flows, [0], generator=torch.Generator().manual_seed(5))
    assert torch.equal(old_state, torch.get_rng_state())


def test_growing_a_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    """Heads grow where they are asked to; a circuit without growing heads stays bit for bit."""
    cases = [
        build_case("chain", "categorical", 2),
        build_case("ragged", "categorical", 3),
        build_case("star", "categorical", 1),
    ]
    graphs = [put_zeros(case.graph) for case in cases]
    circuit = pc.Circuit(graphs)
    parts = [draw(pc.Circuit(graph), [0], 9) for graph in graphs]
    x, head = (torch.stack(found) for found in zip(*parts, strict=True))
    heads: list[list[int]] = [[1], [], [0]]
    head[0] = 1
    flows = count(circuit, x, head, weight=torch.tensor([[1.0], [0.0], [0.5]]).expand(3, 9))
    grown = pc.grow(circuit, flows, heads, sigma=0.0)
    assert_same(grown[1], circuit.to_graph()[1], rtol=0)
    again = pc.Circuit(grown)
    before, after = circuit.log_prob(cases[0].x), again.log_prob(cases[0].x)
    assert [graph.num_heads for graph in grown] == [3, 3, 2]
    torch.testing.assert_close(after[0], before[0][:, [0, 1, 1]])
    torch.testing.assert_close(after[1], before[1])
    torch.testing.assert_close(after[2][:, :2], before[2][:, [0, 0]])
    assert bool((after[2][:, 2] == -torch.inf).all())


@pytest.mark.parametrize("heads", [[3], [-1], [0, 0], [0.5], [[0]], 1, ["a"]])
def test_bad_heads_are_named(heads: Any, build_case: Callable[..., Any]) -> None:
    circuit = build_case("chain", "categorical", 3).circuit
    with pytest.raises(ValueError, match="heads"):
        pc.grow(circuit, pc.Flows(circuit), heads)


def test_bad_settings_of_growth_are_named(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 2)
    many = pc.Circuit([case.graph, case.graph])
    with pytest.raises(ValueError, match="expected 2 lists"):
        pc.grow(many, pc.Flows(many), [[0]])
    with pytest.raises(ValueError, match="sigma"):
        pc.grow(case.circuit, pc.Flows(case.circuit), [0], sigma=-0.1)
    with pytest.raises(ValueError, match="another structure"):
        pc.grow(case.circuit, pc.Flows(many), [0])
    with pytest.raises(ValueError, match="another structure"):
        pc.prune(case.circuit, pc.Flows(many))


def test_kronecker_products_do_not_grow() -> None:
    circuit = pc.Circuit(kronecker_graph())
    with pytest.raises(ValueError, match="grow: node 2 of circuit 0 is a Kronecker product"):
        pc.grow(circuit, pc.Flows(circuit), [0])
    many = pc.Circuit([kronecker_graph(), kronecker_graph()])
    assert_same(pc.grow(many, pc.Flows(many), [[], []])[0], many.to_graph()[0], rtol=0)


def test_structures_of_kronecker_products_are_pruned_but_do_not_grow(kronecker: Any) -> None:
    circuit = kronecker.circuit
    x, head = draw(circuit, [0, 1])
    with pytest.raises(ValueError, match=r"grow: node \d+ of circuit 0 is a Kronecker product"):
        pc.grow(circuit, count(circuit, x, head), [0])
    pruned = pc.prune(circuit, count(circuit, x, head), 0.08)
    assert_sound(pruned)
    assert sum(node.num_units for node in pruned.nodes) < sum(node.num_units for node in kronecker.graph.nodes)
    again = pc.Circuit(pruned)
    torch.testing.assert_close(again.log_prob(kronecker.x).logsumexp(0), torch.zeros(2), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="Kronecker"):
        pc.grow(again, count(again, x, head), [0])


def test_a_grid_that_grew_is_no_kronecker_product() -> None:
    """Two rounds double first one child, then the other: all combinations, yet free to grow on."""
    graph = pc.CircuitGraph()
    children = [graph.add_input(v, pc.Categorical(3), 1) for v in range(2)]
    graph.root = graph.add_sum([graph.add_product(children)], 1)
    product = graph.nodes[2]
    product.num_units, product.units = 4, torch.cartesian_prod(torch.arange(2), torch.arange(2))
    for child in children:
        graph.nodes[child].num_units, graph.nodes[child].params = 2, torch.rand(2, 3).softmax(1)
    graph.nodes[graph.root].weight = torch.full((1, 4), 0.25)
    circuit = pc.Circuit(graph)
    x = torch.randint(0, 3, (5, 2))
    grown = pc.grow(circuit, count(circuit, x, torch.zeros(5, dtype=torch.int64)), [0], sigma=0.0)
    torch.testing.assert_close(pc.Circuit(grown).log_prob(x), circuit.log_prob(x).repeat(1, 2))


def test_tied_nodes_that_cannot_grow_alike_are_named() -> None:
    graph = pc.CircuitGraph()
    one, two = graph.add_input(0, pc.Categorical(3), 3), graph.add_input(0, pc.Categorical(3), 1)
    a, b = graph.add_input(1, pc.Categorical(3), 2), graph.add_input(1, pc.Categorical(3), 2)
    first = graph.add_sum([one, two], 2)
    second = graph.add_sum([a, b], 2, tied_to=first)
    graph.root = graph.add_sum([graph.add_product([first, second])], 1)
    circuit = pc.Circuit(graph)
    with pytest.raises(ValueError, match="different widths"):
        pc.grow(circuit, pc.Flows(circuit), [0])


# Rounds.


@pytest.mark.parametrize("rule", [pc.Anemone, pc.CircuitEM])
def test_rounds_of_training_pruning_and_growing(rule: type, growing: Any, tmp_path: Path) -> None:
    graph = put_zeros(growing.graph)
    x = draw(pc.Circuit(graph), [0], 40)[0]
    for number in range(3):
        circuit = pc.Circuit(graph)
        best = circuit.log_prob(x).argmax(1)
        optimizer = rule(circuit, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            (-circuit.log_prob(x, head=best)).sum().backward()
            optimizer.step()
        pruned = pc.prune(circuit, count(circuit, x, best), 0.01)
        assert_sound(pruned)
        circuit = pc.Circuit(pruned)
        grown = pc.grow(
            circuit, count(circuit, x[best == 0], best[best == 0]), [0], 0.1, torch.Generator().manual_seed(number)
        )
        assert_sound(grown)
        assert grown.num_heads == graph.num_heads + 1
        graph = grown
    circuit = pc.Circuit(graph)
    assert bool((circuit.log_prob(x).amax(1) > -torch.inf).all())
    if not growing.x.is_floating_point():
        torch.testing.assert_close(
            circuit.log_prob(growing.x).logsumexp(0), torch.zeros(graph.num_heads), rtol=0, atol=1e-9
        )
    loaded = pc.load(pc.save(circuit, tmp_path / "circuit"))
    assert_same(loaded.to_graph(), graph, rtol=0)
    assert_same(circuit.to_graph(), graph, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decides_the_same(build_case: Callable[..., Any]) -> None:
    cases = [build_case("ragged", "categorical", 2), build_case("tied", "categorical", 1)]
    x = torch.stack([draw(case.circuit, [0], 20)[0] for case in cases])
    found = []
    for device in ("cpu", "cuda"):
        circuit = pc.Circuit([case.graph for case in cases]).to(device)
        flows = count(circuit, x.to(device), torch.zeros(2, 20, dtype=torch.int64))
        grown = pc.grow(circuit, flows, [[0], [0]], generator=torch.Generator().manual_seed(0))
        found.append([*pc.prune(circuit, flows, 0.01), *grown])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert_same(on_cpu, on_gpu)

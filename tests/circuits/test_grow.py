"""Growing: likelihoods that stay, what splits by the rule, noise within its bounds, ties, ragged batches."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_growing_structures
from helpers.edits import HCLTS, assert_same, assert_sound, count, dead_units, draw, kronecker_graph, put_zeros

import lvd_lightning.circuits as pc


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


@few_growing_structures
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

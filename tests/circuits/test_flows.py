"""Flows of a data set against enumeration: per edge and per unit, in chunks, in batches of circuits, on two ranks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_structures, few_structures_and_a_batch
from helpers.processes import free_port, one_of_two
from torch import Tensor

import lvd_lightning.circuits as pc


def unit_flows(reference: Any, x: Tensor, head_weights: np.ndarray, observed: Tensor | None = None) -> list[np.ndarray]:
    """Flow of every unit of every node: the share of the induced trees that contain it, summed over examples."""
    out = [np.zeros(node.num_units) for node in reference.nodes]
    for head in range(reference.num_heads):
        joint = reference.joint(x, observed, head=head)
        total = joint.sum(1, keepdims=True)
        share = (joint * head_weights[:, head : head + 1] * (total > 0) / np.where(total > 0, total, 1)).sum(0)
        for tree, weight in zip(reference.trees[head], share, strict=True):
            for index, (unit, _) in tree.items():
                out[index][unit] += weight
    return out


def draw_heads(case: Any, num_heads: int) -> tuple[Tensor, Tensor, np.ndarray]:
    """A head and a weight per example, a third of the weights 0; and the weights as (B, H)."""
    head = torch.randint(0, num_heads, (len(case.x),))
    weight = torch.rand(len(case.x)) * (torch.rand(len(case.x)) < 0.67)
    return head, weight, (torch.eye(num_heads)[head] * weight[:, None]).numpy()


def assert_flows(flows: pc.Flows, reference: Any, edges: dict[int, np.ndarray], units: list, circuit: int = 0) -> None:
    """Every edge (per owner of parameters) and every unit."""
    for index, node in enumerate(reference.nodes):
        if node.kind == "sum":
            np.testing.assert_allclose(flows.edges(index, circuit), edges[reference.owner[index]], 1e-9, 1e-12)
        np.testing.assert_allclose(flows.units(index, circuit), units[index], 1e-9, 1e-12)


def test_flows_are_those_counted_by_hand(case: Any) -> None:
    check_flows(case, case.observed)


@few_structures
def test_flows_of_complete_examples(case: Any) -> None:
    check_flows(case, None)


def check_flows(case: Any, observed: Tensor | None) -> None:
    head, weight, per_head = draw_heads(case, case.graph.num_heads)
    flows = pc.Flows(case.circuit)
    flows.add(case.x, head, weight, observed=observed, chunk_size=5)
    expected = case.reference.flows(case.x, per_head, observed)
    assert_flows(flows, case.reference, expected, unit_flows(case.reference, case.x, per_head, observed))
    np.testing.assert_allclose(flows.num_examples, [weight.sum()])


def test_flows_of_a_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    """Trees, heads and numbers of examples differ; padding has weight 0 and may ask for a head that is not there."""
    cases = [
        build_case("chain", "categorical", 1),
        build_case("shared", "categorical", 3),
        build_case("star", "categorical", 2),
    ]
    circuit = pc.Circuit([case.graph for case in cases])
    sizes = (40, 0, 17)
    x = torch.zeros(3, 40, 4, dtype=torch.int64)
    head, weight = torch.full((3, 40), 2), torch.zeros(3, 40)
    per_head = []
    for g, (case, size) in enumerate(zip(cases, sizes, strict=True)):
        rows = torch.randperm(len(case.x))[:size]
        x[g, :size], weight[g, :size] = case.x[rows], torch.rand(size)
        head[g, :size] = torch.randint(0, case.graph.num_heads, (size,))
        per_head.append((torch.eye(3)[head[g]] * weight[g, :, None])[:, : case.graph.num_heads].numpy())
    flows = pc.Flows(circuit)
    flows.add(x, head, weight, chunk_size=16)
    np.testing.assert_allclose(flows.num_examples, weight.sum(1))
    for g, case in enumerate(cases):
        edges = case.reference.flows(x[g], per_head[g])
        assert_flows(flows, case.reference, edges, unit_flows(case.reference, x[g], per_head[g]), g)


def test_examples_given_to_all_circuits(build_case: Callable[..., Any]) -> None:
    cases = [build_case("chain", "categorical", 2), build_case("star", "categorical", 2)]
    circuit = pc.Circuit([case.graph for case in cases])
    together, apart = pc.Flows(circuit), pc.Flows(circuit)
    together.add(cases[0].x, head=1)
    apart.add(torch.stack([cases[0].x] * 2), head=1)
    torch.testing.assert_close(together.inner_E, apart.inner_E)
    assert float(together.inner_E.sum()) > 0


@few_structures
def test_chunks_and_calls_add_up(case: Any) -> None:
    whole, parts = pc.Flows(case.circuit), pc.Flows(case.circuit)
    whole.add(case.x, chunk_size=10**6)
    for part in (slice(0, 3), slice(3, 3), slice(3, None)):
        parts.add(case.x[part], chunk_size=7)
    for index, node in enumerate(case.graph.nodes):
        torch.testing.assert_close(parts.units(index), whole.units(index))
        if node.kind == "sum":
            torch.testing.assert_close(parts.edges(index), whole.edges(index))
    assert float(whole.units(case.graph.root).sum()) == pytest.approx(len(case.x))


@few_structures_and_a_batch
def test_counting_leaves_the_circuit_alone(case: Any) -> None:
    circuit = case.circuit
    fresh = pc.Flows(circuit)
    fresh.add(case.x)
    assert all(table.grad is None for table in circuit.tables)
    assert not circuit.engine.statistics
    (-circuit.log_prob(case.x, head=0)).sum().backward()
    before = copy.deepcopy([[table.detach(), table.grad] for table in circuit.tables])
    statistics = copy.deepcopy(circuit.engine.statistics)
    loss = -circuit.log_prob(case.x, head=0).sum()
    pc.Flows(circuit).add(case.x)
    for table, (value, grad) in zip(circuit.tables, before, strict=True):
        assert torch.equal(table, value)
        assert torch.equal(table.grad, grad)
    assert statistics.keys() == circuit.engine.statistics.keys()
    assert all(torch.equal(circuit.engine.statistics[number], found) for number, found in statistics.items())
    loss.backward()  # nor does it spoil a pass that is under way
    torch.testing.assert_close(circuit.tables[0].grad, 2 * before[0][1])


def test_impossible_examples_count_as_examples_only() -> None:
    graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3))
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[0.5, 0.5, 0.0]]).repeat(2, 1)
    flows = pc.Flows(pc.Circuit(graph))
    flows.add(torch.tensor([[0, 1], [2, 1], [1, 2]]))
    assert float(flows.num_examples) == 3
    for index in range(len(graph.nodes)):
        assert float(flows.units(index).sum()) == pytest.approx(1)


def test_flows_from_soft_evidence(enumerate_trees: Callable[..., Any]) -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.SoftEvidence(3), num_heads=2)
    evidence = torch.randn(7, 3, 3)
    flows = pc.Flows(pc.Circuit(graph))
    flows.add(evidence, head=1, chunk_size=3)
    reference, per_head = enumerate_trees(graph), np.array([[0.0, 1.0]]).repeat(7, 0)
    assert_flows(flows, reference, reference.flows(evidence, per_head), unit_flows(reference, evidence, per_head))


def test_logits_have_the_flows_of_their_probabilities(build_case: Callable[..., Any]) -> None:
    case = build_case("sparse", "categorical", 2)
    flows, expected = pc.Flows(pc.Circuit(case.graph, parameterization="logits")), pc.Flows(case.circuit)
    for found in (flows, expected):
        found.add(case.x, head=1)
    torch.testing.assert_close(flows.edges(case.graph.root), expected.edges(case.graph.root))


def test_sums_are_kept_in_double_precision() -> None:
    """Single precision would stop counting at 2^24."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3))).float()
    flows = pc.Flows(circuit)
    x = torch.tensor([[0, 1]])
    flows.add(x, weight=torch.tensor([2.0**24]))
    for _ in range(3):
        flows.add(x)
    assert float(flows.num_examples) == 2**24 + 3
    assert float(flows.units(circuit.structures[0].root)) == 2**24 + 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(4, 3, dtype=torch.int64)}, r"x: got shape .*expected \(batch, 4\)"),
        ({"x": torch.zeros(4, dtype=torch.int64)}, "x: got .*expected a tensor"),
        ({"head": 2}, r"head: got 2, expected 0\.\.1"),
        ({"head": torch.zeros(3, dtype=torch.int64)}, r"head: .*\(4,\)"),
        ({"weight": torch.ones(3)}, r"weight: got \(3,\), expected .*\(4,\)"),
        ({"weight": -torch.ones(4)}, "weight: .*negative"),
        ({"weight": torch.full((4,), torch.nan)}, "weight: .*finite"),
        ({"observed": torch.ones(4, 4)}, "observed"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, build_case: Callable[..., Any]) -> None:
    flows = pc.Flows(build_case("chain", "categorical", 2).circuit)
    with pytest.raises(ValueError, match=message):
        flows.add(**{"x": torch.zeros(4, 4, dtype=torch.int64)} | arguments)


def test_a_head_that_a_circuit_lacks_is_named(build_case: Callable[..., Any]) -> None:
    circuit = pc.Circuit([build_case("chain", "categorical", 2).graph, build_case("star", "categorical", 1).graph])
    with pytest.raises(ValueError, match="head: circuit 1 has 1 heads, example 2 asks for head 1"):
        pc.Flows(circuit).add(torch.zeros(3, 4, dtype=torch.int64), head=torch.tensor([[1, 0, 1], [0, 0, 1]]))


@pytest.mark.parametrize(("node", "circuit", "message"), [(99, 0, "node"), (0, 1, "circuit"), (0, 0, "sum nodes")])
def test_unknown_nodes_are_named(node: int, circuit: int, message: str, build_case: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=message):
        pc.Flows(build_case("chain", "categorical", 1).circuit).edges(node, circuit)


def test_flows_belong_to_a_structure(build_case: Callable[..., Any]) -> None:
    case = build_case("sparse", "categorical", 2)
    flows = pc.Flows(case.circuit)
    flows.check(copy.deepcopy(case.circuit))
    denser = case.circuit.to_graph()
    denser.nodes[denser.root].mask = torch.ones_like(denser.nodes[denser.root].mask)
    others = [pc.Circuit(denser), pc.Circuit([case.graph, case.graph]), build_case("chain", "categorical", 2).circuit]
    for other in others:
        with pytest.raises(ValueError, match="flows: .*another structure"):
            flows.check(other)


# Two processes.


def part_of_flows(part: slice) -> pc.Flows:
    torch.manual_seed(0)
    circuit = pc.Circuit([pc.hclt(torch.tensor(p), 3, pc.Categorical(3), 2) for p in ([-1, 0, 1], [1, -1, 1])])
    x, weight = torch.randint(0, 3, (2, 13, 3)), torch.rand(2, 13)
    flows = pc.Flows(circuit)
    if part.start != part.stop:
        flows.add(x[:, part], head=1, weight=weight[:, part])
    return flows


def count_part(rank: int, port: int, folder: str) -> None:
    """One process of two: counts its part of the examples, all of them or none."""
    with one_of_two(rank, port):
        sums = {}
        for name, sizes in (("uneven", (9, 4)), ("one-empty", (13, 0))):
            flows = part_of_flows(slice(rank * sizes[0], rank * sizes[0] + sizes[rank]))
            flows.all_reduce()
            flows.all_reduce()  # once is enough
            sums[name] = [flows.num_examples, flows.inner_E, *(table for table in flows.tables if table is not None)]
        torch.save(sums, f"{folder}/{rank}.pt")


def test_two_processes_count_what_one_counts(tmp_path: Path) -> None:
    port = free_port()
    torch.multiprocessing.spawn(count_part, (port, str(tmp_path)), nprocs=2)
    flows = part_of_flows(slice(0, 13))
    expected = [flows.num_examples, flows.inner_E, *(table for table in flows.tables if table is not None)]
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for name in ("uneven", "one-empty"):
        for first, second, value in zip(ranks[0][name], ranks[1][name], expected, strict=True):
            assert torch.equal(first, second)
            torch.testing.assert_close(first, value)


def test_summed_flows_take_no_more_examples(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 1)
    flows = pc.Flows(case.circuit)
    flows.add(case.x)
    flows.all_reduce()
    assert float(flows.num_examples) == len(case.x)
    with pytest.raises(ValueError, match="summed over ranks"):
        flows.add(case.x)


@pytest.mark.parametrize("what", ["value", "nan"])
def test_an_error_adds_nothing(what: str, build_case: Callable[..., Any]) -> None:
    """Also where it is in the last of several chunks: who tries again does not count the others twice."""
    case = build_case("chain", "gaussian" if what == "nan" else "categorical", 1)
    flows = pc.Flows(case.circuit)
    bad = case.x.clone()
    bad[-1, -1] = torch.nan if what == "nan" else 99
    with pytest.raises(ValueError, match="x: "):
        flows.add(bad, chunk_size=3)
    assert flows.is_empty
    assert not bool(flows.num_examples.any())
    assert not bool(flows.inner_E.any())
    flows.add(case.x, chunk_size=3)
    expected = pc.Flows(case.circuit)
    expected.add(case.x, chunk_size=3)
    assert torch.equal(flows.inner_E, expected.inner_E)
    assert torch.equal(flows.num_examples, expected.num_examples)


def test_an_empty_batch_is_something_to_decide_by(build_case: Callable[..., Any]) -> None:
    """Examples were looked for and there were none: heads double and nothing else does."""
    case = build_case("chain", "categorical", 1)
    flows = pc.Flows(case.circuit)
    assert flows.is_empty
    flows.add(case.x[:0])
    assert not flows.is_empty
    assert pc.grow(case.circuit, flows, [0]).num_heads == 2

"""Batches of circuits, folded into the same layers, are the circuits one by one."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradients import EXACT, assert_flows, flows_by_gradient

import lvd_lightning.circuits as pc


@pytest.fixture
def folded(build_case: Callable[..., Any]) -> tuple[pc.Circuit, list[Any]]:
    """Different structures, widths and numbers of heads, over four variables."""
    names = (
        *(("chain", 1), ("star", 3), ("sparse", 2), ("shared", 1), ("tied", 2)),
        *(("rat", 2), ("rat-kronecker", 1), ("rectangles", 3), ("hmm", 1), ("mixed", 2), ("embedded", 1)),
        ("ragged", 4),
    )
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    return pc.Circuit([case.graph for case in cases]), cases


def test_batch_of_circuits(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    shared = cases[0].x
    found = circuit.log_prob(shared)
    assert found.shape == (len(cases), len(shared), 4)
    own = torch.stack([shared[torch.randperm(len(shared))[:9]] for _ in cases])
    observed = torch.rand(own.shape) < 0.5
    found_own = circuit.log_prob(own, observed=observed)
    assert found_own.shape == (len(cases), 9, 4)
    for g, case in enumerate(cases):
        heads = case.graph.num_heads
        np.testing.assert_allclose(found[g, :, :heads].detach(), case.reference.log_prob(shared), **EXACT)
        expected = case.reference.log_prob(own[g], observed[g])
        np.testing.assert_allclose(found_own[g, :, :heads].detach(), expected, **EXACT)
        assert (found[g, :, heads:] == -torch.inf).all()


def test_flows_of_a_batch_of_circuits(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    x = torch.randint(0, 3, (len(cases), 11, 4))
    heads = torch.stack([torch.randint(0, case.graph.num_heads, (11,)) for case in cases])
    weights = torch.rand(len(cases), 11)
    found = circuit.log_prob(x, head=heads)
    assert found.shape == (len(cases), 11)
    graphs = flows_by_gradient(circuit, -(weights * found).sum())
    for g, (graph, case) in enumerate(zip(graphs, cases, strict=True)):
        per_head = torch.nn.functional.one_hot(heads[g], case.graph.num_heads) * weights[g, :, None]
        assert_flows(graph, case.reference, case.reference.flows(x[g], per_head))


def test_absent_heads_leave_the_gradient_clean(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    found = circuit.log_prob(cases[0].x)
    torch.logsumexp(found, 2).sum().backward()  # a mixture over all heads, absent ones included
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())
    circuit.zero_grad()
    (found, weights) = circuit.log_prob(cases[0].x), torch.rand(len(cases), len(cases[0].x), 4)
    present = torch.tensor([[h < case.graph.num_heads for h in range(4)] for case in cases])[:, None]
    (graphs,) = [flows_by_gradient(circuit, -(weights * found.masked_fill(~present, 0)).sum())]
    for g, case in enumerate(cases):
        expected = case.reference.flows(cases[0].x, weights[g, :, : case.graph.num_heads])
        assert_flows(graphs[g], case.reference, expected)


def test_an_absent_head_of_one_circuit_is_impossible_without_nan(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    found = circuit.log_prob(cases[0].x, head=3)  # only the last circuit has four heads
    assert (found[:-1] == -torch.inf).all()
    weights = torch.zeros(found.shape)
    weights[-1] = 1.0
    found.backward(weights)
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_folded_circuits_round_trip(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    x = cases[0].x
    graphs = circuit.to_graph()
    assert isinstance(graphs, list)
    assert len(graphs) == len(cases)
    assert torch.equal(pc.Circuit(graphs).log_prob(x), circuit.log_prob(x))
    assert circuit.num_parameters == sum(case.circuit.num_parameters for case in cases)
    for g, case in enumerate(cases):
        alone = pc.Circuit(graphs[g])
        torch.testing.assert_close(alone.log_prob(x), case.circuit.log_prob(x), rtol=1e-10, atol=0)


def test_a_list_of_one_graph_is_still_a_batch(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 2)
    assert pc.Circuit([case.graph]).log_prob(case.x).shape == (1, len(case.x), 2)

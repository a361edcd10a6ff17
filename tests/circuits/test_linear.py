"""The forward pass with linear values against the general one, and when it gives way to it."""

from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.log_prob import Lease
from lvd_lightning.circuits.workspace import LinearWorkspace


def gradients(circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor) -> list[torch.Tensor]:
    circuit.zero_grad()
    log_p = circuit.log_prob(x, observed=observed)
    log_p.where(log_p > -torch.inf, 0.0).sum().backward()
    return [log_p.detach(), *(parameter.grad.clone() for parameter in circuit.parameters())]


def test_both_passes_agree(case: Any) -> None:
    if not case.circuit.is_linear:
        pytest.skip("only the general pass takes this circuit")
    linear = gradients(case.circuit, case.x, case.observed)
    case.circuit.is_linear = False
    general = gradients(case.circuit, case.x, case.observed)
    for first, second in zip(linear, general, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("rare", "is_enough"), [(1e-3, True), (1e-20, False)])
def test_numbers_that_are_too_small_are_found(rare: float, is_enough: bool) -> None:
    """A star whose states never change, and leaves that contradict each other: p(x) is the square of `rare`."""
    torch.set_default_dtype(torch.float32)
    graph = pc.hclt(torch.tensor([-1, 0, 0, 0]), 2, pc.Categorical(2))
    for index, node in enumerate(graph.nodes):
        if node.kind == "input":
            node.params = torch.tensor([[1 - rare, rare], [rare, 1 - rare]])
        elif node.kind == "sum" and index != graph.root:
            node.weight = torch.eye(2)
    circuit = pc.Circuit(graph)
    x = torch.tensor([[0, 1, 1, 0]])
    with torch.no_grad():
        space = Lease(circuit, LinearWorkspace, 1, keep=True).space
        batch, tables = circuit.prepare(x, None), circuit.probabilities()
        circuit.run_linear(batch, tables, space)
        assert (circuit.inexact(batch, tables, space) is None) is is_enough
        expected = pc.Circuit(graph).double().log_prob(x)
        torch.testing.assert_close(circuit.log_prob(x).double(), expected, rtol=1e-4, atol=0)


def test_only_what_is_too_small_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three circuits, each with contradictions of its own: the general pass sees these pairs alone."""
    torch.set_default_dtype(torch.float32)
    graphs, sizes = [], []
    for seed in range(3):
        graph = pc.hclt(torch.tensor([-1, 0, 0, 0, 0]), 2, pc.Categorical(2), num_heads=2)
        for index, node in enumerate(graph.nodes):
            if node.kind == "input":
                rare = 1e-20 if node.variable != seed else 0.4
                node.params = torch.tensor([[1 - rare, rare], [rare, 1 - rare]])
            elif node.kind == "sum" and index != graph.root:
                node.weight = torch.eye(2)
        graphs.append(graph)
    circuit = pc.Circuit(graphs)
    x = torch.cartesian_prod(*[torch.arange(2)] * 5)
    observed = torch.ones_like(x, dtype=torch.bool)
    observed[5, 1] = False
    run_forward = circuit.run_forward
    monkeypatch.setattr(
        circuit, "run_forward", lambda batch, *rest: (sizes.append(batch.size), run_forward(batch, *rest))
    )
    with torch.no_grad():
        expected = pc.Circuit(graphs).double().log_prob(x, observed=observed)
        found = circuit.log_prob(x, observed=observed)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    assert len(sizes) == 1
    assert 0 < sizes[0] < len(x) / 2


def test_only_trees_over_tables_are_linear() -> None:
    tree = torch.tensor([-1, 0, 0])
    star = torch.tensor([-1] + [0] * 40)
    assert pc.Circuit(pc.hclt(tree, 2, pc.Bernoulli())).is_linear
    assert not pc.Circuit(pc.hclt(tree, 2, pc.Gaussian())).is_linear
    assert not pc.Circuit(pc.hclt(tree, 2, pc.SoftEvidence(2))).is_linear
    assert not pc.Circuit(pc.hclt(star, 2, pc.Bernoulli())).is_linear  # a product of 41 factors
    mixture = pc.CircuitGraph()
    leaves = [mixture.add_input(0, pc.Categorical(3), 2) for _ in range(2)]
    mixture.add_sum(leaves, 1)
    assert not pc.Circuit(mixture).is_linear

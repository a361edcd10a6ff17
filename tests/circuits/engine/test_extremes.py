"""Single precision where probabilities are extreme: one-hot leaves, impossible examples."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.gradients import flows_by_gradient

import lvd_lightning.circuits as pc


def extreme_circuits() -> list[Any]:
    return [pytest.param(*pair, id="-".join(pair)) for pair in itertools.product(EXTREME, ("comb", "bush"))]


def near_one_hot(graph: pc.CircuitGraph, rest: float = 1e-6) -> None:
    """State k emits category k, nearly always."""
    for node in graph.nodes:
        if node.kind == "input":
            eye = torch.eye(*node.params.shape, dtype=torch.float64)
            node.params = (eye * (1 - rest) + (1 - eye) * rest / (node.params.shape[1] - 1)).float()


def identity_transitions(graph: pc.CircuitGraph, off: float = 0.0) -> None:
    """States hardly (or never) change along the tree."""
    for index, node in enumerate(graph.nodes):
        if node.kind == "sum" and index != graph.root:
            eye = torch.eye(*node.weight.shape, dtype=torch.float64)
            node.weight = (eye * (1 - off) + (1 - eye) * off / (len(eye) - 1)).float()


EXTREME: dict[str, Callable[[pc.CircuitGraph], None]] = {
    "leaves": near_one_hot,
    "leaves-and-states": lambda graph: (near_one_hot(graph), identity_transitions(graph, 1e-6))[0],
    "exact-zeros": lambda graph: (near_one_hot(graph), identity_transitions(graph))[0],
    "sharp": lambda graph: (near_one_hot(graph, 1e-30), identity_transitions(graph, 1e-20))[0],
}


@pytest.mark.parametrize(("extreme", "tree"), extreme_circuits())
def test_single_precision_survives_leaves_that_disagree(
    extreme: str, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,072 variables, half of which contradict the other half: float32 stays with the reference pass in float64."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("lvd_lightning.circuits.engine.layers.CACHE_SIZE", 500)  # several chunks per layer
    num_vars, num_states = 3072, 4
    v = torch.arange(num_vars)
    # a chain of spines that is 768 levels deep, or a binary tree
    parents = torch.where(v % 4 == 0, v - 4, v - v % 4).clamp_min(-1) if tree == "comb" else (v - 1) // 2
    parents[0] = -1
    graph = pc.hclt(parents, num_states, pc.Categorical(num_states), 2)
    EXTREME[extreme](graph)
    circuit = pc.Circuit(graph)
    x = torch.stack([v % num_states, (v >= num_vars // 2).long(), torch.zeros_like(v), v * 7 % 11 % num_states])
    double = copy.deepcopy(circuit).double()
    with double.reference():
        expected = double.log_prob(x)
    found = circuit.log_prob(x)
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    for single, reference in zip(circuit.parameters(), double.parameters(), strict=True):
        assert single.grad.isfinite().all()
        flow, wanted = single.detach() * single.grad, reference.detach() * reference.grad
        # Log-likelihoods reach 1e5 nats, where a float32 resolves 0.01: flows, their exponentials, are as uncertain.
        torch.testing.assert_close(flow.double(), wanted, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("product", ["hadamard", "kronecker"])
@pytest.mark.parametrize("structure", ["rat", "rectangles"])
def test_single_precision_survives_disagreement_in_region_graphs(structure: str, product: Any) -> None:
    """768 variables whose halves contradict each other, below wide sums with many ways to split them."""
    torch.set_default_dtype(torch.float32)
    leaf, shape = pc.Categorical(4), (16, 16, 3)
    if structure == "rat":
        graph = pc.rat_spn(
            768, depth=6, num_repetitions=3, num_sums=4, num_leaves=4, leaf=leaf, num_heads=2, product=product
        )
    else:
        graph = pc.poon_domingos(shape, delta=4, num_units=4, leaf=leaf, num_heads=2, product=product)
    near_one_hot(graph)
    circuit = pc.Circuit(graph)
    double = copy.deepcopy(circuit).double()
    v = torch.arange(768)
    x = torch.stack([v % 4, (v % 256 >= 128).long(), torch.zeros_like(v), v * 7 % 11 % 4])
    found = circuit.log_prob(x)
    with double.reference():
        expected = double.log_prob(x)
    assert bool((expected.amin(0) < -2000).all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    found[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    for single, reference in zip(circuit.parameters(), double.parameters(), strict=True):
        flow, wanted = single.detach() * single.grad, reference.detach() * reference.grad
        torch.testing.assert_close(flow.double(), wanted, rtol=1e-3, atol=2e-2)


def test_impossible_examples_are_minus_infinity_with_finite_gradients(build_case: Callable[..., Any]) -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 1]), 2, pc.Categorical(2), 2)
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.eye(2)
        elif node.num_units == 2 and node.weight is not None and node is not graph.nodes[graph.root]:
            node.weight = torch.eye(2)
    circuit = pc.Circuit(graph)
    x = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]])
    found = circuit.log_prob(x)
    assert found.isfinite().all(1).tolist() == [True, False, True]
    # weight 0 is how ragged batches are padded, -inf or not
    found.backward(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())
    circuit.zero_grad()
    circuit.log_prob(x).sum().backward()  # and an impossible example has no flow
    (graph,) = flows_by_gradient(circuit, -circuit.log_prob(x).sum())
    assert graph.nodes[graph.root].weight.sum().item() == pytest.approx(4.0)

"""Gradients of likelihoods are flows, as enumeration counts them, however passes are mixed."""

from typing import Any

import pytest
import torch
from helpers.cases import few_structures_and_a_batch
from helpers.gradients import assert_flows, flows_by_gradient

import lvd_lightning.circuits as pc


def test_parameter_times_gradient_is_the_flow(case: Any) -> None:
    weights = torch.rand(len(case.x), case.graph.num_heads)
    loss = -(weights * case.circuit.log_prob(case.x, observed=case.observed)).sum()
    (graph,) = flows_by_gradient(case.circuit, loss)
    assert_flows(graph, case.reference, case.reference.flows(case.x, weights, case.observed))


def test_flow_under_one_head_per_example(case: Any) -> None:
    heads = torch.randint(0, case.graph.num_heads, (len(case.x),))
    weights = torch.rand(len(case.x))
    (graph,) = flows_by_gradient(case.circuit, -(weights * case.circuit.log_prob(case.x, head=heads)).sum())
    per_head = torch.nn.functional.one_hot(heads, case.graph.num_heads) * weights[:, None]
    assert_flows(graph, case.reference, case.reference.flows(case.x, per_head))


@few_structures_and_a_batch
def test_gradients_of_two_passes_add_up(case: Any) -> None:
    half = len(case.x) // 2
    (case.circuit.log_prob(case.x[:half]).sum() + case.circuit.log_prob(case.x[half:]).sum()).backward()
    halves = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x[:half]).sum().backward()
    case.circuit.log_prob(case.x[half:]).sum().backward()
    apart = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x).sum().backward()
    for first, second, parameter in zip(halves, apart, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(second, parameter.grad, rtol=1e-9, atol=1e-11)


@few_structures_and_a_batch
def test_a_pass_without_gradient_between_forward_and_backward_does_no_harm(case: Any) -> None:
    """Buffers are reused between passes: those a backward pass still needs must not be."""
    loss = case.circuit.log_prob(case.x).sum()
    with torch.no_grad():
        case.circuit.log_prob(case.x.flip(0))
    other = case.circuit.log_prob(case.x.flip(0))
    loss.backward()
    found = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    del other
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x).sum().backward()
    for first, parameter in zip(found, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=1e-9, atol=1e-11)


@few_structures_and_a_batch
def test_a_graph_may_be_walked_back_twice(case: Any) -> None:
    loss = case.circuit.log_prob(case.x).sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    loss.backward()
    for first, parameter in zip(once, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(2 * first, parameter.grad, rtol=1e-10, atol=0)


@few_structures_and_a_batch
def test_gradients_of_gradients_are_refused(case: Any) -> None:
    """Also where the incoming gradient is a constant, so that nothing else would notice."""
    parameters = list(case.circuit.parameters())
    loss = case.circuit.log_prob(case.x).sum()
    for x in (case.x, case.x[:0]):
        with pytest.raises(RuntimeError, match="log_prob: gradients of gradients are not available"):
            torch.autograd.grad(case.circuit.log_prob(x).sum(), parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(loss**2, parameters, create_graph=True)


def test_gradients_of_evidence_have_none_of_their_own() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3)))
    evidence = torch.randn(4, 2, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(circuit.log_prob(evidence).sum(), evidence, create_graph=True)


@few_structures_and_a_batch
def test_a_refusal_leaves_the_circuit_as_it_was(case: Any) -> None:
    """The same graph still has first derivatives, retained or not, and inference mode is what it was."""
    parameters = list(case.circuit.parameters())
    expected = torch.autograd.grad(case.circuit.log_prob(case.x).sum(), parameters)
    loss = case.circuit.log_prob(case.x).sum()
    with pytest.raises(RuntimeError, match="gradients of gradients"):
        torch.autograd.grad(loss, parameters, create_graph=True)
    for retain in (True, False):
        found = torch.autograd.grad(loss, parameters, retain_graph=retain)
        assert all(map(torch.equal, found, expected))
    with torch.inference_mode():
        assert torch.equal(case.circuit.log_prob(case.x).sum(), loss)

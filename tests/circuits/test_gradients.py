"""Gradients of likelihoods are flows, as enumeration counts them, however passes are mixed."""

from typing import Any

import torch
from helpers.gradients import assert_flows, flows_by_gradient


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


def test_a_graph_may_be_walked_back_twice(case: Any) -> None:
    loss = case.circuit.log_prob(case.x).sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    loss.backward()
    for first, parameter in zip(once, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(2 * first, parameter.grad, rtol=1e-10, atol=0)

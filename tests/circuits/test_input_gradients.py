"""Gradients of log_prob for continuous inputs, against the reference pass and finite differences."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

TREE = [-1, 0, 0, 1]


def make_circuit(leaf: Any, seed: int = 0) -> pc.Circuit:
    generator = torch.Generator().manual_seed(seed)
    return pc.Circuit(pc.hclt(TREE, 3, leaf, num_heads=2, generator=generator)).double()


LEAVES = [pc.Gaussian(), pc.DiscretizedLogistic(8), pc.DiscretizedGaussian(8)]


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_is_that_of_the_reference_pass(leaf: Any, masked: bool) -> None:
    circuit = make_circuit(leaf)
    x = torch.randint(0, 8, (5, 4)).double().requires_grad_()
    observed = torch.rand(5, 4) < 0.6 if masked else None
    weight = torch.rand(5, 2)
    (found,) = torch.autograd.grad((weight * circuit.log_prob(x, observed=observed)).sum(), x)
    with circuit.reference():
        (expected,) = torch.autograd.grad((weight * circuit.log_prob(x, observed=observed)).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.abs().max() > 0.01
    if observed is not None:
        assert not found[~observed].any()


def test_finite_differences_of_gaussians_under_chosen_heads() -> None:
    circuit, head = make_circuit(pc.Gaussian()), torch.tensor([0, 1, 1, 0, 1])
    for table in circuit.tables:
        table.requires_grad_(False)
    x = torch.randn(5, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: circuit.log_prob(x, head=head), (x,))


@pytest.mark.parametrize("shared", [False, True])
def test_a_batch_of_circuits(shared: bool) -> None:
    graphs = [make_circuit(pc.Gaussian(), seed).to_graph() for seed in range(3)]
    many = pc.Circuit(graphs)
    x = torch.randn(*([] if shared else [3]), 5, 4).requires_grad_()
    assert torch.autograd.gradcheck(many.log_prob, (x,))


def test_variables_without_a_derivative_beside_others_get_none() -> None:
    circuit = make_circuit([pc.Gaussian(), pc.Categorical(3), pc.DiscretizedLogistic(8), pc.Bernoulli()])
    x = torch.tensor([[0.3, 2.0, 5.0, 1.0], [-1.2, 0.0, 1.0, 0.0]]).requires_grad_()
    (found,) = torch.autograd.grad(circuit.log_prob(x).sum(), x)
    with circuit.reference():
        (expected,) = torch.autograd.grad(circuit.log_prob(x).sum(), x)
    torch.testing.assert_close(found[:, ::2], expected[:, ::2])
    assert not found[:, 1::2].any()


def test_discrete_variables_have_no_gradient() -> None:
    circuit = make_circuit(pc.Categorical(3))
    x = torch.ones(2, 4, requires_grad=True)
    with pytest.raises(ValueError, match="requires a gradient, but all variables are discrete"):
        circuit.log_prob(x)
    with torch.no_grad():
        assert circuit.log_prob(x).shape == (2, 2)


def test_gradients_of_the_continuous_variables_alone() -> None:
    """Put together from two tensors, x hands them to the one that asked, and nothing to the other."""
    circuit = make_circuit([pc.Gaussian(), pc.Gaussian(), pc.Categorical(3), pc.Bernoulli()])
    for table in circuit.tables:
        table.requires_grad_(False)
    discrete = torch.tensor([[2.0, 1.0], [0.0, 0.0]], dtype=torch.float64)

    def log_prob(continuous: Tensor) -> Tensor:
        return circuit.log_prob(torch.cat([continuous, discrete], 1))

    assert torch.autograd.gradcheck(log_prob, (torch.randn(2, 2, dtype=torch.float64).requires_grad_(),))


def mixed_inputs(*families: pc.Distribution) -> pc.CircuitGraph:
    """A mixture of different families over variable 1, beside a Gaussian variable 0."""
    graph = pc.CircuitGraph()
    parts = [graph.add_product([graph.add_input(0, pc.Gaussian(), 2), graph.add_input(1, one, 2)]) for one in families]
    graph.add_sum(parts, 1)
    return graph


@pytest.mark.parametrize("batched", [False, True])
def test_a_variable_with_a_derivative_in_some_inputs_has_none(batched: bool) -> None:
    """The gradient of a part of log p would look like that of all of it."""
    half = mixed_inputs(pc.Gaussian(), pc.Binomial(4))
    circuit = pc.Circuit([mixed_inputs(pc.Gaussian()), half] if batched else half).double()
    x = torch.tensor([[0.5, 3.0]], dtype=torch.float64)
    assert circuit.log_prob(x).isfinite().all()
    with pytest.raises(ValueError, match="variable 1 has discrete inputs beside continuous ones"):
        circuit.log_prob(x.requires_grad_())
    apart = pc.Circuit([mixed_inputs(pc.Gaussian()), mixed_inputs(pc.Binomial(4))]).double()
    (found,) = torch.autograd.grad(apart.log_prob(x).sum(), x)
    (expected,) = torch.autograd.grad(apart.log_prob(x)[0].sum(), x)
    assert found[0, 1] == expected[0, 1] != 0

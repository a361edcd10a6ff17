"""Circuits over soft evidence: likelihoods, and gradients into what the evidence came from."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradients import EXACT

import lvd_lightning.circuits as pc


def evidence_tree(num_latents: int, num_heads: int) -> pc.CircuitGraph:
    return pc.hclt(torch.tensor([-1, 0, 0, 2]), num_latents, pc.SoftEvidence(3), num_heads)


def evidence_rat(num_leaves: int, num_heads: int, **settings: Any) -> pc.CircuitGraph:
    return pc.rat_spn(
        4, depth=2, num_repetitions=2, num_leaves=num_leaves, leaf=pc.SoftEvidence(3), num_heads=num_heads, **settings
    )


OVER_EVIDENCE: dict[str, Callable[[int], pc.CircuitGraph]] = {
    "direct": lambda heads: evidence_tree(3, heads),
    "emission": lambda heads: evidence_tree(2, heads),
    "rat-direct": lambda heads: evidence_rat(3, heads, num_sums=2, product="kronecker"),
    "rat-emission": lambda heads: evidence_rat(2, heads, num_sums=2),
    "homogeneous-direct": lambda heads: pc.hmm(4, 3, leaf=pc.SoftEvidence(3), homogeneous=True, num_heads=heads),
    "homogeneous-emission": lambda heads: pc.hmm(4, 2, leaf=pc.SoftEvidence(3), homogeneous=True, num_heads=heads),
}


@pytest.mark.parametrize("structure", OVER_EVIDENCE)
@pytest.mark.parametrize("num_heads", [1, 2])
def test_soft_evidence(structure: str, num_heads: int, enumerate_trees: Callable[..., Any]) -> None:
    graph = OVER_EVIDENCE[structure](num_heads)
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    evidence = (2 * torch.randn(6, 4, 3)).requires_grad_()
    observed = torch.rand(6, 4) < 0.7
    for mask in (None, observed):
        found = circuit.log_prob(evidence, observed=mask)
        np.testing.assert_allclose(found.detach(), reference.log_prob(evidence.detach(), mask), **EXACT)
    # p(z) is the circuit under one-hot evidence, and log p(e) = log sum_z p(z) prod_v e[v, z_v].
    worlds = torch.cartesian_prod(*[torch.arange(3)] * 4)
    hard = torch.nn.functional.one_hot(worlds, 3).double().log()
    log_prior = circuit.log_prob(hard)
    np.testing.assert_allclose(log_prior.exp().sum(0).detach(), 1, **EXACT)
    log_leaf = (
        evidence[:, None].expand(-1, 81, -1, -1).gather(3, worlds[None, :, :, None].expand(6, -1, -1, 1))[..., 0].sum(2)
    )
    joint = log_leaf[..., None] + log_prior
    torch.testing.assert_close(circuit.log_prob(evidence), joint.logsumexp(1), rtol=1e-8, atol=1e-12)
    # The gradient for the evidence is the posterior of z.
    (gradient,) = torch.autograd.grad(circuit.log_prob(evidence)[:, 0].sum(), evidence)
    posterior = joint[..., 0].softmax(1) @ torch.nn.functional.one_hot(worlds, 3).double().flatten(1)
    torch.testing.assert_close(gradient, posterior.view(6, 4, 3), rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad(circuit.log_prob(evidence, observed=observed)[:, 0].sum(), evidence)
    assert not gradient[~observed].any()
    np.testing.assert_allclose(gradient.sum(2)[observed].detach(), 1, **EXACT)


def test_a_frozen_prior_still_passes_gradients_on() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1)).requires_grad_(False)
    evidence = torch.randn(4, 2, 3, requires_grad=True)
    circuit.log_prob(evidence).sum().backward()
    torch.testing.assert_close(evidence.grad.sum(2), torch.ones(4, 2))
    assert all(parameter.grad is None for parameter in circuit.parameters())


def test_impossible_states_in_evidence(build_case: Callable[..., Any]) -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    evidence = torch.randn(4, 2, 3)
    evidence[0, 0, 1] = evidence[1, 1, :2] = evidence[2, 0] = -torch.inf
    evidence.requires_grad_()
    found = circuit.log_prob(evidence)[:, 0]
    assert found.isfinite().tolist() == [True, True, False, True]
    found[found.isfinite()].sum().backward()
    assert evidence.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_evidence_flows_into_a_network(build_case: Callable[..., Any]) -> None:
    """A prior over the heads of conditionals: the gradient of the whole passes both."""
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    conditional = build_case("chain", "categorical", 3)
    x = torch.randint(0, 3, (5, 2, 4))
    evidence = conditional.circuit.log_prob(x.view(10, 4)).view(5, 2, 3)
    prior.log_prob(evidence).sum().backward()
    gradients = [parameter.grad.clone() for parameter in conditional.circuit.parameters()]
    posterior = torch.autograd.functional.jacobian(lambda e: prior.log_prob(e)[:, 0].sum(), evidence.detach())
    conditional.circuit.zero_grad()
    (posterior.view(10, 3) * conditional.circuit.log_prob(x.view(10, 4))).sum().backward()
    for gradient, parameter in zip(gradients, conditional.circuit.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_of_circuits_over_soft_evidence() -> None:
    graphs = [
        pc.hclt(torch.tensor(parents), 3, pc.SoftEvidence(3), heads) for parents, heads in (([-1, 0], 1), ([1, -1], 2))
    ]
    many, alone = pc.Circuit(graphs), [pc.Circuit(graph) for graph in graphs]
    evidence = torch.randn(5, 2, 3, requires_grad=True)
    (shared,) = torch.autograd.grad(many.log_prob(evidence, head=0).sum(), evidence)
    (expected,) = torch.autograd.grad(sum(one.log_prob(evidence, head=0).sum() for one in alone), evidence)
    torch.testing.assert_close(shared, expected)
    own = torch.randn(2, 5, 2, 3, requires_grad=True)
    (found,) = torch.autograd.grad(many.log_prob(own, head=0).sum(), own)
    (expected,) = torch.autograd.grad(sum(one.log_prob(own[g], head=0).sum() for g, one in enumerate(alone)), own)
    torch.testing.assert_close(found, expected)

"""Differentiable samples of assembled circuits: their frequencies against exact ones, their gradients in float64.

Shapes: N samples, P = 4 patches, D = 12 variables of a patch, K = 3 latent values.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.estimates import seeded, slopes
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import circuit as limits
from lvd_lightning.models import assembled_rsample as module
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.assembled_rsample import head_means, reconstruct, rsample
from lvd_lightning.models.reparameterized import as_assembled, reparameterized
from lvd_lightning.parts import ImagePatches

HARD = {
    "simple": {"estimator": "simple"},
    "straight_through": {"estimator": "straight_through"},
    "gumbel": {"estimator": "gumbel", "hard": True},
    "cold": {"estimator": "gumbel", "temperature": 1e-9},
}


def with_logits(assembled: Any) -> AssembledCircuit:
    return reparameterized(assembled.circuit, "logits")


def gradients(circuit: AssembledCircuit, loss: Tensor) -> list[Tensor]:
    targets = [table for table in circuit.parameters() if table.requires_grad]
    found = torch.autograd.grad(loss, targets, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)]


def along(gradients: list[Tensor], directions: list[list[Tensor]]) -> Tensor:
    """The derivative along each of some directions."""
    return torch.stack([sum((g * d).sum() for g, d in zip(gradients, one, strict=True)) for one in directions])


def directions_of(circuit: AssembledCircuit, number: int = 4) -> tuple[list[Tensor], list[list[Tensor]]]:
    """The parameters, and random directions in their space: there are thousands of them."""
    generator = seeded(9)
    targets = [table.data for table in circuit.parameters() if table.requires_grad]
    return targets, [[torch.randn(t.shape, generator=generator) for t in targets] for _ in range(number)]


def assert_no_bias(circuit: AssembledCircuit, loss: Callable[[int], Tensor], exact: Callable[[], Tensor]) -> None:
    """Mean derivatives of independent losses agree with the exact ones within 5 standard errors."""
    targets, directions = directions_of(circuit)
    found = torch.stack([along(gradients(circuit, loss(seed)), directions) for seed in range(12)])
    expected = slopes(exact, targets, directions)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 5 * error).all()
    assert (expected.abs() > 5 * error).any()


def exact_means(circuit: AssembledCircuit) -> Tensor:
    """E[x], (P, D): of the prior's marginals and the heads' means."""
    marginal_KP = torch.stack([pc.expectation(circuit.prior, torch.eye(3)[k].expand(4, 3)) for k in range(3)])
    return torch.einsum("kp,pkd->pd", marginal_KP, head_means(circuit).expand(4, -1, -1))


def test_means_of_heads(assembled: Any) -> None:
    circuit = assembled.circuit
    found = head_means(circuit)
    expected = [
        pc.expectation(pc.Circuit(graph), torch.arange(4.0).expand(12, 4), head=head)
        for graph in assembled.graphs
        for head in range(graph.num_heads)
    ]
    torch.testing.assert_close(found.flatten(0, 1), torch.stack(expected))


@pytest.mark.parametrize("name", HARD)
def test_samples_have_the_exact_means_and_products(assembled: Any, name: str) -> None:
    """Products of two patches' pixels too, which only the prior connects."""
    circuit = assembled.circuit
    with torch.no_grad():
        drawn = rsample(circuit, 1500, generator=seeded(0), **HARD[name])
    torch.testing.assert_close(drawn, drawn.round(), atol=1e-6, rtol=0)
    x_NPD = circuit.split(drawn)
    assert ((x_NPD.mean(0) - exact_means(circuit)).abs() < 5 * x_NPD.std(0) / 1500**0.5).all()
    exact = circuit.split(circuit.sample(1500, generator=seeded(1)).double())
    first, second = (x[:, 0, :1] * x[:, 3] for x in (x_NPD, exact))
    assert ((first.mean(0) - second.mean(0)).abs() < 5 * (first.var(0) / 1500 + second.var(0) / 1500).sqrt()).all()


def test_gradients_of_soft_samples(assembled: Any) -> None:
    """With the noise held fixed a soft sample is a smooth function of all parameters: central differences."""
    circuit = with_logits(assembled)
    # Values of tables are mixed as well, so that nothing is rounded.
    weight = torch.linspace(-1, 1, 2 * 48).view(2, 3, 4, 4)

    def loss() -> Tensor:
        drawn = rsample(circuit, 2, estimator="gumbel", temperature=0.8, generator=seeded(3))
        return (drawn.square() * weight).sum()

    found = gradients(circuit, loss())
    assert all(one.abs().sum() > 1e-3 for one in found)
    targets, directions = directions_of(circuit)
    torch.testing.assert_close(along(found, directions), slopes(loss, targets, directions), rtol=1e-6, atol=1e-7)


def test_simple_has_no_bias_where_f_is_linear(assembled: Any) -> None:
    circuit = with_logits(assembled)
    weight_PD = torch.linspace(-1, 2, 48).view(4, 12)

    def exact() -> Tensor:
        return (exact_means(circuit) * weight_PD).sum()

    def loss(seed: int) -> Tensor:
        drawn = circuit.split(rsample(circuit, 200, estimator="simple", generator=seeded(seed)))
        return (drawn * weight_PD).sum() / 200

    assert_no_bias(circuit, loss, exact)


def test_reconstructions_have_no_bias_where_f_is_linear(
    make_assembly: Callable[..., Any], double_precision: None, images: Tensor
) -> None:
    """Through the posterior, and so through the evidence of all conditionals."""
    circuit = with_logits(make_assembly("heads"))
    weight_PD = torch.linspace(-1, 2, 48).view(4, 12)
    x = images[:1]

    def exact() -> Tensor:
        evidence = circuit.evidence(x)
        posterior_KP = torch.cat(
            [
                pc.expectation(
                    circuit.prior, torch.eye(3)[k].expand(4, 3), x=evidence, observed=torch.ones(1, 4, dtype=torch.bool)
                )
                for k in range(3)
            ]
        )
        return (torch.einsum("kp,pkd->pd", posterior_KP, head_means(circuit).expand(4, -1, -1)) * weight_PD).sum()

    def loss(seed: int) -> Tensor:
        drawn = circuit.split(reconstruct(circuit, x.expand(200, -1, -1, -1), generator=seeded(seed)))
        return (drawn * weight_PD).sum() / 200

    assert_no_bias(circuit, loss, exact)


@pytest.mark.parametrize("name", ["simple", "straight_through", "gumbel", "soft"])
def test_gradients_do_not_depend_on_where_zero_lies(double_precision: None, name: str) -> None:
    """All values are moved by c and f looks at x - c: the gradient stays, and the prior has one."""
    setting: dict[str, Any] = HARD.get(name, {"estimator": "gumbel", "temperature": 0.5})
    torch.manual_seed(0)
    prior = pc.hclt([-1, 0, 0, 2], 3, pc.SoftEvidence(3))
    graphs = [pc.hclt([-1, *range(11)], 2, pc.Gaussian(), num_heads=heads) for heads in (2, 1)]
    found = []
    for shift in (0.0, 10.0):
        for graph in graphs:
            for node in graph.nodes:
                if node.kind == "input":
                    node.params[:, 0] += shift
        parts = ImagePatches((3, 4, 4), 2)
        circuit = reparameterized(AssembledCircuit(pc.Circuit(prior), pc.Circuit(graphs), parts), "logits")
        drawn = rsample(circuit, 50, generator=seeded(1), **setting)
        found.append(gradients(circuit, (drawn - shift).square().mean()))
    assert all(one.abs().sum() > 1e-4 for one in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_memory_is_bounded(assembled: Any, images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some rows at a time give samples as good, and the gradient of evidence is the same."""
    circuit = with_logits(assembled)
    whole = circuit.evidence_with_gradients(images)
    torch.testing.assert_close(whole.detach(), circuit.evidence(images))
    weight = torch.linspace(-1, 1, whole.numel()).view(whole.shape)
    expected = gradients(circuit, (whole * weight).sum())
    rows = circuit.conditional.plan.num_value_rows
    monkeypatch.setattr(limits, "MAX_NUMBERS", {"cpu": 16 * 40 * rows, "cuda": 1})
    assert module._step(circuit.conditional) == 40
    found = gradients(circuit, (circuit.evidence_with_gradients(images) * weight).sum())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    for setting in ({"estimator": "simple"}, {"estimator": "gumbel"}):
        drawn = circuit.split(rsample(circuit, 150, generator=seeded(0), **setting)).detach()
        assert ((drawn.mean(0) - exact_means(circuit)).abs() < 5 * drawn.std(0) / 150**0.5 + 0.3).all()


def test_samples_are_seeded(assembled: Any, images: Tensor) -> None:
    for setting in HARD.values():
        first, again, other = (rsample(assembled.circuit, 4, generator=seeded(s), **setting) for s in (0, 0, 1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    first, again = (reconstruct(assembled.circuit, images, generator=seeded(2)) for _ in range(2))
    assert torch.equal(first, again)
    assert first.shape == images.shape


def test_an_encoder_decides_the_latent_values(assembled: Any, images: Tensor) -> None:
    """Evidence that is certain of a value: every part is drawn from its head."""
    circuit = assembled.circuit
    certain = torch.full((600, 4, 3), -torch.inf)
    certain[..., 1] = 0.0
    drawn = circuit.split(reconstruct(circuit, images[:1].expand(600, -1, -1, -1), certain, generator=seeded(0)))
    expected = head_means(circuit)[:, 1].expand(4, -1)
    assert ((drawn.mean(0) - expected).abs() < 5 * drawn.std(0) / 600**0.5 + 1e-9).all()


def test_gradients_reach_the_encoder(make_assembly: Callable[..., Any], double_precision: None, images: Tensor) -> None:
    """Of soft samples with fixed noise: central differences."""
    circuit = make_assembly("heads").circuit
    evidence = torch.randn(2, 4, 3, generator=seeded(0)).requires_grad_()

    def loss(evidence: Tensor) -> Tensor:
        drawn = reconstruct(circuit, images[:2], evidence, estimator="gumbel", temperature=0.7, generator=seeded(1))
        return drawn.square().sum() / 100

    assert torch.autograd.gradcheck(loss, evidence, atol=1e-6, fast_mode=True)
    hard = reconstruct(circuit, images[:2], evidence, generator=seeded(1)).square().mean()
    assert torch.autograd.grad(hard, evidence)[0].abs().min() > 0


def test_a_circuit_over_whole_examples(double_precision: None, images: Tensor) -> None:
    """As an assembled one it has the same likelihoods, and goes through its inner latents in place of latent values."""
    torch.manual_seed(0)
    parts = ImagePatches((3, 4, 4), 2, 4)
    graph = pc.hclt([-1, *range(47)], 2, parts.leaf)
    circuit = reparameterized(as_assembled(graph, parts), "logits")
    expected = pc.Circuit(graph).log_prob(images.flatten(1))[:, 0]
    torch.testing.assert_close(circuit.log_prob(images).detach(), expected)
    x = images[:1].expand(600, -1, -1, -1)
    again = reconstruct(circuit, x, generator=seeded(0)).flatten(1)
    latents = pc.Circuit(graph)
    posterior = torch.stack([latents.posterior(images[:1].flatten(1), v)[0] for v in range(48)]).detach()
    leaf = {node.variable: node.params for node in graph.nodes if node.kind == "input"}
    mean = torch.stack([posterior[v] @ leaf[v] @ torch.arange(4.0) for v in range(48)])
    assert ((again.mean(0) - mean).abs() < 5 * again.std(0) / 600**0.5).all()
    found = torch.autograd.grad(again.square().mean(), list(circuit.conditional.tables))
    assert all(one.abs().sum() > 0 for one in found)

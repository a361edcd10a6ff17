"""Steps of Glow: inverses and determinants against autograd, bounds of scales, what they begin as."""

import pytest
import torch
from helpers.flows import disturbed
from torch import Tensor

from lvd_lightning.normalizing_flows.steps import (
    CONVOLUTION_LIMIT,
    COUPLING_LIMIT,
    NORM_LIMIT,
    ActNorm,
    AffineCoupling,
    GlowStep,
    InvertibleConvolution,
)

pytestmark = pytest.mark.usefixtures("double_precision")


STEPS = {
    "norm": lambda: ActNorm(3),
    "convolution": lambda: InvertibleConvolution(3, torch.Generator().manual_seed(0)),
    "coupling": lambda: AffineCoupling(3, 4),
    "step": lambda: GlowStep(3, 4, torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_has_an_inverse_and_the_determinant_of_autograd(name: str) -> None:
    step = disturbed(STEPS[name]())
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    y, log_det = step(x)
    assert (step.inverse(y) - x).abs().max() < 1e-10

    def flat(values: Tensor) -> Tensor:
        return step(values.view(1, 3, 4, 4))[0].flatten()

    for number in range(2):
        expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(flat, x[number].flatten())).logabsdet
        assert log_det.expand(2)[number].item() == pytest.approx(expected.item(), abs=1e-9)
        assert abs(expected) > 1e-2


def test_no_parameters_can_make_a_scale_zero_or_infinite() -> None:
    for value in (-1e6, 1e6):
        norm, convolution, coupling = ActNorm(2), InvertibleConvolution(2), AffineCoupling(2, 3)
        norm.raw_scale.data.fill_(value)
        convolution.raw_scale.data.fill_(value)
        coupling.last.bias.data.fill_(value)
        x = torch.zeros(1, 2, 1, 1)
        assert abs(norm(x)[1].item()) == pytest.approx(2 * NORM_LIMIT)
        assert abs(convolution(x)[1].item()) == pytest.approx(2 * CONVOLUTION_LIMIT)
        assert abs(coupling(x)[1].item()) == pytest.approx(COUPLING_LIMIT)
        for step in (norm, convolution):
            assert (step.inverse(step(x)[0]) - x).abs().max() < 1e-6


def test_actnorm_standardises_the_images_that_it_starts_from() -> None:
    x = 5 + torch.tensor([1e-2, 3.0])[:, None, None] * torch.randn(50, 2, 3, 3)
    norm = ActNorm(2)
    norm.start_from(x)
    y = norm(x)[0]
    assert y.mean((0, 2, 3)).abs().max() < 1e-8
    assert (y.var((0, 2, 3), correction=0) - 1).abs().max() < 1e-8
    norm.start_from(torch.ones(4, 2, 3, 3))  # a constant channel
    assert norm(torch.ones(1, 2, 3, 3))[0].isfinite().all()


def test_a_convolution_begins_as_a_rotation_and_keeps_its_permutation() -> None:
    convolution = InvertibleConvolution(6, torch.Generator().manual_seed(3))
    lower, upper, _ = convolution.factors()
    weight = (lower @ upper)[convolution.permutation]
    assert (weight @ weight.T - torch.eye(6)).abs().max() < 1e-9
    assert sorted(convolution.permutation.tolist()) == list(range(6))
    assert "permutation" in dict(convolution.named_buffers())


def test_a_coupling_begins_as_the_identity_and_reads_its_context() -> None:
    coupling, x = AffineCoupling(4, 3, num_context=2), torch.randn(2, 4, 3, 3)
    y, log_det_B = coupling(x, torch.randn(2, 2, 3, 3))
    assert torch.equal(x, y)
    assert log_det_B.tolist() == [0.0, 0.0]
    disturbed(coupling)
    context = torch.randn(2, 2, 3, 3)
    y = coupling(x, context)[0]
    assert torch.equal(y[:, :2], x[:, :2])
    assert (coupling.inverse(y, context) - x).abs().max() < 1e-10
    assert not torch.allclose(coupling(x, context + 1)[0], y)


def test_a_single_channel_has_no_halves() -> None:
    with pytest.raises(ValueError, match="num_channels: got 1, expected 2 or more"):
        AffineCoupling(1, 4)

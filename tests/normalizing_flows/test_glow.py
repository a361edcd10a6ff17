"""Glow: round trips, determinants against autograd, the shapes of its latents, floats of single precision."""

import pytest
import torch
from helpers.flows import disturbed
from torch import Tensor

from lvd_lightning.normalizing_flows import Glow
from lvd_lightning.normalizing_flows.flow_pass import draw_latents, standard_normal


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize(("channels", "levels"), [(1, 1), (3, 2)])
def test_glow_on_4_by_4_has_an_inverse_and_the_determinant_of_autograd(channels: int, levels: int) -> None:
    torch.manual_seed(0)
    glow = disturbed(Glow((channels, 4, 4), 2, levels, 4, torch.Generator().manual_seed(0)), by=0.1)
    x = torch.randn(2, channels, 4, 4, generator=torch.Generator().manual_seed(1))
    found = glow.encode(x)
    assert (glow.decode(found.latents) - x).abs().max() < 1e-10

    def flat(values: Tensor) -> Tensor:
        return torch.cat([z.flatten() for z in glow.encode(values.view(1, channels, 4, 4)).latents])

    for number in range(2):
        jacobian = torch.autograd.functional.jacobian(flat, x[number].flatten())
        expected = torch.linalg.slogdet(jacobian).logabsdet
        assert found.log_det[number].item() == pytest.approx(expected.item(), abs=1e-8)
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(flat(x[number])).sum()
        assert found.log_prob[number].item() == pytest.approx((normal + expected).item(), abs=1e-8)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_the_round_trip_of_many_steps_in_single_precision_is_below_1e_4(temperature: float) -> None:
    torch.manual_seed(0)
    glow = disturbed(Glow((3, 8, 8), 8, 3, 8, torch.Generator().manual_seed(0)), by=0.02)
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    glow.start_from(x)
    assert (glow.decode(glow.encode(x).latents) - x).abs().max() < 1e-4
    drawn = glow.decode(draw_latents(glow.latent_shapes, 4, temperature, x, torch.Generator().manual_seed(2)))
    assert drawn.abs().max() < 10


def test_latents_have_the_shapes_that_are_said_and_as_many_numbers_as_the_image() -> None:
    glow = Glow((3, 8, 16), 1, 3, 4)
    found = glow.encode(torch.randn(2, 3, 8, 16))
    assert [tuple(z.shape[1:]) for z in found.latents] == glow.latent_shapes == [(6, 4, 8), (12, 2, 4), (48, 1, 2)]
    assert sum(z[0].numel() for z in found.latents) == 3 * 8 * 16
    assert [tuple(h.shape[1:]) for h in found.hidden] == [(12, 4, 8), (24, 2, 4), (48, 1, 2)]


def test_steps_see_standard_channels_at_first() -> None:
    x = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.5
    glow = Glow((3, 8, 8), 3, 2, 4, torch.Generator().manual_seed(1))
    glow.start_from(x)
    normed = []
    for step in (*glow.level_steps(0), *glow.level_steps(1)):
        step.norm.register_forward_hook(lambda _, __, output: normed.append(output[0]))
    glow.encode(x)
    assert len(normed) == 6
    for y in normed:
        assert y.mean((0, 2, 3)).abs().max() < 1e-4
        assert (y.var((0, 2, 3)) - 1).abs().max() < 1e-2


def test_sides_that_cannot_be_halved_so_often_are_refused() -> None:
    with pytest.raises(ValueError, match="num_levels: got 3 for images of 8 x 12"):
        Glow((3, 8, 12), 1, 3, 4)


def test_the_normal_density_is_that_of_torch() -> None:
    z = torch.randn(3, 2, 2, 2)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2, 3))
    assert torch.allclose(standard_normal([z[:, :1], z[:, 1:]]), expected, atol=1e-5)

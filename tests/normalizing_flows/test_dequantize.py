"""Dequantisation: against the exact sum over all noise on a few pixels, and what it refuses."""

import math

import pytest
import torch
from helpers.flows import disturbed

from lvd_lightning.normalizing_flows import Dequantizer

pytestmark = pytest.mark.usefixtures("double_precision")


def normal_probability(level: int, num_levels: int) -> float:
    """Of a whole number under a standard normal density over [-0.5, 0.5)."""
    low, high = (torch.tensor((level + step) / num_levels - 0.5) for step in (0, 1))
    normal = torch.distributions.Normal(0.0, 1.0)
    return float(normal.cdf(high) - normal.cdf(low))


@pytest.mark.parametrize("kind", ["uniform", "variational"])
def test_the_mean_weight_is_the_probability_of_whole_numbers(kind: str) -> None:
    shape, levels = (1, 2, 2), [[0, 3], [1, 2]]
    dequantizer = disturbed(Dequantizer(kind, shape, [4], hidden_size=4))
    images = torch.tensor(levels)[None, None].expand(20_000, -1, -1, -1)
    x, log_weight_B = dequantizer(images, torch.Generator().manual_seed(0))
    log_B = torch.distributions.Normal(0.0, 1.0).log_prob(x).flatten(1).sum(1) + log_weight_B
    expected = math.prod(normal_probability(level, 4) for row in levels for level in row)
    weight_B = log_B.exp()
    error = weight_B.std().item() / math.sqrt(len(images))
    assert abs(weight_B.mean().item() - expected) < 4 * error
    assert log_B.mean().item() < math.log(expected)
    assert torch.equal(dequantizer.levels(x), images.to(torch.uint8))


def test_variational_noise_depends_on_the_image_and_has_gradients() -> None:
    dequantizer = disturbed(Dequantizer("variational", (1, 2, 2), [4], hidden_size=4))
    dark, bright = torch.zeros(1, 1, 2, 2, dtype=torch.int64), torch.full((1, 1, 2, 2), 3)
    noise = [dequantizer(image, torch.Generator().manual_seed(0))[0] * 4 + 2 - image for image in (dark, bright)]
    assert not torch.allclose(*noise)
    x, log_weight_B = dequantizer(dark, torch.Generator().manual_seed(0))
    (x.sum() + log_weight_B.sum()).backward()
    assert all(parameter.grad is not None for parameter in dequantizer.parameters())


def test_channels_may_have_numbers_of_values_of_their_own() -> None:
    dequantizer = Dequantizer("uniform", (2, 1, 1), [256, 511])
    images = torch.tensor([255, 510]).view(1, 2, 1, 1)
    x, log_weight_B = dequantizer(images)
    assert log_weight_B.item() == pytest.approx(-math.log(256 * 511))
    assert dequantizer.levels(x).flatten().tolist() == [255, 510]
    assert dequantizer.levels(torch.tensor([float("nan"), 9.0]).view(1, 2, 1, 1)).flatten().tolist() == [0, 510]


def test_odd_sides_and_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="variational needs even sides, got images of 3 x 4"):
        Dequantizer("variational", (1, 3, 4), [4])
    with pytest.raises(ValueError, match="dequantization: got 'none'"):
        Dequantizer("none", (1, 4, 4), [4])

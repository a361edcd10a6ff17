"""Losses in a teacher's layers: gradients for images by central differences, and what teachers keep to themselves."""

from collections.abc import Callable

import pytest
import torch
from helpers.estimates import seeded
from torch import nn

from lvd_lightning.perceptual.activations import activation_distance, last_features, pooled_features, seeing
from lvd_lightning.perceptual.encoder import LatentEncoder
from lvd_lightning.teachers import MAE, VQVAE

SMALL: dict[str, Callable[[], nn.Module]] = {
    "mae": lambda: MAE(
        8,
        4,
        hidden_size=8,
        num_layers=2,
        num_heads=2,
        intermediate_size=8,
        decoder_hidden_size=8,
        decoder_num_layers=1,
        decoder_num_heads=1,
        num_channels=1,
        num_categories=17,
    ),
    "vqvae": lambda: VQVAE(
        8,
        4,
        channels=8,
        num_residual_blocks=1,
        num_features=5,
        codebook_size=4,
        num_components=2,
        prior_hidden_size=8,
        prior_num_layers=1,
        prior_num_heads=1,
        num_channels=1,
        num_categories=17,
    ),
}


@pytest.fixture(params=SMALL)
def teacher(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return seeing(SMALL[request.param]().double(), "test")


def scaled(seed: int) -> torch.Tensor:
    return torch.rand(2, 1, 8, 8, dtype=torch.float64, generator=seeded(seed)) * 2 - 1


def test_gradients_for_images(teacher: nn.Module) -> None:
    others = scaled(1)
    for function in (
        lambda x: activation_distance(teacher, x, others),
        lambda x: last_features(teacher, x),
        lambda x: pooled_features(teacher, x),
    ):
        assert torch.autograd.gradcheck(function, scaled(0).requires_grad_(), fast_mode=True)


def test_features_are_those_of_the_teacher(teacher: nn.Module) -> None:
    """Of whole numbers, every patch in sight of all others."""
    images = torch.randint(17, (2, 1, 8, 8), dtype=torch.uint8, generator=seeded(0))
    visible = torch.ones(4, 4, dtype=torch.bool) if teacher.contextual else None
    found = last_features(teacher, teacher.scale.floats(images, torch.float64))
    torch.testing.assert_close(found.float(), teacher.features(images, visible), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(pooled_features(teacher, teacher.scale.spread(images.double())), found.mean(1))


def test_the_distance_is_that_of_directions(teacher: nn.Module) -> None:
    same, other = scaled(0), scaled(1)
    assert activation_distance(teacher, same, same).max() < 1e-12
    found = activation_distance(teacher, same, other)
    layers = list(zip(teacher.activations(same), teacher.activations(other), strict=True))
    assert len(layers) > 1
    expected = torch.zeros(2, dtype=torch.float64)
    for one, two in layers:
        first, second = (nn.functional.normalize(found_BLE, dim=2) for found_BLE in (one, two))
        expected += (first - second).norm(dim=2).square().mean(1) / len(layers)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert found.min() > 1e-3


def test_teachers_do_not_learn(teacher: nn.Module) -> None:
    images = scaled(0).requires_grad_()
    last_features(teacher, images).sum().backward()
    assert images.grad is not None
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_teacher_that_shows_no_layers_is_named() -> None:
    with pytest.raises(ValueError, match=r"mine: a Linear has no activations\(images\)"):
        seeing(nn.Linear(2, 2), "mine")


def test_an_encoder_gives_log_probabilities() -> None:
    torch.manual_seed(0)
    encoder = LatentEncoder((1, 8, 12), patch_size=4, num_states=5, channels=4)
    found = encoder(torch.randn(3, 1, 8, 12))
    assert found.shape == (3, 6, 5)
    torch.testing.assert_close(found.exp().sum(2), torch.ones(3, 6))

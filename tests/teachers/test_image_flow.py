"""A flow as a model of images: its bounds, features of patches, samples, files."""

import math
from pathlib import Path

import pytest
import torch
from helpers.flows import disturbed

from lvd_lightning.teachers import ImageFlow, load_teacher, save_teacher

IMAGES = torch.randint(256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def small(**settings: object) -> ImageFlow:
    torch.manual_seed(0)
    made = ImageFlow((3, 8, 8), 2, 2, 4, generator=torch.Generator().manual_seed(0), **settings)  # type: ignore[arg-type]
    made.start_from(IMAGES, torch.Generator().manual_seed(1))
    return disturbed(made, by=0.05)


def test_the_bounds_are_in_order_and_the_weighted_one_of_a_single_draw_is_the_bound() -> None:
    flow = small(dequantization="variational")

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(3)

    one_B = flow.log_prob_bound(IMAGES, 1, generator())
    assert torch.equal(one_B, flow.importance_weighted_bound(IMAGES, 1, generator()))
    bound_B, weighted_B = (
        bound(IMAGES, 20, generator()) for bound in (flow.log_prob_bound, flow.importance_weighted_bound)
    )
    assert (bound_B < weighted_B).all()
    x, log_weight_B = flow.continuous(IMAGES, generator())
    assert torch.allclose(one_B, flow.flow.encode(x).log_prob + log_weight_B)


def test_the_density_of_a_small_flow_is_a_probability() -> None:
    """Over all images of four pixels of two values each, the mean weights add up to what the density has there."""
    torch.manual_seed(0)
    flow = disturbed(ImageFlow((1, 2, 2), 1, 1, 4, patch_size=2, num_categories=2, generator=None), by=0.1)
    flow.flow.level_steps(0)[0].norm.raw_scale.data += 1.0  # most of the density is within [-0.5, 0.5)
    images = torch.tensor([[number >> bit & 1 for bit in range(4)] for number in range(16)]).view(16, 1, 2, 2)
    many = images.repeat(2000, 1, 1, 1)
    log_B = flow.log_prob_bound(many, 1, torch.Generator().manual_seed(0))
    inside = flow.flow.decode([torch.randn(20_000, 4, 1, 1, generator=torch.Generator().manual_seed(1))])
    expected = (inside.abs() < 0.5).flatten(1).all(1).double().mean().item()
    assert 0.05 < expected < 1
    assert log_B.exp().sum().item() / 2000 == pytest.approx(expected, abs=0.02)


def test_log_prob_is_the_same_whenever_it_is_asked() -> None:
    flow = small()
    first = flow.log_prob(IMAGES)
    torch.rand(3)
    assert torch.equal(first, flow.log_prob(IMAGES))
    assert torch.equal(first, flow.elbo(IMAGES))


@pytest.mark.parametrize(("feature", "patch_size", "size"), [("latents", 2, 12), ("latents", 4, 24), ("hidden", 2, 4)])
def test_features_are_those_of_the_level_whose_grid_is_that_of_the_patches(
    feature: str, patch_size: int, size: int
) -> None:
    flow = small(feature=feature, patch_size=patch_size)
    features_BPE = flow.features(IMAGES)
    side = 8 // patch_size
    assert features_BPE.shape == (3, side * side, size)
    changed = IMAGES.clone()
    changed[0, :, :1, :1] ^= 128
    difference_P = (flow.features(changed)[0] - features_BPE[0]).abs().amax(1)
    assert difference_P.argmax() == 0 or patch_size == 2
    assert difference_P[0] > 1e-4
    if feature == "latents" and patch_size == 4:
        latent = flow.flow.encode((IMAGES + 0.5) / 256 - 0.5).latents[-1]
        assert torch.equal(features_BPE, latent.flatten(2).mT)


def test_activations_are_those_of_every_level_with_the_features_last_and_have_gradients() -> None:
    flow = small(patch_size=4)
    scaled = (IMAGES.float() / 127.5 - 1).requires_grad_()
    *layers, features_BPE = flow.activations(scaled)
    assert [tuple(layer.shape) for layer in layers] == [(3, 16, 4), (3, 4, 4)]
    assert torch.allclose(features_BPE, flow.features(IMAGES), atol=1e-4)
    hidden = small(patch_size=2, feature="hidden").features(IMAGES)
    assert torch.allclose(layers[0], hidden, atol=1e-4)
    features_BPE.sum().backward()
    assert scaled.grad is not None
    assert bool(scaled.grad.abs().amax((1, 2, 3)).gt(0).all())


def test_patches_without_a_level_and_hidden_parts_are_refused() -> None:
    with pytest.raises(ValueError, match="patch_size: got 8, but the 2 levels of the flow have patches of side 2, 4"):
        small(patch_size=8).features(IMAGES)
    with pytest.raises(ValueError, match="expected None: a flow encodes whole images"):
        small().features(IMAGES, torch.ones(4, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"images: got torch.uint8 with shape \(3, 3, 8, 4\)"):
        small().log_prob(IMAGES[..., :4])
    with pytest.raises(ValueError, match="temperature: got 0, expected more than 0"):
        small().sample(2, temperature=0)


def test_samples_of_a_low_temperature_are_nearer_to_each_other() -> None:
    flow = small()
    cold, warm = (flow.sample(20, t, torch.Generator().manual_seed(0)).float() for t in (0.1, 1.0))
    assert cold.shape == (20, 3, 8, 8)
    assert cold.std(0).mean() < 0.5 * warm.std(0).mean()
    assert 0 <= warm.min() <= warm.max() <= 255


def test_a_flow_is_saved_and_loaded(tmp_path: Path) -> None:
    flow = small(dequantization="variational", num_categories=[256, 511, 511])
    images = IMAGES.short()
    save_teacher(flow, tmp_path)
    loaded = load_teacher(tmp_path)
    assert isinstance(loaded, ImageFlow)
    assert torch.equal(loaded.log_prob(images), flow.log_prob(images))
    assert loaded.num_parameters == flow.num_parameters
    assert math.isfinite(float(loaded.log_prob(images).sum()))

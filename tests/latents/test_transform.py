"""Centring, principal components, whitening, unit length: against their definitions, over several chunks."""

import pytest
import torch
from torch import Tensor

from lvd_lightning.latents import transform
from lvd_lightning.latents.transform import fit_map


class InMemory:
    def __init__(self, x_NPE: Tensor) -> None:
        self._x = x_NPE
        self.shape = (x_NPE.shape[0], x_NPE.shape[1], x_NPE.shape[2])

    def read(self, start: int, stop: int) -> Tensor:
        return self._x[start:stop]

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        return self._x[images, positions]


@pytest.fixture
def x(monkeypatch: pytest.MonkeyPatch) -> Tensor:
    monkeypatch.setattr(transform, "_CHUNK_ENTRIES", 100)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(3, 4, 4, generator=generator)
    return (
        torch.einsum("npe,pef->npf", torch.randn(60, 3, 4, generator=generator), mixing)
        + 7 * torch.arange(3.0)[:, None]
    )


def test_nothing_asked_nothing_done(x: Tensor) -> None:
    fitted = fit_map(InMemory(x), center=False, per_position=False)
    assert torch.equal(fitted.of_images(x), x)


def test_centring_takes_each_positions_mean(x: Tensor) -> None:
    fitted = fit_map(InMemory(x), center=True, per_position=False)
    torch.testing.assert_close(fitted.of_images(x), x - x.mean(0))


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_whitened_components_are_uncorrelated_with_unit_variance(x: Tensor, center: bool, per_position: bool) -> None:
    y = fit_map(InMemory(x), center=center, per_position=per_position, num_components=2, whiten=True).of_images(x)
    groups = list(y.unbind(1)) if per_position else [y.flatten(0, 1)]
    for group in groups:
        torch.testing.assert_close(group.T @ group / len(group), torch.eye(2), atol=1e-4, rtol=0)


def test_components_keep_the_most_variance(x: Tensor) -> None:
    flat = x.flatten(0, 1)
    y = fit_map(InMemory(x), center=False, per_position=False, num_components=2).of_images(x).flatten(0, 1)
    _, values, vectors = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
    torch.testing.assert_close(y.square().sum(), values[:2].square().sum())
    projected = (flat - flat.mean(0)) @ vectors[:2].T
    torch.testing.assert_close(y.abs(), projected.abs(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("per_position", [False, True])
@pytest.mark.parametrize("num_components", [None, 3])
def test_single_patches_are_mapped_like_whole_images(x: Tensor, per_position: bool, num_components: int | None) -> None:
    fitted = fit_map(InMemory(x), center=True, per_position=per_position, num_components=num_components)
    images, positions = torch.tensor([5, 0, 5, 9]), torch.tensor([2, 0, 0, 1])
    torch.testing.assert_close(
        fitted.of_patches(x[images, positions], positions), fitted.of_images(x)[images, positions]
    )


@pytest.mark.parametrize("num_components", [None, 3])
def test_directions_are_what_is_left_of_length(x: Tensor, num_components: int | None) -> None:
    plain = fit_map(InMemory(x), center=True, per_position=False, num_components=num_components)
    fitted = plain._replace(normalize=True)
    y = plain.of_images(x)
    torch.testing.assert_close(fitted.of_images(x), y / y.square().sum(2, keepdim=True).sqrt())
    images, positions = torch.tensor([5, 0]), torch.tensor([2, 0])
    found = fitted.of_patches(x[images, positions], positions)
    torch.testing.assert_close(found, fitted.of_images(x)[images, positions])
    nothing = fit_map(InMemory(x * 0), center=True, per_position=False)._replace(normalize=True)
    assert torch.equal(nothing.of_images(x * 0), x * 0)


def test_features_that_do_not_vary_are_not_blown_up(x: Tensor) -> None:
    constant = torch.cat([x, torch.full_like(x[..., :1], 3.0)], dim=2)
    y = fit_map(InMemory(constant), center=True, per_position=False, whiten=True).of_images(constant)
    assert y.shape == constant.shape
    assert y.abs().max() < 10


def test_too_many_components_are_refused(x: Tensor) -> None:
    with pytest.raises(ValueError, match="pca: got 5"):
        fit_map(InMemory(x), center=True, per_position=False, num_components=5)


@pytest.mark.parametrize("center", [False, True])
def test_values_and_features_vary_by_their_shares(x: Tensor, center: bool) -> None:
    y = fit_map(InMemory(x), center=center, per_position=False, values=(3, 0.2)).of_images(x)
    deviation = y - y.mean(0) if center else (y - y.flatten(0, 1).mean(0))
    variance_E = deviation.square().mean((0, 1))
    torch.testing.assert_close(variance_E[1:].sum().item(), 0.2)
    torch.testing.assert_close(variance_E[:1].sum().item(), 0.8)
    ratio = deviation[..., 1:] / (x - (x.mean(0) if center else x.flatten(0, 1).mean(0)))[..., 1:]
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), atol=1e-3, rtol=1e-3)  # scaled as a whole


def test_components_are_those_of_what_was_scaled(x: Tensor) -> None:
    scaled = fit_map(InMemory(x), center=False, per_position=False, values=(2, 0.5)).of_images(x)
    both = fit_map(InMemory(x), center=False, per_position=False, values=(2, 0.5), num_components=2).of_images(x)
    alone = fit_map(InMemory(scaled), center=False, per_position=False, num_components=2).of_images(scaled)
    torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)


def test_a_share_of_what_does_not_vary_is_refused(x: Tensor) -> None:
    x[..., -1] = 1.0
    with pytest.raises(ValueError, match="value_share: got 0.5, expected 0, since all values are constant"):
        fit_map(InMemory(x), center=False, per_position=False, values=(1, 0.5))

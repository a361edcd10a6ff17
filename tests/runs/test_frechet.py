"""The Frechet distance against its closed form and SciPy's matrix root, and how often its interval holds it."""

import math

import pytest
import torch
from helpers.estimates import seeded
from scipy.linalg import sqrtm
from torch import Tensor

from lvd_lightning.runs.frechet import frechet, frechet_distance


def normal(number: int, seed: int, spread: float = 1.0, shift: float = 0.0) -> Tensor:
    return torch.randn(number, 3, generator=seeded(seed)) * spread + shift


def test_it_is_that_of_means_and_covariances() -> None:
    x = normal(50, 0) @ torch.randn(3, 3, generator=seeded(2))
    y = normal(70, 1, 2.0, 1.0) @ torch.randn(3, 3, generator=seeded(3))
    c, d = (torch.cov(t.double().T).numpy() for t in (x, y))
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + (c + d - 2 * sqrtm(c @ d).real).trace()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)


def test_features_without_variance_in_a_direction() -> None:
    flat = normal(50, 0)
    flat[:, 2] = 0.0
    assert math.isfinite(frechet_distance(flat, flat + 1))
    assert frechet_distance(flat, flat + 1) == pytest.approx(3.0, rel=1e-5)


def test_the_interval_is_as_wide_as_the_distance_scatters() -> None:
    """40 pairs of sets: nearly all intervals hold the mean of the distances, and they are not needlessly wide."""
    found = [frechet(normal(200, 2 * i), normal(200, 2 * i + 1, 1.5, 0.5)) for i in range(40)]
    distance = torch.tensor([one.distance for one in found])
    mean, scatter = float(distance.mean()), float(distance.std())
    assert sum(one.low <= mean <= one.high for one in found) >= 35
    width = torch.tensor([(one.high - one.low) / 2 for one in found]).mean()
    assert 1.4 * scatter < float(width) < 3.5 * scatter


def test_few_features_have_an_interval_without_end() -> None:
    assert frechet(normal(2, 0), normal(3, 1)).high == math.inf


def test_errors() -> None:
    for one, other in (
        (normal(1, 0), normal(5, 1)),
        (normal(5, 0), normal(5, 1)[:, :2]),
        (normal(5, 0)[0], normal(5, 1)),
    ):
        with pytest.raises(ValueError, match="frechet: got features"):
            frechet_distance(one, other)

"""Units of likelihoods: conversion from nats, direction, the uniform model."""

import math

import pytest
import torch

from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.units import BitsPerDimension, Nats, Perplexity, Unit

CASES = [
    (BitsPerDimension(), 12 * math.log(2.0) / 6, "min"),
    (Perplexity(100), math.exp(12 * math.log(2.0) ** 2 / 6), "min"),
    (Nats(), -12 * math.log(2.0) ** 2, "max"),
]


@pytest.mark.parametrize(("unit", "expected", "mode"), CASES)
def test_conversion_from_nats(unit: Unit, expected: float, mode: str) -> None:
    nats = -12 * math.log(2.0) ** 2
    assert unit.from_nats(nats, num_dims=6) == pytest.approx(expected)
    assert float(unit.from_nats(torch.tensor(3 * nats), 6, 3)) == pytest.approx(expected)
    assert unit.mode == mode


def test_a_model_worse_than_uniform_is_told_in_either_direction() -> None:
    assert BitsPerDimension(uniform=4.0).is_worse_than_uniform(4.1)
    assert not BitsPerDimension(uniform=4.0).is_worse_than_uniform(3.9)
    assert Nats(uniform=-10.0).is_worse_than_uniform(-11.0)
    assert not Nats(uniform=-10.0).is_worse_than_uniform(-9.0)
    assert not Nats().is_worse_than_uniform(-1e9)


def test_a_density_is_never_shown_as_bits() -> None:
    assert Nats(is_density=True).label == "nats (density)"
    assert Nats().label == "nats"


@pytest.mark.parametrize(("unit", "expected", "mode"), CASES)
def test_the_metric_weighs_examples(unit: Unit, expected: float, mode: str) -> None:
    metric = MeanLikelihood(unit, num_dims=6)
    metric.update(torch.full((4,), -12 * math.log(2.0) ** 2), weight=torch.tensor([1.0, 0.0, 2.0, 1.0]))
    assert float(metric.compute()) == pytest.approx(expected)
    assert metric.higher_is_better == (mode == "max")

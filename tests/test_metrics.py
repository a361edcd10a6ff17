"""Bits per dimension, by hand."""

import math

import pytest
import torch

from lvd_lightning.metrics import BitsPerDim, LVDGap, TokenPerplexity
from lvd_lightning.units import BitsPerDimension


def test_bits_per_dimension() -> None:
    metric = BitsPerDim(4)
    metric.update(torch.tensor([-8.0, -4.0]) * math.log(2))  # 8 and 4 bits over four dimensions
    assert metric.compute().item() == pytest.approx(1.5)
    metric.update(torch.tensor([-12.0]) * math.log(2))
    assert metric.compute().item() == pytest.approx(2.0)


def test_weights_count_examples() -> None:
    metric = BitsPerDim(1)
    metric.update(torch.tensor([-1.0, -5.0, -torch.inf]) * math.log(2), torch.tensor([3.0, 1.0, 0.0]))
    assert metric.compute().item() == pytest.approx(2.0)
    metric.update(torch.tensor([-6.0]) * math.log(2), 4.0)
    assert metric.compute().item() == pytest.approx(4.0)


def test_many_float32_likelihoods_keep_their_digits() -> None:
    metric = BitsPerDim(1)
    for _ in range(200):
        metric.update(torch.full((1000,), -12345.678))
    assert metric.compute().item() * math.log(2) == pytest.approx(float(torch.tensor(12345.678)), rel=1e-12)


def test_no_gradient_is_kept() -> None:
    metric = BitsPerDim(1)
    metric.update(torch.tensor([-1.0], requires_grad=True))
    assert not metric.compute().requires_grad


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_impossible_examples_are_infinite_and_no_examples_are_nan() -> None:
    metric = BitsPerDim(1)
    metric.update(torch.tensor([-1.0, -torch.inf]))
    assert metric.compute().item() == math.inf
    metric.reset()
    assert torch.isnan(metric.compute())


def test_no_dimensions_are_refused() -> None:
    with pytest.raises(ValueError, match="num_dims: got 0, expected a whole number of at least 1"):
        BitsPerDim(0)


def test_lvd_gap_has_means_in_nats_and_bits() -> None:
    metric = LVDGap(BitsPerDimension(), 2)
    bits = math.log(2)
    metric.update(torch.tensor([-4.0, -8.0]) * bits, torch.tensor([-6.0, -10.0]) * bits, torch.tensor([-5.0, -9.0]))
    found = metric.compute()
    assert list(found) == ["teacher_elbo", "lvd_objective", "log_prob"]
    assert found["log_prob"] == pytest.approx({"nats": -6.0 * bits, "bpd": 3.0})
    assert found["lvd_objective"] == pytest.approx({"nats": -8.0 * bits, "bpd": 4.0})
    assert found["teacher_elbo"]["nats"] == -7.0
    metric.update(torch.tensor([0.0]), torch.tensor([0.0]))  # an example of which the teacher has no bound
    assert list(metric.compute()) == ["lvd_objective", "log_prob"]
    with pytest.raises(ValueError, match="num_dims"):
        LVDGap(BitsPerDimension(), 0)


def test_perplexity_of_texts_of_any_lengths() -> None:
    metric, other = TokenPerplexity("carried"), TokenPerplexity("carried")
    metric.update(torch.tensor([-2.0, -9.0]), num_tokens=torch.tensor([2, 5]))
    other.update(torch.tensor([-1.0], requires_grad=True), num_tokens=3)
    metric.merge_state(other)  # as over ranks
    assert float(metric.compute()) == pytest.approx(math.exp(12 / 10))
    assert not metric.compute().requires_grad
    with pytest.raises(ValueError, match="protocol: got 'sentence', expected one of window, carried"):
        TokenPerplexity("sentence")

"""Mixtures of discretised logistics: normalised, equal to differences of sigmoids, exact in the tails."""

import itertools

import pytest
import torch
from torch import Tensor

from lvd_lightning.teachers.logistics import LogisticMixture


def _raw(num_components: int, num_channels: int, num_pixels: int = 1, seed: int = 0, spread: float = 1.0) -> Tensor:
    shape = (LogisticMixture.num_parameters(num_components, num_channels), num_pixels)
    return spread * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("spread", [0.3, 1.0, 3.0, 10.0])
def test_all_bytes_sum_to_one(spread: float) -> None:
    mixture = LogisticMixture.from_raw(_raw(3, 1, 5, spread=spread), 3, 1)
    values = torch.arange(256).view(-1, 1, 1).expand(-1, 1, 5)
    torch.testing.assert_close(mixture.log_prob(values).exp().sum(0), torch.ones(5, dtype=torch.float64))


@pytest.mark.parametrize(("num_channels", "num_values"), [(1, 2), (2, 9), (3, 6), (4, 3)])
def test_all_pixels_sum_to_one(num_channels: int, num_values: int) -> None:
    """Channels depend on each other: the sum runs over all of a pixel's values at once."""
    mixture = LogisticMixture.from_raw(_raw(4, num_channels, 3), 4, num_channels, num_values)
    pixels = torch.tensor(list(itertools.product(range(num_values), repeat=num_channels)))
    total = mixture.log_prob(pixels[:, :, None].expand(-1, -1, 3)).exp().sum(0)
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.float64))


def test_the_last_byte_sums_out() -> None:
    """p(Y, Co) is the sum of p(Y, Co, Cg) over the 256 values of Cg, and a mixture of its own."""
    raw = _raw(3, 3).unflatten(0, (3, 10))
    without = torch.cat([raw[:, :3], raw[:, 4:6], raw[:, 7:8]], dim=1).flatten(0, 1)
    pair = torch.tensor([[13], [200]])
    triples = torch.stack([pair[0].expand(256), pair[1].expand(256), torch.arange(256)], dim=1)[:, :, None]
    found = LogisticMixture.from_raw(raw.flatten(0, 1), 3, 3).log_prob(triples).logsumexp(0)
    torch.testing.assert_close(found, LogisticMixture.from_raw(without, 3, 2).log_prob(pair))


def test_masses_are_differences_of_sigmoids() -> None:
    raw = _raw(2, 3, 4)
    weight, location, log_scale, coupling = raw.unflatten(0, (2, 10)).split([1, 3, 3, 3], dim=1)
    x = torch.randint(256, (3, 4), generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 0], x[2, 1] = 0, 255, 255
    scaled = x / 127.5 - 1
    shift = torch.stack(
        [torch.zeros(2, 4), coupling[:, 0] * scaled[0], coupling[:, 1] * scaled[0] + coupling[:, 2] * scaled[1]], dim=1
    )
    edge = lambda value: torch.sigmoid((value - location - shift) / log_scale.exp())  # noqa: E731
    upper = torch.where(x == 255, 1.0, edge((x + 0.5) / 127.5 - 1))
    lower = torch.where(x == 0, 0.0, edge((x - 0.5) / 127.5 - 1))
    expected = (weight[:, 0].softmax(0) * (upper - lower).prod(1)).sum(0).log()
    torch.testing.assert_close(LogisticMixture.from_raw(raw, 2, 3).log_prob(x), expected)


@pytest.mark.parametrize("log_scale", [-50.0, -7.0, 0.0, 50.0])
def test_tails_are_finite_in_float32(log_scale: float) -> None:
    raw = torch.tensor([0.0, 0.9, log_scale])[:, None].requires_grad_()
    values = torch.tensor([0, 1, 128, 254, 255])[:, None, None]
    log_prob = LogisticMixture.from_raw(raw, 1, 1).log_prob(values)
    log_prob.sum().backward()
    assert log_prob.isfinite().all()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()


def test_a_tail_falls_by_the_scale() -> None:
    """One value further from the location costs 1 / scale nats, where probabilities have long been zero in floats."""
    raw = torch.tensor([0.0, 1.0, -5.0])[:, None]
    log_prob = LogisticMixture.from_raw(raw, 1, 1).log_prob(torch.tensor([1, 2])[:, None, None])[:, 0]
    assert log_prob[0] < -200
    assert (log_prob[1] - log_prob[0]).item() == pytest.approx(torch.tensor(5.0).exp().item() / 127.5, rel=1e-3)


def test_means_are_those_of_all_values() -> None:
    raw = 0.3 * _raw(3, 2, 4)
    parts = raw.unflatten(0, (3, 6))
    parts[:, 3:5] -= 4.0  # narrow enough that little lies beyond the edges
    mixture = LogisticMixture.from_raw(raw, 3, 2)
    pixels = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    prob = mixture.log_prob(pixels[:, :, None].expand(-1, -1, 4)).exp()
    expected = (prob[:, None] * pixels[:, :, None]).sum(0)
    torch.testing.assert_close(mixture.mean(), expected, rtol=0, atol=0.05)


def test_a_gradient_step_raises_the_likelihood() -> None:
    """Values a mixture of two can hold: the fit finds both."""
    generator = torch.Generator().manual_seed(0)
    values = torch.where(torch.rand(500, generator=generator) < 0.3, 40, 180)[:, None, None]
    raw = _raw(2, 1, spread=0.5).requires_grad_()
    optimizer = torch.optim.Adam([raw], lr=0.1)
    for _ in range(300):
        loss = -LogisticMixture.from_raw(raw, 2, 1).log_prob(values).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.75  # the entropy of the draw is 0.61 nats

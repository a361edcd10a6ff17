"""The adversary: its losses by hand, R1 by central differences, and a game that it wins."""

import pytest
import torch
from helpers.estimates import seeded
from torch import Tensor, nn
from torch.nn.functional import softplus

from lvd_lightning.perceptual.discriminator import Discriminator, adversary_loss, sample_loss


class Squares(nn.Module):
    """a |x|^2: its gradient is 2 a x."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.a * x.square().flatten(1).sum(1)


def test_losses_are_those_of_the_papers() -> None:
    network = Squares()
    images = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=seeded(0))
    samples = torch.randn(3, 1, 2, 2, dtype=torch.float64, generator=seeded(1))
    real, drawn = 0.3 * images.square().flatten(1).sum(1), 0.3 * samples.square().flatten(1).sum(1)
    steep = (0.6 * images).square().flatten(1).sum(1).mean()
    expected = softplus(-real).mean() + softplus(drawn).mean() + 5.0 / 2 * steep
    torch.testing.assert_close(adversary_loss(network, samples, images, 5.0), expected)
    torch.testing.assert_close(adversary_loss(network, samples, images, 0.0), expected - 5.0 / 2 * steep)
    torch.testing.assert_close(sample_loss(drawn), softplus(-drawn).mean())


def test_the_gradient_of_the_penalty() -> None:
    """A second derivative: central differences in the network's parameter."""
    network = Squares()
    images, samples = (torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=seeded(s)) for s in (0, 1))
    (found,) = torch.autograd.grad(adversary_loss(network, samples, images, 5.0), network.a)
    values = []
    for shift in (1e-5, -2e-5):
        network.a.data += shift
        values.append(float(adversary_loss(network, samples, images, 5.0)))
    assert float(found) == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_no_gradient_reaches_the_samples() -> None:
    samples = torch.zeros(2, 1, 8, 8, requires_grad=True)
    adversary_loss(Discriminator((1, 8, 8), 4), samples, torch.zeros(2, 1, 8, 8), 1.0).backward()
    assert samples.grad is None


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 20), (3, 4, 4), (1, 28, 28)])
def test_it_learns_to_tell_bright_from_dark(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    network = Discriminator(shape, channels=4)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    images, samples = (torch.randn(8, *shape, generator=seeded(s)) + c for s, c in ((0, 0.5), (1, -0.5)))
    for _ in range(25):
        optimizer.zero_grad()
        adversary_loss(network, samples, images, 0.01).backward()
        optimizer.step()
    assert network(images).mean() > network(samples).mean() + 1

"""Maximum mean discrepancy: by hand, its gradient, and what it says of sets that are alike and of such that are not."""

import math

import pytest
import torch
from helpers.estimates import seeded

from lvd_lightning.perceptual.mmd import mmd


def test_it_is_the_estimate_of_the_definition() -> None:
    """Two samples, three data, one kernel: sums over pairs."""
    x, y = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).double(), torch.tensor([[1.0, 1.0], [0.0, 3.0], [2.0, 2.0]]).double()
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    scale = sum(float((y[i] - y[j]).square().sum()) for i, j in pairs) / 6

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (0.5 * scale))

    expected = kernel(x[0], x[1]) + sum(kernel(y[i], y[j]) for i, j in pairs) / 6
    expected -= 2 * sum(kernel(a, b) for a in x for b in y) / 6
    assert float(mmd(x, y, widths=(0.5,))) == pytest.approx(expected, rel=1e-12)
    assert float(mmd(x, y, widths=(0.5, 2.0))) == pytest.approx(
        float(mmd(x, y, widths=(0.5,)) + mmd(x, y, widths=(2.0,))) / 2
    )


def test_its_gradient() -> None:
    x = torch.randn(5, 2, 3, dtype=torch.float64, generator=seeded(0)).requires_grad_()
    y = torch.randn(7, 2, 3, dtype=torch.float64, generator=seeded(1))
    assert torch.autograd.gradcheck(lambda x: mmd(x, y), x)


def test_it_has_no_bias_and_no_unit() -> None:
    values = [
        float(mmd(torch.randn(40, 4, generator=seeded(2 * i)), torch.randn(40, 4, generator=seeded(2 * i + 1))))
        for i in range(60)
    ]
    found = torch.tensor(values)
    assert abs(float(found.mean())) < 4 * float(found.std()) / 60**0.5
    x, y = torch.randn(40, 4, generator=seeded(0)), torch.randn(40, 4, generator=seeded(1)) + 1
    torch.testing.assert_close(mmd(1000 * x, 1000 * y), mmd(x, y))
    assert mmd(x, y) > 10 * found.std()


def test_the_gradient_moves_samples_to_the_data() -> None:
    y = torch.randn(100, 2, generator=seeded(0)) + torch.tensor([3.0, -1.0])
    shift = torch.zeros(2, requires_grad=True)
    noise = torch.randn(100, 2, generator=seeded(1))
    optimizer = torch.optim.Adam([shift], lr=0.1)
    for _ in range(150):
        optimizer.zero_grad()
        mmd(noise + shift, y).backward()
        optimizer.step()
    assert (shift.detach() - torch.tensor([3.0, -1.0])).abs().max() < 0.4


def test_errors() -> None:
    for x, y in ((torch.zeros(1, 2), torch.zeros(3, 2)), (torch.zeros(3, 2), torch.zeros(3, 3))):
        with pytest.raises(ValueError, match="mmd: got samples"):
            mmd(x, y)

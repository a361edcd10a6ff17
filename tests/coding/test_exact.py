"""Sums that come out the same in any order, against whole numbers of Python."""

import math
from fractions import Fraction

import pytest
import torch

from lvd_lightning.coding.exact import Weights, exp_of_negative, flushed, power_of_two, products, rounded_down


def test_products_do_not_depend_on_order_or_company() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(2, 33, 50, dtype=torch.float64, generator=generator) ** 2
    x = torch.rand(2, 50, 19, dtype=torch.float64, generator=generator) ** 3
    index = torch.arange(2)
    found = Weights(table).up(index, x)
    order = torch.randperm(50, generator=generator)
    assert torch.equal(Weights(table[..., order]).up(index, x[:, order]), found)
    alone = torch.cat([Weights(table[1:]).up(torch.zeros(1).long(), x[1:, :, b : b + 1]) for b in range(19)], 2)
    assert torch.equal(alone, found[1:])
    torch.testing.assert_close(found, table @ x, rtol=1e-4, atol=1e-9)
    down = Weights(table).down(index, x[:, :33])
    assert torch.equal(down, Weights(table[:, order[order < 33]]).down(index, x[:, order[order < 33]]))
    torch.testing.assert_close(down, table.mT @ x[:, :33], rtol=1e-4, atol=1e-9)


def test_products_are_those_of_whole_numbers() -> None:
    whole = torch.randint(1 << 20, (1, 3, 40)).double()
    x = torch.rand(1, 40, 5, dtype=torch.float64)
    found = products(whole, x, 20)
    kept, scale = rounded_down(x, 53 - 20 - 6)
    for n in range(3):
        for b in range(5):
            terms = [int(whole[0, n, k]) * int(kept[0, k, b]) for k in range(40)]
            assert sum(terms) < 2**53
            assert Fraction(float(found[0, n, b])) == sum(terms) * Fraction(float(scale[0, 0, b]))


def test_rare_weights_stay_and_impossible_ones_too() -> None:
    table = torch.tensor([[[1.0, 1e-30, 0.0]]], dtype=torch.float64)
    found = Weights(table).up(torch.zeros(1).long(), torch.eye(3, dtype=torch.float64)[None])
    assert found.flatten().tolist() == [1.0, 2.0**-21, 0.0]


def test_nothing_comes_of_nothing() -> None:
    whole, scale = rounded_down(torch.zeros(4, 2, dtype=torch.float64), 30)
    assert not whole.any()
    assert torch.isfinite(scale).all()
    assert flushed(torch.tensor([1e-200, 1e-100, 0.0])).tolist() == pytest.approx([0.0, 1e-100, 0.0])


def test_exponentials_are_exponentials() -> None:
    values = torch.cat([torch.linspace(0, 300, 5000, dtype=torch.float64), torch.tensor([1e-9, 0.5, 301.0, 1e6])])
    found = exp_of_negative(values)
    for value, one in zip(values.tolist(), found.tolist(), strict=True):
        assert one == pytest.approx(math.exp(-value) if value <= 300 else 0.0, rel=2e-15)
    assert power_of_two(torch.tensor([-1022, 0, 10])).tolist() == [2.0**-1022, 1.0, 1024.0]

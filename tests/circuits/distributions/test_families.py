"""What every family of input distributions promises, against scipy, finite differences and summation over values.

Shapes: K units, V values, S numbers per unit.
"""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

import lvd_lightning.circuits as pc

FAMILIES = {
    "categorical": pc.Categorical(5),
    "bernoulli": pc.Bernoulli(),
    "binomial": pc.Binomial(7),
    "wide-binomial": pc.Binomial(255),
    "gaussian": pc.Gaussian(),
    "logistic": pc.DiscretizedLogistic(9),
    "wide-logistic": pc.DiscretizedLogistic(256),
    "two-values": pc.DiscretizedLogistic(2),
}
DISCRETE = {name: family for name, family in FAMILIES.items() if name != "gaussian"}
WITH_STATISTICS = {name: family for name, family in FAMILIES.items() if family.num_statistics}


def each(families: dict[str, pc.Distribution]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("family", [pytest.param(found, id=name) for name, found in families.items()])


def last_value(family: pc.Distribution) -> int:
    return next(
        getattr(family, n) - o
        for n, o in (("total", 0), ("num_values", 1), ("num_categories", 1))
        if hasattr(family, n)
    )


def draw_params(family: pc.Distribution, num_units: int = 6) -> Tensor:
    """Random parameters, and at the end those at the bounds of the family."""
    params = family.initial(num_units, generator=torch.Generator().manual_seed(3))
    if isinstance(family, pc.Binomial):
        params = torch.cat([params, torch.tensor([[family.min_prob], [0.5], [1 - family.min_prob]])])
    elif isinstance(family, pc.DiscretizedLogistic):
        size = family.num_values
        params[:, 1] = torch.logspace(-1, 1, num_units)
        edges = [[2.0, family.min_scale], [2.5, 0.1], [-size, 3.0], [2 * size, 0.5], [size / 2, 100 * size]]
        params = torch.cat([params, torch.tensor(edges)])
    elif isinstance(family, pc.Gaussian):
        params[:, 1] = torch.logspace(-2, 1, num_units)
    return params


def log_prob(family: pc.Distribution, params: Tensor, x: Tensor) -> Tensor:
    """log p of values x (V,) under all units, in nats, shape (K, V)."""
    out = torch.empty(1, len(params), len(x), dtype=params.dtype)
    family.forward(params[None], x[None], out)
    return out[0] * math.log(2.0)


def all_values(family: pc.Distribution) -> Tensor:
    return torch.arange(last_value(family) + 1)


def points(family: pc.Distribution) -> Tensor:
    """Values at which to look: all of a small family, the ends and some between of a wide one."""
    if isinstance(family, pc.Gaussian):
        return torch.tensor([-3.0, 0.1, 2.5])
    values = all_values(family)
    return values if len(values) < 20 else values[[0, 1, 2, 100, 254, 255]]


@each(DISCRETE)
def test_probabilities_sum_to_one(family: pc.Distribution) -> None:
    params = draw_params(family)
    total = log_prob(family, params, all_values(family)).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(len(params)), rtol=0, atol=1e-12)
    single = log_prob(family, params.float(), all_values(family)).exp().sum(1)
    torch.testing.assert_close(single, torch.ones(len(params), dtype=torch.float32), rtol=0, atol=3e-5)


@pytest.mark.parametrize("total", [1, 7, 255])
def test_binomial_probabilities(total: int) -> None:
    family = pc.Binomial(total)
    params = draw_params(family)
    expected = stats.binom.logpmf(np.arange(total + 1), total, params.numpy())
    np.testing.assert_allclose(log_prob(family, params, all_values(family)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_values", [2, 9, 256])
def test_logistic_probabilities(num_values: int) -> None:
    family = pc.DiscretizedLogistic(num_values)
    params = draw_params(family)
    mean, scale = params.numpy().T[:, :, None]
    low = np.r_[-np.inf, np.arange(1, num_values) - 0.5]
    high = np.r_[np.arange(num_values - 1) + 0.5, np.inf]
    below, above = (stats.logistic(mean, scale).cdf(edge) for edge in (low, high))
    right, left = (stats.logistic(mean, scale).sf(edge) for edge in (low, high))
    expected = np.where(low > mean, right - left, above - below)  # differences of small numbers on either side
    found = log_prob(family, params, all_values(family)).exp()
    np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-300)


def test_logistic_tails_are_exact_in_single_precision() -> None:
    family = pc.DiscretizedLogistic(256)
    params = torch.tensor([[0.0, 0.05], [255.0, 0.05]], dtype=torch.float32)
    found = log_prob(family, params, torch.tensor([0, 1, 200, 254, 255]))
    rest = math.log1p(-math.exp(-20.0))  # the mass of a bin, relative to all beyond its near edge
    far = [0.0, -10 + rest, -3990 + rest, -5070 + rest, -5090.0]
    expected = torch.tensor([far, [-5090.0, -5070 + rest, -1090 + rest, -10 + rest, 0.0]])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)


@each(FAMILIES)
def test_closed_form_gradients(family: pc.Distribution) -> None:
    """Every parameter of every unit, by central differences; away from floors, which differences would cross."""
    params, x = draw_params(family)[:6], points(family)
    grad = torch.rand(len(params), len(x))
    found = torch.empty_like(params)
    family.backward(params[None], x[None], grad[None], found[None])
    for s in range(params.shape[1]):
        step = torch.zeros_like(params)
        step[:, s] = 1e-6
        change = log_prob(family, params + step, x) - log_prob(family, params - step, x)
        torch.testing.assert_close(found[:, s], (grad * change).sum(1) / 2e-6, rtol=1e-5, atol=1e-5)


@each(FAMILIES)
def test_gradients_stay_finite_at_the_bounds(family: pc.Distribution) -> None:
    params, x = draw_params(family).float(), points(family)
    found = torch.empty_like(params)
    family.backward(params[None], x[None], torch.ones(1, len(params), len(x), dtype=torch.float32), found[None])
    assert found.isfinite().all()
    assert log_prob(family, params, x).isfinite().all()


@each({name: family for name, family in DISCRETE.items() if family.num_statistics})
def test_statistics_are_on_average_what_is_expected(family: pc.Distribution) -> None:
    """Sums over all values, weighted by their probabilities: E[E[T | x]] = E[T]."""
    params, x = draw_params(family), all_values(family)
    found = family.statistics(params[None], x[None], log_prob(family, params, x).exp()[None])[0]
    assert found.dtype == torch.float64
    assert found.shape[1] == family.num_statistics
    torch.testing.assert_close(found[:, 0], torch.ones(len(params)))
    if isinstance(family, pc.DiscretizedLogistic):  # a bound takes the place of E[r | x]
        excess = found[:, 1] - family.expected(params)[:, 0]
        assert (excess > -1e-12).all()
        mean = params[:, 0]
        found[:, 1] -= excess
        found[:, 2] -= mean * excess
        found[:, 3] -= mean.square() * excess
    torch.testing.assert_close(found[:, 1:], family.expected(params), rtol=1e-8, atol=1e-8)


@each(WITH_STATISTICS)
def test_the_maximum_of_its_own_expectations_is_where_a_unit_is(family: pc.Distribution) -> None:
    params = draw_params(family)
    torch.testing.assert_close(family.maximise(family.expected(params)), params, rtol=1e-6, atol=1e-9)
    assert family.expected(params.float()).dtype == torch.float64


@pytest.mark.parametrize("family", [pc.Gaussian(), pc.DiscretizedLogistic(256)], ids=["gaussian", "logistic"])
def test_small_deviations_far_from_zero_survive_single_precision(family: pc.Distribution) -> None:
    """The mean square is a million times the variance."""
    params = torch.tensor([[250.0, 0.25]], dtype=torch.float32)
    x = (250 + 0.25 * torch.randn(1, 200)).float()
    x = (250 + 2 * (x - 250)).round() if family.is_whole else x
    found, exact = (
        family.maximise(family.statistics(p[None], v, torch.ones(1, 1, 200, dtype=p.dtype))[0, :, 1:] / 200)
        for p, v in ((params, x), (params.double(), x.double()))
    )
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)
    assert 0.2 < exact[0, 1] < 0.7


@each(DISCRETE)
def test_samples_have_the_probabilities(family: pc.Distribution) -> None:
    """A chi-square test per unit; the seed is fixed, so it never fails by chance once it has passed."""
    params = draw_params(family)
    probs = log_prob(family, params, all_values(family)).exp().numpy()
    number = 4000
    found = family.sample(params[:, None].expand(-1, number, -1), torch.Generator().manual_seed(0)).long()
    again = family.sample(params[:, None].expand(-1, number, -1), torch.Generator().manual_seed(0)).long()
    assert torch.equal(found, again)
    assert found.min() >= 0
    assert found.max() <= last_value(family)
    for values, row in zip(found, probs, strict=True):
        counts, expected = np.bincount(values.numpy(), minlength=len(row)), row * number
        rare = expected < 5
        counts, expected = (
            np.append(counts[~rare], counts[rare].sum()),
            np.append(expected[~rare], expected[rare].sum()),
        )
        statistic = ((counts - expected) ** 2 / np.maximum(expected, 1)).sum()
        assert statistic < stats.chi2.isf(1e-4, len(counts))


@each(DISCRETE)
def test_modes(family: pc.Distribution) -> None:
    params = draw_params(family)
    value, log_value = family.mode(params[None])
    table = log_prob(family, params, all_values(family))
    torch.testing.assert_close(log_value[0], table.amax(1), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(table.gather(1, value[0].long()[:, None])[:, 0], table.amax(1), rtol=1e-9, atol=1e-9)


def test_modes_of_a_logistic_may_lie_at_its_ends() -> None:
    """The first and last value have all mass beyond them."""
    family = pc.DiscretizedLogistic(10)
    value, _ = family.mode(torch.tensor([[[4.0, 20.0], [5.0, 20.0], [5.0, 0.5], [-3.0, 1.0], [14.0, 1.0]]]))
    assert value[0].tolist() == [0, 9, 5, 0, 9]


@each(FAMILIES)
def test_coordinates_for_gradient_optimizers(family: pc.Distribution) -> None:
    params = draw_params(family)[:6]
    torch.testing.assert_close(family.from_logits(family.to_logits(params)), params, rtol=1e-9, atol=1e-9)
    assert family.to_logits(draw_params(family).float()).isfinite().all()
    wild = (20 * torch.randn(50, family.size, generator=torch.Generator().manual_seed(0))).float()
    found = family.from_logits(wild)
    family.check_params(found)
    assert found.isfinite().all()
    assert log_prob(family, found, points(family)).isfinite().all() or family.is_table


@pytest.mark.parametrize("family", [pc.Binomial(7), pc.DiscretizedLogistic(9)], ids=["binomial", "logistic"])
def test_no_unit_is_stuck_at_its_floor(family: pc.Distribution) -> None:
    """Gradients pass where a parameter is as small as it can be."""
    floor = torch.tensor([[family.min_prob]] if isinstance(family, pc.Binomial) else [[4.0, family.min_scale]])
    logits = family.to_logits(floor).requires_grad_()
    family.from_logits(logits)[0, -1].backward()
    assert logits.grad[0, -1] > 0


@each(FAMILIES)
def test_copies_of_units_are_perturbed(family: pc.Distribution) -> None:
    params = draw_params(family)
    torch.testing.assert_close(family.perturbed(params, torch.ones_like(params)), params, rtol=1e-12, atol=1e-15)
    factor = (1 + 0.2 * torch.randn(params.shape)).clip(0.1, 2)
    moved = family.perturbed(params, factor)
    family.check_params(moved)
    assert not torch.equal(moved[:6], params[:6])
    assert torch.equal(family.floored(moved), moved)


def test_perturbed_means_move_by_deviations() -> None:
    factor = torch.tensor([[1.5, 0.5]])
    binomial = pc.Binomial(10).perturbed(torch.tensor([[0.2]]), factor[:, :1])
    torch.testing.assert_close(10 * binomial, 10 * torch.tensor([[0.2]]) + 0.5 * math.sqrt(10 * 0.2 * 0.8))
    logistic = pc.DiscretizedLogistic(256).perturbed(torch.tensor([[100.0, 4.0]]), factor)
    torch.testing.assert_close(logistic, torch.tensor([[100 + 0.5 * float(stats.logistic(scale=4.0).std()), 2.0]]))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pc.Binomial(0), "total.*at least 1, got 0"),
        (lambda: pc.Binomial(3, min_prob=0.5), "min_prob.*got 0.5"),
        (lambda: pc.DiscretizedLogistic(1), "num_values.*at least 2, got 1"),
        (lambda: pc.DiscretizedLogistic(4, min_scale=0.0), "min_scale.*got 0"),
        (lambda: pc.Binomial(3).check_params(torch.tensor([[1.5]])), "Binomial.*probabilities"),
        (lambda: pc.Binomial(3).check_params(torch.tensor([[math.nan]])), "Binomial.*probabilities"),
        (lambda: pc.DiscretizedLogistic(4).check_params(torch.tensor([[1.0, 0.0]])), "positive scale"),
        (lambda: pc.DiscretizedLogistic(4).check_params(torch.tensor([[math.inf, 1.0]])), "finite"),
        (lambda: pc.Binomial(3).check_values(torch.tensor([0, 4])), r"Binomial.* expects values in 0\.\.3, got 4"),
        (lambda: pc.Binomial(3).check_values(torch.tensor([-1])), r"got -1"),
        (lambda: pc.DiscretizedLogistic(4).check_values(torch.tensor([0.0, math.inf])), r"0\.\.3, got inf"),
        (lambda: pc.DiscretizedLogistic(4).check_values(torch.tensor([0.5])), "whole numbers"),
        (lambda: pc.DiscretizedLogistic(4).check_values(torch.tensor([math.nan])), "NaN"),
    ],
)
def test_bad_arguments_are_named(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@each(FAMILIES)
def test_a_family_is_a_value(family: pc.Distribution) -> None:
    """Nodes fold by equality of their families; circuits are saved by the fields."""
    assert type(family)(**dataclasses.asdict(family)) == family
    assert hash(dataclasses.replace(family)) == hash(family)

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
from lvd_lightning.circuits.distributions.discretized import Discretized

FAMILIES = {
    "categorical": pc.Categorical(5),
    "bernoulli": pc.Bernoulli(),
    "ordered": pc.OrderedCategorical(6, share=0.5, width=0.7, constant=0.3),
    "binomial": pc.Binomial(7),
    "wide-binomial": pc.Binomial(255),
    "gaussian": pc.Gaussian(),
    "logistic": pc.DiscretizedLogistic(9),
    "wide-logistic": pc.DiscretizedLogistic(256),
    "two-values": pc.DiscretizedLogistic(2),
    "rounded": pc.DiscretizedGaussian(9),
    "wide-rounded": pc.DiscretizedGaussian(256),
    "two-rounded": pc.DiscretizedGaussian(2),
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
    elif isinstance(family, Discretized):
        size = family.num_values
        params[:, 1] = torch.logspace(-1, 1, num_units)
        edges = [[2.0, family.least], [2.5, 0.1], [-size, 3.0], [2 * size, 0.5], [size / 2, 100 * size]]
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
@pytest.mark.parametrize("kind", [pc.DiscretizedLogistic, pc.DiscretizedGaussian])
def test_probabilities_of_bins(kind: type[Discretized], num_values: int) -> None:
    family = kind(num_values)
    params = draw_params(family)
    mean, scale = params.numpy().T[:, :, None]
    law = stats.norm if isinstance(family, pc.DiscretizedGaussian) else stats.logistic
    low = np.r_[-np.inf, np.arange(1, num_values) - 0.5]
    high = np.r_[np.arange(num_values - 1) + 0.5, np.inf]
    below, above = (law(mean, scale).cdf(edge) for edge in (low, high))
    right, left = (law(mean, scale).sf(edge) for edge in (low, high))
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


@each({name: FAMILIES[name] for name in ("gaussian", "wide-logistic", "wide-rounded")})
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


@each({name: FAMILIES[name] for name in ("binomial", "logistic", "rounded")})
def test_no_unit_is_stuck_at_its_floor(family: pc.Distribution) -> None:
    """Gradients pass where a parameter is as small as it can be."""
    floor = torch.tensor([[family.min_prob]] if isinstance(family, pc.Binomial) else [[4.0, family.least]])
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
        (lambda: pc.Binomial(0), "total.*got 0, expected .*at least 1"),
        (lambda: pc.Binomial(3, min_prob=0.5), "min_prob.*got 0.5"),
        (lambda: pc.OrderedCategorical(0), "num_categories.*got 0, expected .*at least 1"),
        (lambda: pc.OrderedCategorical(3, share=-0.1), "OrderedCategorical: share: got -0.1, expected a number of at"),
        (lambda: pc.OrderedCategorical(3, share="0.1"), "share: got '0.1', expected a number of at least 0"),
        (lambda: pc.OrderedCategorical(3, width=0.0), "width: got 0.0, expected a number above 0"),
        (lambda: pc.OrderedCategorical(3, width=math.nan), "width: got nan, expected a number above 0"),
        (lambda: pc.OrderedCategorical(3, constant=math.inf), "constant: got inf, expected a number of at least 0"),
        (lambda: pc.DiscretizedLogistic(1), "num_values.*got 1, expected .*at least 2"),
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


def units_of(x_ND: Tensor, num_units: int) -> Tensor:
    """Quantiles of every column."""
    return x_ND.double().argsort(0).argsort(0) * num_units // len(x_ND)


@each(FAMILIES)
def test_first_parameters_explain_their_units_values(family: pc.Distribution) -> None:
    """In the default type, finite, and above random parameters on what each unit was given; constants included."""
    x = family.sample(draw_params(family)[:2, None].expand(-1, 300, -1), torch.Generator().manual_seed(0)).T
    x = torch.cat([x, x[:1, :1].expand(300, 1)], 1)
    unit = units_of(x, 4)
    params = family.from_data(x, unit, 4)
    assert params.shape == (3, 4, family.size)
    assert params.dtype == torch.get_default_dtype()
    family.check_params(params)
    assert torch.equal(family.floored(params), params)
    for column, units, found in zip(x.T, unit.T, params, strict=True):
        values = [log_prob(family, table, column).gather(0, units[None]) for table in (found, family.initial(4))]
        assert values[0].isfinite().all()
        assert values[0].mean() > values[1].mean()


@each(FAMILIES)
def test_a_weighted_example_counts_as_several(family: pc.Distribution) -> None:
    x = points(family).double().repeat(3)[:, None]
    unit = (torch.arange(len(x)) % 2)[:, None]
    number = torch.arange(len(x)) % 3
    weighted = family.from_data(x, unit, 3, weight_N=number.double())
    rows = torch.arange(len(x)).repeat_interleave(number)
    torch.testing.assert_close(weighted, family.from_data(x[rows], unit[rows], 3), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("family", [pc.Gaussian(), pc.DiscretizedGaussian(256), pc.DiscretizedLogistic(256)], ids=str)
def test_first_parameters_are_moments(family: pc.Distribution) -> None:
    """A unit without values has the moments of all."""
    x = torch.tensor([10.0, 14.0, 200.0, 220.0])[:, None]
    found = family.from_data(x, torch.tensor([0, 0, 1, 1])[:, None], 3, smoothing=1e-9)[0]
    spread = 1.0 if not isinstance(family, pc.DiscretizedLogistic) else float(stats.logistic.std())
    expected = torch.tensor([[12.0, 2.0 / spread], [210.0, 10.0 / spread], [x.mean(), x.std(correction=0) / spread]])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("family", "num_values", "settings", "expected"),
    [
        (pc.Categorical, 511, {}, pc.Categorical(511)),
        (pc.Categorical, 256, {"num_categories": 300}, pc.Categorical(300)),
        (pc.Bernoulli, 2, {}, pc.Bernoulli()),
        (pc.OrderedCategorical, 511, {"share": 0.1}, pc.OrderedCategorical(511, share=0.1)),
        (pc.Binomial, 256, {}, pc.Binomial(255)),
        (pc.Binomial, 256, {"min_prob": 1e-3}, pc.Binomial(255, min_prob=1e-3)),
        (pc.DiscretizedLogistic, 16, {"min_scale": 0.1}, pc.DiscretizedLogistic(16, min_scale=0.1)),
        (pc.DiscretizedGaussian, 16, {}, pc.DiscretizedGaussian(16)),
        (pc.Gaussian, 16, {}, pc.DiscretizedGaussian(16)),
        (pc.Gaussian, 16, {"min_std": 0.5}, pc.DiscretizedGaussian(16, min_std=0.5)),
        (pc.Gaussian, None, {}, pc.Gaussian()),
    ],
)
def test_the_member_for_some_number_of_values(
    family: type[pc.Distribution], num_values: int | None, settings: dict[str, float], expected: pc.Distribution
) -> None:
    """A Gaussian over whole numbers is integrated over their bins."""
    assert family.for_values(num_values, **settings) == expected


@pytest.mark.parametrize("method", ["size", "initial", "from_data", "log_prob", "backward", "sample", "mode"])
def test_a_family_without_a_method_cannot_be_made(method: str) -> None:
    lacking = type("Lacking", (pc.Binomial,), {method: getattr(pc.Distribution, method)})
    with pytest.raises(TypeError, match=f"abstract.* {method}"):
        lacking(3)


@pytest.mark.parametrize("name", ["statistics", "expected", "maximise"])
def test_a_family_that_em_cannot_train_is_refused_where_it_is_defined(name: str) -> None:
    with pytest.raises(TypeError, match=f"Untrained: .* lacks {name}"):
        type("Untrained", (pc.Binomial,), {name: getattr(pc.Distribution, name)})
    with pytest.raises(TypeError, match="Untrained: .* lacks num_statistics"):
        type("Untrained", (pc.Binomial,), {"num_statistics": 0})


def test_a_table_draws_categories_by_their_probabilities_and_never_an_impossible_one() -> None:
    params = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [1e-12, 0.0, 0.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    drawn = pc.Categorical(5).sample(params[:, None].expand(2, 20_000, 5), generator)
    counts = torch.stack([row.bincount(minlength=5) for row in drawn])
    assert counts[0, [0, 2, 4]].tolist() == [0, 0, 0]
    assert float(counts[0, 3]) / 20_000 == pytest.approx(0.7, abs=0.02)
    assert counts[1].tolist() == [0, 0, 0, 0, 20_000]

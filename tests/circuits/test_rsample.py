"""Differentiable samples: their frequencies against enumeration, their gradients against exact ones in float64."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_discrete_structures, few_structures, few_structures_and_a_batch
from helpers.estimates import assert_no_bias, differences, gradients, rows_of, seeded, with_logits
from helpers.frequencies import assert_frequencies
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import rsample
from lvd_lightning.circuits.distributions.discretized import Discretized
from lvd_lightning.circuits.engine import grids

ESTIMATORS = ("gumbel", "straight_through", "simple")
#: How every estimator is asked for exact samples.
HARD = {
    "simple": {"estimator": "simple"},
    "straight_through": {"estimator": "straight_through"},
    "gumbel": {"estimator": "gumbel", "hard": True},
    "cold": {"estimator": "gumbel", "temperature": 1e-9},
}


# Samples.


@pytest.mark.parametrize("name", ["simple", "cold"])
def test_frequencies(discrete: Any, name: str) -> None:
    head = discrete.graph.num_heads - 1
    with torch.no_grad():
        sample = discrete.circuit.rsample(4000, head=head, generator=seeded(1), **HARD[name])
    torch.testing.assert_close(sample, sample.round(), rtol=0, atol=1e-3)
    assert_frequencies(sample.round(), discrete.x, np.exp(discrete.reference.log_prob(discrete.x)[:, head]))


@pytest.mark.parametrize("name", list(HARD))
@few_discrete_structures
def test_frequencies_given_what_is_known(discrete: Any, name: str) -> None:
    """Two rows with evidence and masks of their own."""
    for row in (len(discrete.x) // 2, len(discrete.x) // 3):
        joint = np.exp(discrete.reference.log_prob(discrete.x)[:, 0])
        agree = (discrete.x == discrete.x[row])[:, discrete.observed[row]].all(1).numpy()
        rows = torch.tensor([row, 0]).repeat(4000)
        x, observed = discrete.x[rows], discrete.observed[rows]
        with torch.no_grad():
            sample = discrete.circuit.rsample(x=x, observed=observed, generator=seeded(row), **HARD[name])
        assert torch.equal(sample[observed], x[observed].to(sample.dtype))
        assert_frequencies(sample[::2].round(), discrete.x, joint * agree / (joint * agree).sum())
        assert_frequencies(sample[1::2].round(), discrete.x, joint)


@few_structures
def test_means_of_samples(case: Any) -> None:
    """Densities too: means and second moments given what is observed, against the exact ones."""
    x, observed = rows_of(case, 3)
    mean = pc.expectation(case.circuit, lambda x, v: x, x=x, observed=observed)
    second = pc.expectation(case.circuit, lambda x, v: x.square(), x=x, observed=observed)
    rows = torch.arange(3).repeat(4000)
    for setting in HARD.values():
        with torch.no_grad():
            sample = case.circuit.rsample(x=x[rows], observed=observed[rows], generator=seeded(3), **setting)
        for found, expected in ((sample, mean), (sample.square(), second)):
            found = found.view(4000, 3, -1)
            assert ((found.mean(0) - expected).abs() <= 5 * found.std(0) / 4000**0.5 + 1e-3).all()


@few_structures_and_a_batch
def test_soft_samples_share_the_noise_of_hard_ones(case: Any) -> None:
    """So `hard` is what `gumbel` gets at temperature 0, and what `straight_through` draws with the same seed."""
    settings: dict[str, Any] = {"x": case.x, "observed": case.observed}
    if isinstance(case.graph, list):
        settings["observed"] = case.observed.expand(2, -1, -1).clone()
        settings["x"] = case.x.expand(2, -1, -1).clone()
    hard = case.circuit.rsample(**settings, estimator="gumbel", hard=True, generator=seeded(0))
    through = case.circuit.rsample(**settings, estimator="straight_through", hard=False, generator=seeded(0))
    cold = case.circuit.rsample(**settings, estimator="gumbel", temperature=1e-9, generator=seeded(0))
    assert torch.equal(hard, through)
    torch.testing.assert_close(hard, cold)
    warm = case.circuit.rsample(**settings, estimator="gumbel", generator=seeded(0))
    assert not torch.allclose(hard, warm)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@few_structures
def test_samples_are_seeded(case: Any, estimator: Any) -> None:
    first, again, other = (case.circuit.rsample(20, estimator=estimator, generator=seeded(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@few_discrete_structures
def test_vectors_over_values(discrete: Any) -> None:
    """Rows sum to one; hard ones name the values that the same seed draws without `onehot`."""
    x, observed = rows_of(discrete, 6)
    soft = discrete.circuit.rsample(x=x, observed=observed, estimator="gumbel", onehot=True, generator=seeded(0))
    torch.testing.assert_close(soft.sum(-1), torch.ones(x.shape))
    hard = discrete.circuit.rsample(x=x, observed=observed, onehot=True, generator=seeded(0))
    value = discrete.circuit.rsample(x=x, observed=observed, generator=seeded(0))
    rounded = any(isinstance(plan.distribution, Discretized) for plan in discrete.circuit.plan.inputs)
    if not rounded:  # those are drawn from noise of their family, but for vectors, from a list of values
        assert torch.equal(hard.argmax(-1).to(value.dtype), value)
    assert torch.equal(hard.sum(-1), torch.ones(x.shape))
    assert torch.equal(soft[observed].argmax(-1), x[observed].long())


@few_discrete_structures
def test_what_is_drawn_anew_goes_through_the_latents(discrete: Any) -> None:
    """So what was observed varies, and what was not is what it would have been."""
    x, observed = rows_of(discrete, 2)
    rows = torch.arange(2).repeat(3000)
    circuit = discrete.circuit
    for mask in (torch.ones_like(observed), observed):
        with torch.no_grad():
            drawn = circuit.rsample(x=x[rows], observed=mask[rows], redraw=True, generator=seeded(0))
        drawn = drawn.view(3000, 2, -1)
        assert drawn[:, mask].std(0).max() > 0  # what was observed as well
        given = circuit.rsample(x=x[rows], observed=mask[rows], generator=seeded(0)).view(3000, 2, -1).detach()
        unseen = ~mask
        assert torch.equal(drawn[:, unseen], given[:, unseen])
    kept = circuit.rsample(x=x, observed=torch.zeros_like(observed), redraw=True, generator=seeded(0))
    assert torch.equal(kept, circuit.rsample(len(x), generator=seeded(0)))


def test_samples_of_a_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    cases = [build_case(s, "bernoulli", h) for s, h in (("chain", 1), ("star", 2), ("rat-kronecker", 1))]
    many = pc.Circuit([case.graph for case in cases])
    for setting in HARD.values():
        sample = many.rsample(4000, generator=seeded(0), **setting)
        assert sample.shape == (3, 4000, 4)
        x = cases[0].x[6].expand(4000, 4)  # given to all of them
        observed = torch.tensor([True, False, False, True]).expand(4000, 4)
        given = many.rsample(x=x, observed=observed, generator=seeded(1), **setting)
        for g, case in enumerate(cases):
            joint = np.exp(case.reference.log_prob(case.x)[:, 0])
            assert_frequencies(sample[g].detach().round(), case.x, joint)
            agree = (case.x == case.x[6])[:, observed[0]].all(1).numpy()
            assert_frequencies(given[g].detach().round(), case.x, joint * agree / (joint * agree).sum())


# Gradients.


@few_structures
def test_gradients_of_soft_samples(case: Any) -> None:
    """With the noise held fixed a soft sample is a smooth function: central differences, evidence included."""
    circuit = with_logits(case)
    x, observed = rows_of(case, 4)
    onehot = all(plan.distribution.num_outcomes is not None for plan in circuit.plan.inputs)
    mixed = not onehot and any(plan.distribution.num_outcomes is not None for plan in circuit.plan.inputs)
    if mixed:  # without onehot logistic variables are rounded, which has no derivative
        observed = observed | torch.tensor([False, False, False, True])
    x = x.clone().requires_grad_(not (onehot or mixed))

    def loss() -> Tensor:
        sample = circuit.rsample(
            x=x, observed=observed, estimator="gumbel", temperature=0.7, onehot=onehot, generator=seeded(5)
        )
        return (sample.square() * torch.linspace(-1, 1, sample.numel()).view(sample.shape)).sum()

    others = [x] if x.requires_grad else []
    found = gradients(circuit, loss(), *others)
    assert sum(float(g.abs().sum()) for g in found) > 1e-3
    targets = [t.data for t in [*circuit.tables, *others]]
    for a, b in zip(found, differences(loss, targets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@few_structures
def test_simple_has_no_bias_where_f_is_linear(case: Any) -> None:
    """Gradients of a mean, given what a row knows, for parameters and evidence: central differences of the exact one.

    Rounded variables count by their table here, so they have no bias either.
    """
    circuit = with_logits(case)
    x, observed = rows_of(case, 2)
    continuous = all(isinstance(plan.distribution, pc.Gaussian) for plan in circuit.plan.inputs)
    x = x.clone().requires_grad_(continuous)
    f_D = torch.linspace(-1, 2, x.shape[1])

    def exact() -> Tensor:
        return (pc.expectation(circuit, lambda x, v: x, x=x.detach(), observed=observed) @ f_D).sum()

    rows = torch.arange(2).repeat(200)
    batches = []
    others = [x] if x.requires_grad else []
    for seed in range(40):
        sample = circuit.rsample(x=x[rows], observed=observed[rows], estimator="simple", generator=seeded(seed))
        batches.append(gradients(circuit, (sample @ f_D).sum() / 200, *others))
    targets = [t.data for t in [*circuit.tables, *others]]
    assert_no_bias(batches, differences(exact, targets))


def bias(circuit: pc.Circuit, f: Callable[[Tensor], Tensor], settings: dict[str, Any]) -> tuple[float, float]:
    """How far the mean gradient of E[f(x)] is from the exact one, and its standard error, both as norms."""
    num_vars = circuit.num_variables
    worlds = torch.cartesian_prod(*[torch.arange(3)] * num_vars)
    exact = gradients(circuit, (circuit.log_prob(worlds, head=0).exp() * f(torch.eye(3)[worlds])).sum())
    batches = []
    for seed in range(50):
        sample = circuit.rsample(1000, onehot=True, generator=seeded(seed), **settings)
        batches.append(torch.cat([g.flatten() for g in gradients(circuit, f(sample).mean())]))
    found = torch.stack(batches)
    expected = torch.cat([g.flatten() for g in exact])
    error = float((found.var(0) / len(found)).sum().sqrt())
    return float((found.mean(0) - expected).norm()), error


@pytest.mark.parametrize("structure", ["chain", "shared"])
def test_bias_over_temperature(build_case: Callable[..., Any], structure: str) -> None:
    """Of a linear f: `simple` has none, the other two lose theirs as the temperature falls."""
    circuit = with_logits(build_case(structure, "categorical", 1))
    f_DC = torch.linspace(-2, 3, 12).view(4, 3).roll(1, 1)

    def f(onehot: Tensor) -> Tensor:
        return (onehot * f_DC).sum((-1, -2))

    distance, error = bias(circuit, f, {"estimator": "simple"})
    assert distance < 3 * error
    for estimator in ("straight_through", "gumbel"):
        warm, warm_error = bias(circuit, f, {"estimator": estimator, "temperature": 2.0})
        cold, cold_error = bias(circuit, f, {"estimator": estimator, "temperature": 0.1})
        assert warm > 5 * warm_error
        assert cold < 0.3 * warm
        assert cold < 4 * cold_error + 0.05 * warm


@pytest.mark.parametrize("settings", [*HARD.values(), {"estimator": "gumbel", "temperature": 0.5}])
@pytest.mark.parametrize("structure", ["chain", "shared", "rat-kronecker", "homogeneous"])
def test_gradients_do_not_depend_on_where_zero_lies(
    build_case: Callable[..., Any], structure: str, settings: dict[str, Any]
) -> None:
    """All values and what is observed are moved by c, f looks at x - c: its gradient stays, sample by sample."""
    case = build_case(structure, "gaussian", 1)
    x, observed = case.x[:4], case.observed[:4]
    found = []
    for shift in (0.0, 10.0):
        circuit = with_logits(case)
        for table, group in zip(circuit.tables, circuit.plan.groups, strict=True):
            if group.distribution is not None:
                table.data[..., 0] += shift
        sample = circuit.rsample(x=x + shift, observed=observed, generator=seeded(2), **settings)
        found.append(gradients(circuit, (sample - shift).pow(3).sum() + (sample - shift).prod(1).sum()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert any(float(g.abs().sum()) > 1e-6 for g in found[0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@few_discrete_structures
def test_a_constant_has_no_gradient(discrete: Any, estimator: Any) -> None:
    """The values of a variable count 1 each: a sample without the children that were not chosen would fail this."""
    circuit = with_logits(discrete)
    x, observed = rows_of(discrete, 4)
    sample = circuit.rsample(x=x, observed=observed, estimator=estimator, onehot=True, generator=seeded(0))
    for gradient in gradients(circuit, (sample.sum(-1) * torch.arange(1.0, x.shape[1] + 1)).sum()):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_both_parameterizations_agree(build_case: Callable[..., Any], estimator: Any) -> None:
    """Normalised weights have the gradient that their logits have, in every direction that keeps them normalised."""
    case = build_case("shared", "categorical", 1)
    logits, plain = with_logits(case), pc.Circuit(case.graph, layout="dense")
    found, through = [], logits.probabilities()
    for circuit in (logits, plain):
        sample = circuit.rsample(50, estimator=estimator, onehot=True, generator=seeded(0))
        loss = (sample.square() * torch.linspace(-1, 1, 12).view(4, 3)).sum()
        found.append(gradients(circuit, loss))
    expected = torch.autograd.grad(through, list(logits.tables), found[1])
    for a, b in zip(found[0], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_rounding_passes_gradients_on() -> None:
    """A logistic variable of one unit: the sample is whole, its gradient that of the value before rounding."""
    graph = pc.CircuitGraph()
    leaf = pc.DiscretizedLogistic(100)
    graph.add_sum([graph.add_input(0, leaf, 1, params=torch.tensor([[50.0, 2.0]]))], 1)
    for estimator in ("gumbel", "straight_through"):
        circuit = pc.Circuit(graph)
        sample = circuit.rsample(200, estimator=estimator, generator=seeded(0))
        assert torch.equal(sample, sample.round())
        leaf_table = next(t for t, g in zip(circuit.tables, circuit.plan.groups, strict=True) if g.distribution)
        (gradient,) = torch.autograd.grad(sample.sum(), leaf_table)
        assert gradient.flatten()[0].item() == pytest.approx(200)
        assert abs(gradient.flatten()[1].item() - (sample.detach() - 50).sum().item() / 2) < 200 * 0.25


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_evidence(estimator: Any) -> None:
    """Samples are states; the gradient of their means for soft evidence, against central differences of posteriors."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.SoftEvidence(3)), parameterization="logits")
    evidence = torch.randn(1, 3, 3).requires_grad_()
    f_DC = torch.tensor([[1.0, 0, -2], [0, 3, 1], [2, 1, 0]])
    exact = differences(lambda: pc.expectation(circuit, f_DC, x=evidence.detach()).sum(), [evidence.data])
    batches = []
    for seed in range(40):
        sample = circuit.rsample(
            x=evidence.expand(500, 3, 3), estimator=estimator, temperature=0.1, onehot=True, generator=seeded(seed)
        )
        assert sample.shape == (500, 3, 3)
        batches.append(gradients(circuit, (sample * f_DC).sum() / 500, evidence)[-1:])
    if estimator == "simple":
        assert_no_bias(batches, exact)
    mean = torch.stack([found[0] for found in batches]).mean(0)
    assert float((mean - exact[0]).norm()) < 0.25 * float(exact[0].norm())


def test_second_derivatives(build_case: Callable[..., Any]) -> None:
    circuit = with_logits(build_case("chain", "categorical", 1))
    for estimator in ESTIMATORS:

        def slope(estimator: Any = estimator) -> Tensor:
            sample = circuit.rsample(5, estimator=estimator, onehot=True, generator=seeded(0))
            first = torch.autograd.grad(sample.square().sum(), list(circuit.tables), create_graph=True)
            return sum(g.square().sum() for g in first)

        second = gradients(circuit, slope())
        assert sum(float(g.abs().sum()) for g in second) > 1e-6
        if estimator == "gumbel":

            def first_only() -> Tensor:
                with torch.enable_grad():
                    return slope().detach()

            for a, b in zip(second, differences(first_only, [t.data for t in circuit.tables]), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_pruned_edges_have_finite_gradients_and_their_logits_none(build_case: Callable[..., Any]) -> None:
    case = build_case("sparse", "categorical", 2)
    circuits = [pc.Circuit(case.graph, layout=layout) for layout in ("dense", "sparse")]
    for estimator in ESTIMATORS:
        for circuit in (*circuits, with_logits(case)):
            sample = circuit.rsample(30, head=1, estimator=estimator, generator=seeded(0))
            found = gradients(circuit, sample.square().sum())
            for gradient, table in zip(found, circuit.probabilities(), strict=True):
                assert torch.isfinite(gradient).all()
                assert circuit.parameterization != "logits" or not gradient[table == 0].any()
            assert any(gradient.any() for gradient in found)


@pytest.mark.parametrize("num_leaves", [2, 3])
def test_kronecker_products_that_are_not_stored(monkeypatch: pytest.MonkeyPatch, num_leaves: int) -> None:
    """Sums then read the factors: samples come as often as they should, and `simple` has no bias."""
    graph = pc.rat_spn(
        5, depth=3, num_repetitions=2, num_sums=2, num_leaves=num_leaves, leaf=pc.Bernoulli(), product="kronecker"
    )
    monkeypatch.setattr(grids, "LEAST_UNITS", 1)
    monkeypatch.setattr(grids, "LEAST_LINEAR", 1)
    factors = pc.Circuit(graph, parameterization="logits")
    assert any(layer.grid is not None for layer in factors.plan.layers)
    x, observed = torch.randint(0, 2, (6, 5)), torch.rand(6, 5) < 0.4
    f_D = torch.linspace(-1, 2, 5)
    exact = gradients(factors, pc.expected(factors, lambda x: x @ f_D, estimator="exact", x=x, observed=observed).sum())
    batches = []
    for seed in range(30):
        rows = torch.arange(6).repeat(100)
        sample = factors.rsample(x=x[rows], observed=observed[rows], generator=seeded(seed))
        batches.append(gradients(factors, (sample @ f_D).sum() / 100))
    assert_no_bias(batches, exact)
    worlds = torch.cartesian_prod(*[torch.arange(2)] * 5)
    p = factors.log_prob(worlds, head=0).detach().exp().numpy()
    for setting in HARD.values():
        assert_frequencies(factors.rsample(4000, generator=seeded(1), **setting).detach().round(), worlds, p)
    for estimator in ESTIMATORS:
        sample = factors.rsample(4, estimator=estimator, onehot=True, generator=seeded(0))
        torch.testing.assert_close(sample.sum(-1), torch.ones(4, 5))
        for gradient in gradients(factors, (sample.sum(-1) * torch.arange(1.0, 6)).sum()):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-9)


def test_chunks(build_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Folds that go one after the other give what they give together."""
    for structure, leaf in (("ragged", "binomial"), ("chain", "categorical"), ("homogeneous", "gaussian")):
        circuit = with_logits(build_case(structure, leaf, 1))
        for estimator in ESTIMATORS:
            found = []
            for size in (1, 1 << 22):
                monkeypatch.setattr(rsample, "CHUNK_SIZE", size)
                sample = circuit.rsample(5, estimator=estimator, generator=seeded(0))
                found.append([sample, *gradients(circuit, sample.square().sum())])
            torch.testing.assert_close(*found)


def test_single_precision(build_case: Callable[..., Any]) -> None:
    """Hard samples are whole numbers to the last digit, and gradients finite."""
    graph = build_case("shared", "categorical", 2).graph
    for node in graph.nodes:
        for name in ("weight", "params"):
            if getattr(node, name) is not None:
                setattr(node, name, getattr(node, name).float())
    circuit = pc.Circuit(graph, parameterization="logits")
    for name, setting in HARD.items():
        sample = circuit.rsample(500, generator=seeded(0), **setting)
        assert sample.dtype == torch.float32
        assert torch.equal(sample, sample.round()), name
        assert all(torch.isfinite(g).all() for g in gradients(circuit, sample.square().mean()))


def test_a_long_chain() -> None:
    """Hundreds of levels: what soft samples compute again in backward is a level at a time."""
    circuit = pc.Circuit(pc.hmm(400, 4, num_tokens=6, homogeneous=True), parameterization="logits")
    for estimator in ESTIMATORS:
        sample = circuit.rsample(3, estimator=estimator, generator=seeded(0))
        assert sample.shape == (3, 400)
        assert all(torch.isfinite(g).all() and g.any() for g in gradients(circuit, sample.square().mean()))


# Errors.


def test_bad_arguments_are_named(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "mixed", 2)
    sample, everything = case.circuit.rsample, torch.ones(case.x.shape, dtype=torch.bool)
    with pytest.raises(ValueError, match="estimator: got 'reinforce', expected one of gumbel"):
        sample(3, estimator="reinforce")
    with pytest.raises(ValueError, match="a function of f: pc.expected"):
        sample(3, estimator="score")
    for temperature in (0, -1, float("nan"), "warm"):
        with pytest.raises(ValueError, match="temperature"):
            sample(3, temperature=temperature)
    with pytest.raises(ValueError, match="hard: got 1, expected True or False"):
        sample(3, hard=1)
    with pytest.raises(ValueError, match="has no list of values; give onehot=False"):
        sample(3, onehot=True)
    with pytest.raises(ValueError, match="either n"):
        sample()
    with pytest.raises(ValueError, match="n: got -1"):
        sample(-1)
    with pytest.raises(ValueError, match="x needs `observed`"):
        sample(x=case.x)
    with pytest.raises(ValueError, match="observed: says what of x is given"):
        sample(3, observed=everything)
    with pytest.raises(ValueError, match="head: got 2"):
        sample(3, head=2)
    with pytest.raises(ValueError, match="generator"):
        sample(3, generator=7)


def test_impossible_evidence_is_named(build_case: Callable[..., Any]) -> None:
    graph = build_case("pair", "categorical", 1).graph
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[0.5, 0.5, 0.0]] * node.num_units)
    with pytest.raises(ValueError, match="probability zero"):
        pc.Circuit(graph).rsample(x=torch.tensor([[2, 0]]), observed=torch.tensor([[True, False]]))


def test_no_samples(build_case: Callable[..., Any]) -> None:
    for estimator in ESTIMATORS:
        assert build_case("chain", "categorical", 1).circuit.rsample(0, estimator=estimator).shape == (0, 4)

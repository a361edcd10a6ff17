"""Expectations of functions of whole samples: their values against enumeration, their gradients against exact ones."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_discrete_structures, few_structures
from helpers.estimates import assert_no_bias, differences, gradients, rows_of, seeded, with_logits
from torch import Tensor

import lvd_lightning.circuits as pc


def product(x: Tensor) -> Tensor:
    """A function of all variables together that is far from linear."""
    return (x + 0.5).prod(1) + (x[:, 0] > x[:, -1])


def tables_of(circuit: pc.Circuit) -> list[Tensor]:
    return [table.data for table in circuit.tables]


def test_exact_values(discrete: Any) -> None:
    """Each row knows something else; without x nothing is known."""
    head = discrete.graph.num_heads - 1
    joint = np.exp(discrete.reference.log_prob(discrete.x)[:, head])
    f = product(discrete.x.double()).numpy()
    found = pc.expected(discrete.circuit, product, estimator="exact", head=head)
    assert found.shape == ()
    np.testing.assert_allclose(found.detach(), joint @ f, rtol=1e-8)
    x, observed = rows_of(discrete, 4)
    possible = torch.from_numpy(discrete.reference.log_prob(x, observed.numpy())[:, head] > -np.inf)
    x, observed = x[possible], observed[possible]
    found = pc.expected(discrete.circuit, product, estimator="exact", x=x, observed=observed, head=head)
    for value, row, mask in zip(found.detach(), x, observed, strict=True):
        weight = joint * (discrete.x == row)[:, mask].all(1).numpy()
        assert value.item() == pytest.approx(weight @ f / weight.sum(), rel=1e-8)


@few_discrete_structures
def test_exact_gradients(discrete: Any) -> None:
    """Of a mean, against central differences of what `expectation` finds by flows."""
    circuit = with_logits(discrete)
    x, observed = rows_of(discrete, 3)
    f_D = torch.linspace(-1, 2, x.shape[1])
    loss = pc.expected(circuit, lambda x: x @ f_D, estimator="exact", x=x, observed=observed).sum()
    expected = differences(
        lambda: (pc.expectation(circuit, lambda x, v: x, x=x, observed=observed) @ f_D).sum(), tables_of(circuit)
    )
    for found, slope in zip(gradients(circuit, loss), expected, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("baseline", [True, False])
@few_discrete_structures
def test_scores_have_no_bias(discrete: Any, baseline: bool) -> None:
    """Neither their values nor their gradients, for any f."""
    circuit = with_logits(discrete)
    x, observed = rows_of(discrete, 2)
    exact = pc.expected(circuit, product, estimator="exact", x=x, observed=observed)
    many: dict[str, Any] = {"x": x.repeat(40, 1), "observed": observed.repeat(40, 1), "baseline": baseline}
    values, batches = [], []
    for seed in range(40):
        found = pc.expected(circuit, product, num_samples=3, generator=seeded(seed), **many)
        values.append([found.detach().view(40, 2).mean(0)])
        batches.append(gradients(circuit, found.sum() / 40))
    assert_no_bias(values, [exact.detach()])
    assert_no_bias(batches, gradients(circuit, exact.sum()))


@few_structures
def test_scores_of_densities_and_of_evidence(case: Any) -> None:
    """Gradients for parameters and, of normal variables, for what is known; against central differences."""
    circuit = with_logits(case)
    x, observed = rows_of(case, 2)
    continuous = all(isinstance(plan.distribution, pc.Gaussian) for plan in circuit.plan.inputs)
    x = x.clone().requires_grad_(continuous)
    f_D = torch.linspace(-1, 2, x.shape[1])
    others = [x] if continuous else []
    expected = differences(
        lambda: (pc.expectation(circuit, lambda x, v: x, x=x.detach(), observed=observed) @ f_D).sum(),
        [*tables_of(circuit), *(t.data for t in others)],
    )
    batches = []
    for seed in range(40):
        found = pc.expected(circuit, lambda x: x @ f_D, num_samples=150, x=x, observed=observed, generator=seeded(seed))
        batches.append(gradients(circuit, found.sum(), *others))
    assert_no_bias(batches, expected)


def test_states_given_evidence() -> None:
    """Soft evidence: both estimators, for parameters and evidence, against central differences of posteriors."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.SoftEvidence(3)), parameterization="logits")
    evidence, f_DC = torch.randn(2, 3, 3).requires_grad_(), torch.randn(3, 3)
    observed = torch.tensor([[True, True, True], [True, False, True]])

    def f(states: Tensor) -> Tensor:
        return f_DC[torch.arange(3), states.long()].sum(1)

    slopes = differences(
        lambda: pc.expectation(circuit, f_DC, x=evidence.detach(), observed=observed).sum(),
        [*tables_of(circuit), evidence.data],
    )
    settings: dict[str, Any] = {"x": evidence, "observed": observed}
    exact = gradients(circuit, pc.expected(circuit, f, estimator="exact", **settings).sum(), evidence)
    for found, slope in zip(exact, slopes, strict=True):
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)
    batches = [
        gradients(circuit, pc.expected(circuit, f, num_samples=200, generator=seeded(s), **settings).sum(), evidence)
        for s in range(40)
    ]
    assert_no_bias(batches, exact)


def test_batches_of_circuits(build_case: Callable[..., Any]) -> None:
    cases = [build_case(s, "bernoulli", h) for s, h in (("chain", 2), ("shared", 2))]
    many = pc.Circuit([case.graph for case in cases])
    x = torch.randint(0, 2, (2, 5, 4))
    observed, head = torch.rand(x.shape) < 0.5, torch.randint(0, 2, (2, 5))
    exact = pc.expected(many, product, estimator="exact", x=x, observed=observed, head=head)
    drawn = pc.expected(many, product, num_samples=4000, x=x, observed=observed, head=head, generator=seeded(0))
    assert exact.shape == drawn.shape == (2, 5)
    assert pc.expected(many, product, estimator="exact").shape == (2,)
    for g, case in enumerate(cases):
        alone = pc.expected(case.circuit, product, estimator="exact", x=x[g], observed=observed[g], head=head[g])
        torch.testing.assert_close(exact[g], alone)
    torch.testing.assert_close(drawn, exact, rtol=0, atol=0.15)


def test_a_baseline_takes_constants_off_and_lowers_the_variance(build_case: Callable[..., Any]) -> None:
    circuit = with_logits(build_case("chain", "categorical", 1))
    spread = {}
    for baseline in (True, False):
        found = []
        for shift in (0.0, 100.0):
            batches = [
                torch.cat(
                    [
                        g.flatten()
                        for g in gradients(
                            circuit,
                            pc.expected(
                                circuit,
                                lambda x, shift=shift: x.sum(1) + shift,
                                num_samples=10,
                                baseline=baseline,
                                generator=seeded(seed),
                            ),
                        )
                    ]
                )
                for seed in range(30)
            ]
            found.append(torch.stack(batches))
        spread[baseline] = float(found[0].var(0).sum())
        assert torch.allclose(*found, atol=1e-8) == baseline
    assert spread[True] < 0.5 * spread[False]


def test_gradients_of_f_itself(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 1)
    weight = torch.tensor(2.0, requires_grad=True)
    for settings in ({"estimator": "exact"}, {"estimator": "score", "generator": seeded(0)}):
        found = pc.expected(case.circuit, lambda x: weight * x.sum(1), **settings)
        (slope,) = torch.autograd.grad(found, weight)
        assert slope.item() == pytest.approx(found.item() / 2)


def test_simple_has_less_variance_than_scores(build_case: Callable[..., Any]) -> None:
    """What it is for: as many samples, a linear f."""
    circuit = with_logits(build_case("shared", "categorical", 1))
    found: dict[str, list[Tensor]] = {"simple": [], "score": []}
    for seed in range(40):
        losses = {
            "simple": circuit.rsample(20, estimator="simple", generator=seeded(seed)).sum(1).mean(),
            "score": pc.expected(circuit, lambda x: x.sum(1), num_samples=20, generator=seeded(seed)),
        }
        for name, loss in losses.items():
            found[name].append(torch.cat([g.flatten() for g in gradients(circuit, loss)]))
    variance = {name: float(torch.stack(parts).var(0).sum()) for name, parts in found.items()}
    assert variance["simple"] < 0.3 * variance["score"]


def test_scores_are_seeded(build_case: Callable[..., Any]) -> None:
    circuit = build_case("shared", "gaussian", 2).circuit
    first, again, other = (pc.expected(circuit, product, generator=seeded(s)) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_bad_arguments_are_named(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "mixed", 1)
    circuit, x = case.circuit, case.x[:2]
    with pytest.raises(ValueError, match=r"got .* compile it first"):
        pc.expected(case.graph, product)
    with pytest.raises(ValueError, match="f: got 3"):
        pc.expected(circuit, 3)
    with pytest.raises(ValueError, match=r"expected score or exact; that one makes samples: circuit.rsample"):
        pc.expected(circuit, product, estimator="simple")
    with pytest.raises(ValueError, match="baseline: got 0"):
        pc.expected(circuit, product, baseline=0)
    with pytest.raises(ValueError, match="num_samples: got 1, expected at least 2"):
        pc.expected(circuit, product, num_samples=1)
    with pytest.raises(ValueError, match="num_samples: got 0"):
        pc.expected(circuit, product, num_samples=0, baseline=False)
    with pytest.raises(ValueError, match="observed: says what of x is given"):
        pc.expected(circuit, product, observed=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="x needs `observed`"):
        pc.expected(circuit, product, x=x)
    with pytest.raises(ValueError, match="variable 2 is Gaussian.*observe it, or take estimator='score'"):
        pc.expected(circuit, product, estimator="exact")
    with pytest.raises(ValueError, match=r"f: gave a tensor of shape \(64, 4\).*expected a tensor of shape \(64,\)"):
        pc.expected(circuit, lambda x: x)
    with pytest.raises(ValueError, match="generator"):
        pc.expected(circuit, product, generator=3)
    # The normal variable is known: the worlds of the others are listed.
    mask = torch.tensor([[False, False, True, False]]).expand(2, 4)
    assert pc.expected(circuit, product, estimator="exact", x=x, observed=mask).shape == (2,)


def test_too_many_worlds_are_refused() -> None:
    circuit = pc.Circuit(pc.hclt([-1, 0, 1, 2, 3], 2, pc.Categorical(10)))
    with pytest.raises(ValueError, match="sums over all 100000 worlds, more than 65536"):
        pc.expected(circuit, product, estimator="exact")
    x, observed = torch.zeros(70, 5), torch.tensor([True, True, False, False, False]).expand(70, 5)
    with pytest.raises(ValueError, match="all 1000 worlds for each of 70 rows"):
        pc.expected(circuit, product, estimator="exact", x=x, observed=observed)
    assert pc.expected(circuit, product, estimator="exact", x=x[:60], observed=observed[:60]).shape == (60,)


def test_impossible_evidence_is_named(build_case: Callable[..., Any]) -> None:
    graph = build_case("pair", "categorical", 1).graph
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[0.5, 0.5, 0.0]] * node.num_units)
    x, observed = torch.tensor([[2, 0]]), torch.tensor([[True, False]])
    for estimator in ("score", "exact"):
        with pytest.raises(ValueError, match="probability zero"):
            pc.expected(pc.Circuit(graph), product, estimator=estimator, x=x, observed=observed)

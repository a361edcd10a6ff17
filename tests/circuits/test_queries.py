"""Samples, maxima and posteriors against enumeration."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_structures
from helpers.frequencies import assert_frequencies
from scipy import stats

import lvd_lightning.circuits as pc

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def test_samples(discrete: Any) -> None:
    for head in range(discrete.graph.num_heads):
        sample = discrete.circuit.sample(20000, head=head, generator=torch.Generator().manual_seed(head))
        assert sample.shape == (20000, discrete.x.shape[1])
        assert_frequencies(sample, discrete.x, np.exp(discrete.reference.log_prob(discrete.x)[:, head]))


def test_conditional_samples(discrete: Any) -> None:
    head = discrete.graph.num_heads - 1
    joint = np.exp(discrete.reference.log_prob(discrete.x)[:, head])
    row, observed = discrete.x[len(discrete.x) // 2], discrete.observed[len(discrete.x) // 2]
    sample = discrete.circuit.sample(
        x=row.expand(20000, -1),
        observed=observed.expand(20000, -1),
        head=head,
        generator=torch.Generator().manual_seed(1),
    )
    assert (sample == row)[:, observed].all()
    agree = (discrete.x == row)[:, observed].all(1).numpy()
    assert_frequencies(sample, discrete.x, joint * agree / (joint * agree).sum())


def test_conditional_samples_differ_by_row(build_case: Callable[..., Any]) -> None:
    """Every row has its own evidence, mask and head."""
    case = build_case("bush", "bernoulli", 3)
    rows = torch.tensor([3, 17, 30]).repeat(3000)
    heads = torch.tensor([2, 0, 1]).repeat(3000)
    sample = case.circuit.sample(
        x=case.x[rows], observed=case.observed[rows], head=heads, generator=torch.Generator().manual_seed(0)
    )
    for row, head in ((3, 2), (17, 0), (30, 1)):
        observed = case.observed[row]
        agree = (case.x == case.x[row])[:, observed].all(1).numpy()
        joint = np.exp(case.reference.log_prob(case.x)[:, head]) * agree
        assert_frequencies(sample[rows == row], case.x, joint / joint.sum())


def test_samples_of_densities(build_case: Callable[..., Any]) -> None:
    case = build_case("single", "gaussian", 2)
    sample = case.circuit.sample(20000, head=1, generator=torch.Generator().manual_seed(0))[:, 0]
    weights, (mean, std) = case.reference.tree_weights(1), case.graph.nodes[0].params.T.numpy()

    def cumulative(x: np.ndarray) -> np.ndarray:
        units = [next(u for u, c in tree.values() if c < 0) for tree in case.reference.trees[1]]
        return sum(w * stats.norm.cdf(x, mean[u], std[u]) for w, u in zip(weights, units, strict=True))

    assert stats.kstest(sample.numpy(), cumulative).pvalue > 1e-3


def test_conditional_samples_of_densities(build_case: Callable[..., Any]) -> None:
    """The mean of a variable given the others, from the posterior over the induced trees."""
    case = build_case("chain", "gaussian", 1)
    observed = torch.tensor([True, False, True, True])
    x = case.x[:1].expand(20000, -1)
    sample = case.circuit.sample(x=x, observed=observed.expand(20000, -1), generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample[:, observed], x[:, observed])
    share = case.reference.joint(x[:1], observed[None])[0]
    share /= share.sum()
    node = next(i for i, n in enumerate(case.graph.nodes) if n.kind == "input" and n.variable == 1)
    mean, std = case.reference.params[node][[tree[node][0] for tree in case.reference.trees[0]]].T
    expected = (share * mean).sum()
    spread = np.sqrt((share * (std**2 + mean**2)).sum() - expected**2)
    assert abs(sample[:, 1].mean().item() - expected) < 4 * spread / np.sqrt(20000)
    assert sample[:, 1].std().item() == pytest.approx(spread, rel=0.05)


def test_samples_of_mixed_variables(build_case: Callable[..., Any]) -> None:
    """The discrete variables given the continuous one, against all their worlds."""
    case = build_case("chain", "mixed", 1)
    grid = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0), torch.arange(6.0))
    worlds = torch.stack([grid[:, 0], grid[:, 1], torch.full((len(grid),), 0.7), grid[:, 2]], 1)
    observed = torch.tensor([False, False, True, False]).expand(20000, -1)
    x = torch.full((20000, 4), torch.nan)
    x[:, 2] = 0.7
    sample = case.circuit.sample(x=x, observed=observed, generator=torch.Generator().manual_seed(0))
    assert sample.dtype == torch.float64
    probabilities = np.exp(case.reference.log_prob(worlds)[:, 0])
    assert_frequencies(sample, worlds, probabilities / probabilities.sum())
    sample = case.circuit.sample(20000, generator=torch.Generator().manual_seed(1))
    seen = np.array([[True, True, False, True]]).repeat(len(worlds), 0)
    sample[:, 2] = 0.7  # summed out
    assert_frequencies(sample, worlds, np.exp(case.reference.log_prob(worlds, seen)[:, 0]))


@few_structures
def test_samples_are_seeded(case: Any) -> None:
    first, again, other = (case.circuit.sample(50, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@few_structures
def test_nothing_to_sample(case: Any) -> None:
    everything = torch.ones(case.x.shape, dtype=torch.bool)
    assert torch.equal(case.circuit.sample(x=case.x, observed=everything).to(case.x.dtype), case.x)


def test_maximum_over_variables_and_latents(case: Any) -> None:
    for head in range(case.graph.num_heads):
        assignment, value = case.circuit.mpe(case.x, observed=case.observed, head=head)
        expected = case.reference.log_max(case.x, case.observed, head=head)
        np.testing.assert_allclose(value.detach(), expected, **EXACT)
        assert torch.equal(assignment[case.observed].to(case.x.dtype), case.x[case.observed])
        # The assignment attains the maximum (ties may fall either way).
        np.testing.assert_allclose(np.log(case.reference.joint(assignment, head=head).max(1)), expected, **EXACT)


@few_structures
def test_maximum_under_full_evidence_is_over_latents(case: Any) -> None:
    assignment, value = case.circuit.mpe(case.x, observed=torch.ones(case.x.shape, dtype=torch.bool))
    assert torch.equal(assignment.to(case.x.dtype), case.x)
    np.testing.assert_allclose(value.detach(), np.log(case.reference.joint(case.x).max(1)), **EXACT)


def test_maximum_is_at_least_every_joint_probability(discrete: Any) -> None:
    """Independent of the reference's treatment of modes: no world and tree beats the maximum."""
    nothing = torch.zeros(1, discrete.x.shape[1], dtype=torch.bool)
    _, value = discrete.circuit.mpe(discrete.x[:1], observed=nothing)
    assert value.item() == pytest.approx(np.log(discrete.reference.joint(discrete.x).max()), rel=1e-10)


def test_posteriors_of_latents(case: Any) -> None:
    for name, index in case.graph.latents.items():
        for head in range(case.graph.num_heads):
            found = case.circuit.posterior(case.x, name, observed=case.observed, head=head)
            expected = case.reference.posterior(index, case.x, case.observed, head=head)
            np.testing.assert_allclose(found.detach(), expected, rtol=1e-8, atol=1e-11)


def test_posterior_of_a_latent_that_is_not_always_reached(build_case: Callable[..., Any]) -> None:
    """The sum over states is the probability of reaching the node."""
    case = build_case("shared", "categorical", 2)
    reached = sum(case.circuit.posterior(case.x, name).sum(1) for name in (1, 2))
    np.testing.assert_allclose(reached.detach(), 1, **EXACT)
    assert (case.circuit.posterior(case.x, 1).sum(1) < 1 - 1e-3).any()


@few_structures
def test_a_posterior_leaves_parameters_without_gradient(case: Any) -> None:
    case.circuit.posterior(case.x, next(iter(case.graph.latents)))
    assert all(parameter.grad is None for parameter in case.circuit.parameters())


@few_structures
def test_heads_per_row(case: Any) -> None:
    heads = torch.randint(0, case.graph.num_heads, (len(case.x),))
    name = next(iter(case.graph.latents))
    _, value = case.circuit.mpe(case.x, observed=case.observed, head=heads)
    posterior = case.circuit.posterior(case.x, name, observed=case.observed, head=heads)
    for head in range(case.graph.num_heads):
        rows = heads == head
        _, expected = case.circuit.mpe(case.x, observed=case.observed, head=head)
        torch.testing.assert_close(value[rows], expected[rows])
        expected = case.circuit.posterior(case.x, name, observed=case.observed, head=head)
        torch.testing.assert_close(posterior[rows], expected[rows])


# Soft evidence: queries return states.


@pytest.fixture(params=["direct", "emission", "rat-direct", "rat-emission"])
def soft(request: pytest.FixtureRequest, enumerate_trees: Callable[..., Any]) -> Any:
    """A prior over three states, soft evidence, and p(z, e) of all worlds by enumeration of the same graph's trees."""
    size = 3 if request.param.endswith("direct") else 2
    if request.param.startswith("rat"):
        graph = pc.rat_spn(
            3, depth=2, num_repetitions=3, num_sums=size, num_leaves=size, leaf=pc.SoftEvidence(3), num_heads=2
        )
    else:
        graph = pc.hclt(torch.tensor([-1, 0, 0]), size, pc.SoftEvidence(3), 2)
    evidence = torch.randn(4, 3, 3)
    worlds = torch.cartesian_prod(*[torch.arange(3)] * 3)
    with np.errstate(divide="ignore"):
        hard = np.log(np.eye(3)[worlds.numpy()])
    prior = np.exp(enumerate_trees(graph).log_prob(hard))  # (worlds, heads)
    leaf = np.stack([evidence[:, v, worlds[:, v]].numpy() for v in range(3)]).sum(0)
    return pc.Circuit(graph), evidence, worlds, prior, np.exp(leaf), enumerate_trees(graph), hard


def test_states_are_sampled_from_the_prior(soft: Any) -> None:
    circuit, _, worlds, prior, *_ = soft
    sample = circuit.sample(5000, head=1, generator=torch.Generator().manual_seed(0))
    assert_frequencies(sample, worlds, prior[:, 1])


def test_states_are_sampled_given_evidence(soft: Any) -> None:
    circuit, evidence, worlds, prior, leaf, *_ = soft
    x = evidence[2].expand(5000, 3, 3)
    sample = circuit.sample(
        x=x, observed=torch.ones(5000, 3, dtype=torch.bool), generator=torch.Generator().manual_seed(0)
    )
    posterior = prior[:, 0] * leaf[2]
    assert_frequencies(sample, worlds, posterior / posterior.sum())


def test_states_of_the_maximum(soft: Any) -> None:
    circuit, evidence, worlds, _, leaf, reference, hard = soft
    assignment, value = circuit.mpe(evidence, head=1)
    best = reference.joint(hard, head=1).max(1) * leaf  # (B, worlds): the best latents of every world
    np.testing.assert_allclose(value.detach(), np.log(best.max(1)), **EXACT)
    assert torch.equal(assignment, worlds[torch.from_numpy(best.argmax(1))])


# A batch of circuits.


def test_queries_of_a_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    cases = [build_case(*args) for args in (("chain", "categorical", 1), ("star", "categorical", 3, 1))]
    many = pc.Circuit([case.graph for case in cases])
    x = torch.randint(0, 3, (2, 8, 4))
    observed = torch.rand(2, 8, 4) < 0.5
    heads = torch.stack([torch.randint(0, case.graph.num_heads, (8,)) for case in cases])
    assignment, value = many.mpe(x, observed=observed, head=heads)
    posterior = many.posterior(x, 2, observed=observed, head=heads)
    for g, case in enumerate(cases):
        expected_assignment, expected = case.circuit.mpe(x[g], observed=observed[g], head=heads[g])
        assert torch.equal(assignment[g], expected_assignment)
        torch.testing.assert_close(value[g], expected)
        expected = case.circuit.posterior(x[g], 2, observed=observed[g], head=heads[g])
        torch.testing.assert_close(posterior[g], expected)


def test_samples_of_a_batch_of_circuits(build_case: Callable[..., Any]) -> None:
    cases = [
        build_case(*args)
        for args in (("chain", "bernoulli", 1), ("star", "bernoulli", 2, 1), ("shared", "bernoulli", 1))
    ]
    many = pc.Circuit([case.graph for case in cases])
    sample = many.sample(20000, generator=torch.Generator().manual_seed(0))
    assert sample.shape == (3, 20000, 4)
    x = cases[0].x[6].expand(3, 20000, 4)
    observed = torch.tensor([True, False, False, True]).expand(3, 20000, 4)
    given = many.sample(x=x, observed=observed, generator=torch.Generator().manual_seed(1))
    for g, case in enumerate(cases):
        joint = np.exp(case.reference.log_prob(case.x)[:, 0])
        assert_frequencies(sample[g], case.x, joint)
        agree = (case.x == case.x[6])[:, observed[0, 0]].all(1).numpy()
        assert_frequencies(given[g], case.x, joint * agree / (joint * agree).sum())


# Errors.


def test_bad_queries_are_named(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 2)
    x = case.x[:2]
    with pytest.raises(ValueError, match="head"):
        case.circuit.sample(3, head=2)
    with pytest.raises(ValueError, match="observed"):
        case.circuit.sample(x=x, observed=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match="n"):
        case.circuit.sample()
    with pytest.raises(ValueError, match="node"):
        case.circuit.posterior(x, 99)
    with pytest.raises(ValueError, match="x"):
        case.circuit.mpe(x + 3)


def test_impossible_evidence_is_named(build_case: Callable[..., Any]) -> None:
    graph = build_case("pair", "categorical", 1).graph
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[0.5, 0.5, 0.0]] * node.num_units)
    circuit = pc.Circuit(graph)
    with pytest.raises(ValueError, match="probability zero"):
        circuit.sample(x=torch.tensor([[2, 0]]), observed=torch.tensor([[True, False]]))

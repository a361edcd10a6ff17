"""Mixtures of whole circuits."""

from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc


def tree(parents: list[int], num_heads: int = 1, dtype: torch.dtype | None = None) -> pc.CircuitGraph:
    return pc.hclt(torch.tensor(parents), 3, pc.Categorical(4), num_heads, dtype=dtype)


@pytest.fixture
def trees(double_precision: None) -> list[pc.CircuitGraph]:
    """Three different trees, the second with two heads."""
    return [tree([-1, 0, 1]), tree([1, -1, 1], num_heads=2), tree([2, 2, -1])]


def test_heads_are_weighted_sums_of_the_components_heads(trees: list[pc.CircuitGraph]) -> None:
    weights = torch.rand(2, 4)
    x = torch.cartesian_prod(*[torch.arange(4)] * 3)
    parts = torch.cat([pc.Circuit(found).log_prob(x).exp() for found in trees], 1)
    expected = parts @ (weights / weights.sum(1, keepdim=True)).T
    found = pc.Circuit(pc.mixture(trees, weights, num_heads=2)).log_prob(x)
    torch.testing.assert_close(found.exp(), expected, rtol=1e-10, atol=0)


def test_one_row_of_weights_is_that_of_every_head(trees: list[pc.CircuitGraph]) -> None:
    mixed = pc.mixture(trees, [1, 0, 1, 2], num_heads=3)
    torch.testing.assert_close(mixed.nodes[mixed.root].weight, torch.tensor([[0.25, 0, 0.25, 0.5]]).repeat(3, 1))


def test_weights_are_drawn(trees: list[pc.CircuitGraph]) -> None:
    first, again, other = (
        pc.mixture(trees, num_heads=2, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)
    )
    weight = first.nodes[first.root].weight
    assert torch.equal(weight, again.nodes[again.root].weight)
    assert not torch.allclose(weight, other.nodes[other.root].weight)
    assert bool((weight[0] != weight[1]).all())


def test_latents_of_trees_are_numbered_on(trees: list[pc.CircuitGraph]) -> None:
    mixed = pc.mixture(trees, [1, 2, 3, 4])
    circuit = pc.Circuit(mixed)
    assert sorted(mixed.latents) == list(range(9))
    x = torch.randint(0, 4, (6, 3))
    for i, part in enumerate(trees):
        for v in range(3):
            assert mixed.scopes()[mixed.latents[3 * i + v]] == part.scopes()[part.latents[v]]
    # The posterior of a component's latent is its own, times that of the component.
    parts = torch.stack([pc.Circuit(found).log_prob(x, head=0) for found in trees], 1)
    second = torch.tensor([1.0, 2.0, 3.0, 4.0]).log() + torch.cat(
        [parts[:, :1], pc.Circuit(trees[1]).log_prob(x), parts[:, 2:]], 1
    )
    share = second.softmax(1)[:, 3]
    expected = pc.Circuit(trees[2]).posterior(x, 0) * share[:, None]
    torch.testing.assert_close(circuit.posterior(x, 6), expected)


def test_components_stay_as_they_are(trees: list[pc.CircuitGraph]) -> None:
    """Even the same one twice: the copies are trained on their own."""
    x = torch.randint(0, 4, (30, 3))
    before = pc.Circuit(trees[0]).log_prob(x)
    circuit = pc.Circuit(pc.mixture([trees[0], trees[0]], [0.3, 0.7]))
    torch.testing.assert_close(circuit.log_prob(x), before)
    optimizer = pc.CircuitEM(circuit, lr=1.0)
    (-circuit.log_prob(x)).sum().backward()
    optimizer.step()
    assert circuit.num_parameters == 2 * pc.Circuit(trees[0]).num_parameters + 1
    assert bool((circuit.log_prob(x).sum() > before.sum() + 0.1).all())
    torch.testing.assert_close(pc.Circuit(trees[0]).log_prob(x), before)


def test_components_of_any_structure() -> None:
    """A mixture of mixtures, with components that have nothing but the variables in common."""
    leaf = pc.Bernoulli()
    parts = [
        pc.hmm(4, 3, leaf=leaf, homogeneous=True),
        pc.rat_spn(4, depth=2, num_repetitions=2, num_sums=2, num_leaves=3, leaf=leaf, product="kronecker"),
        pc.poon_domingos((2, 2, 1), delta=1, num_units=2, leaf=leaf),
    ]
    graph = pc.mixture([pc.mixture(parts[:2]), parts[2]], num_heads=2)
    x = torch.cartesian_prod(*[torch.arange(2)] * 4)
    torch.testing.assert_close(pc.Circuit(graph).log_prob(x).logsumexp(0), torch.zeros(2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_components(dtype: torch.dtype) -> None:
    for weights in (None, [1, 2]):
        mixed = pc.mixture([tree([-1, 0], dtype=dtype)] * 2, weights)
        assert mixed.nodes[mixed.root].weight.dtype == dtype


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"graphs": []}, "mixture: graphs is empty"),
        ({"graphs": [tree([-1, 0]), tree([-1, 0, 1])]}, r"graph 1 are \[0, 1, 2\], those of graph 0 are \[0, 1\]"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"weights": [1, 2, 3]}, r"weights must have shape \(2,\) or \(1, 2\).*\(3,\)"),
        ({"weights": torch.ones(2, 2)}, r"weights.*\(2, 2\)"),
        ({"weights": [-1, 2]}, "0 or more"),
        ({"weights": [0, 0]}, "positive sum"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pc.mixture(**({"graphs": [tree([-1, 0]), tree([-1, 0])]} | settings))

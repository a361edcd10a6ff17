"""Chow-Liu trees against scikit-learn's mutual information and networkx' spanning trees."""

import math

import networkx
import pytest
import torch
from sklearn.metrics import mutual_info_score
from torch import Tensor

from lvd_lightning.circuits.structures.chow_liu import (
    center_root,
    chow_liu_tree,
    chow_liu_trees,
    maximum_spanning_tree,
    mutual_information,
)


def correlated_data(num_examples: int, num_vars: int, num_categories: int, seed: int = 0) -> Tensor:
    """A random walk over the variables, so that the mutual information falls with the distance."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, 1 + num_categories // 3, (num_examples, num_vars), generator=generator)
    return steps.cumsum(1) % num_categories


def edges(parents: Tensor) -> set[frozenset[int]]:
    return {frozenset((child, parent)) for child, parent in enumerate(parents.tolist()) if parent >= 0}


def height(parents: Tensor) -> int:
    depths = []
    for v in range(len(parents)):
        depth = 0
        while parents[v] >= 0:
            v, depth = int(parents[v]), depth + 1
        depths.append(depth)
    return max(depths)


def total_weight(parents: Tensor, weights: Tensor) -> float:
    return float(sum(weights[tuple(edge)] for edge in edges(parents)))


@pytest.mark.parametrize(
    ("num_categories", "num_bins"), [(2, None), (5, None), (16, 16), (256, 16), (10, 3), (1, None)]
)
def test_mutual_information_equals_scikit_learn(num_categories: int, num_bins: int | None) -> None:
    x = correlated_data(500, 5, num_categories)
    binned = x if num_bins is None or num_categories <= num_bins else x * num_bins // num_categories
    expected = [[mutual_info_score(binned[:, i], binned[:, j]) for j in range(5)] for i in range(5)]
    mi = mutual_information(x, num_categories, num_bins)
    torch.testing.assert_close(mi, torch.tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-5)


def test_bins_are_equally_wide_over_the_whole_range() -> None:
    x = torch.arange(256)[:, None]
    # Every bin holds as many values, so the entropy of a uniform variable is that of a uniform bin.
    assert mutual_information(x, 256, 16).item() == pytest.approx(math.log(16), rel=1e-5)


def test_blocks_and_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    x = correlated_data(700, 11, 4)
    whole = mutual_information(x, 4)
    monkeypatch.setattr("lvd_lightning.circuits.structures.chow_liu._BLOCK_COLUMNS", 12)
    monkeypatch.setattr("lvd_lightning.circuits.structures.chow_liu._CHUNK_EXAMPLES", 50)
    torch.testing.assert_close(mutual_information(x, 4), whole, rtol=0, atol=1e-6)
    torch.testing.assert_close(mutual_information(x, 4, weights=torch.ones(700)), whole, rtol=0, atol=1e-6)


def test_a_weight_counts_like_repetition() -> None:
    x = correlated_data(60, 4, 3)
    repeats = torch.arange(60) % 4
    weighted = mutual_information(x, 3, weights=repeats)
    torch.testing.assert_close(weighted, mutual_information(x.repeat_interleave(repeats, 0), 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_every_integer_type_is_read_alike(dtype: torch.dtype) -> None:
    x = correlated_data(100, 6, 256)
    torch.testing.assert_close(chow_liu_tree(x.to(dtype)), chow_liu_tree(x))


@pytest.mark.parametrize("seed", range(5))
def test_spanning_tree_has_networkx_weight(seed: int) -> None:
    weights = torch.randn(12, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = weights + weights.T
    graph = networkx.from_numpy_array(weights.numpy() + 100.0)  # shifted: from_numpy_array drops zeros
    expected = networkx.maximum_spanning_tree(graph).size("weight") - 11 * 100.0
    assert total_weight(maximum_spanning_tree(weights), weights) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_spanning_tree_spans_equal_weights(value: float) -> None:
    parents = maximum_spanning_tree(torch.full((7, 7), value))
    assert (parents == -1).sum() == 1
    assert len(edges(center_root(parents))) == 6  # raises if it is not one tree


def test_spanning_trees_side_by_side_equal_one_by_one() -> None:
    weights = torch.rand(5, 9, 9, generator=torch.Generator().manual_seed(0))
    weights = weights + weights.transpose(1, 2)
    together = maximum_spanning_tree(weights)
    torch.testing.assert_close(together, torch.stack([maximum_spanning_tree(w) for w in weights]))


def test_single_variable_is_its_own_tree() -> None:
    assert chow_liu_tree(torch.zeros(3, 1, dtype=torch.int64)).tolist() == [-1]


@pytest.mark.parametrize("num_vars", [1, 2, 3, 8, 9])
def test_center_of_a_chain_is_its_middle(num_vars: int) -> None:
    chain = torch.arange(num_vars) - 1
    centered = center_root(chain)
    assert edges(centered) == edges(chain)
    assert (centered == -1).nonzero().item() == (num_vars - 1) // 2


@pytest.mark.parametrize("seed", range(10))
def test_center_has_the_lowest_height(seed: int) -> None:
    tree = networkx.random_labeled_tree(13, seed=seed)
    parents = torch.full((13,), -1)
    for child, parent in networkx.bfs_predecessors(tree, seed):
        parents[child] = parent
    centered = center_root(parents)
    assert edges(centered) == edges(parents)
    assert height(centered) == networkx.radius(tree)


def test_tree_of_a_markov_chain_is_the_chain() -> None:
    parents = chow_liu_tree(correlated_data(4000, 10, 6), num_categories=6)
    assert edges(parents) == {frozenset((v, v + 1)) for v in range(9)}


def test_subsample_is_seeded() -> None:
    x = correlated_data(300, 12, 5)
    first, second = (chow_liu_tree(x, 5, max_examples=20, seed=seed) for seed in (1, 2))
    torch.testing.assert_close(first, chow_liu_tree(x, 5, max_examples=20, seed=1))
    assert not torch.equal(first, second)
    torch.testing.assert_close(chow_liu_tree(x, 5, max_examples=None), chow_liu_tree(x, 5, max_examples=300))


def test_weights_follow_their_rows_through_the_subsample() -> None:
    chain = correlated_data(400, 6, 4)
    noise = torch.randint(0, 4, (400, 6), generator=torch.Generator().manual_seed(3))
    weights = torch.cat([torch.ones(400), torch.zeros(400)])
    parents = chow_liu_tree(torch.cat([chain, noise]), 4, max_examples=500, weights=weights)
    assert edges(parents) == edges(chow_liu_tree(chain, 4))


def test_few_categories_are_not_binned_away() -> None:
    """Without `num_categories` the data say how many there are: binary variables keep both of their values."""
    x = (correlated_data(2000, 10, 9) > 4).long()
    torch.testing.assert_close(chow_liu_tree(x), chow_liu_tree(x, 2))
    assert edges(chow_liu_tree(x)) != edges(chow_liu_tree(torch.zeros_like(x)))


def test_many_data_sets_equal_one_by_one() -> None:
    sets = [correlated_data(num, 8, 256, seed=num) for num in (40, 200, 90)]
    weights = [torch.rand(len(x), generator=torch.Generator().manual_seed(1)) for x in sets]
    together = chow_liu_trees(sets, 256, weights=weights, max_examples=100)
    alone = [chow_liu_tree(x, 256, weights=w, max_examples=100) for x, w in zip(sets, weights, strict=True)]
    torch.testing.assert_close(together, torch.stack(alone))


@pytest.mark.parametrize(
    ("x", "settings", "message"),
    [
        (torch.tensor([[0, 256]]), {"num_categories": 256}, "0..256.*0..255"),
        (torch.tensor([[0, 7]], dtype=torch.uint8), {"num_categories": 4}, "0..3"),
        (torch.tensor([[-1, 0]]), {}, "-1"),
        (torch.zeros(0, 3, dtype=torch.int64), {}, "at least one example"),
        (torch.zeros(3, dtype=torch.int64), {}, r"\(N, D\)"),
        (torch.rand(3, 2), {}, "integers"),
        (torch.zeros(3, 2, dtype=torch.int64), {"weights": torch.ones(2)}, "one weight per row"),
        (torch.zeros(3, 2, dtype=torch.int64), {"weights": torch.zeros(3)}, "sums to zero"),
        (torch.zeros(2, 2, dtype=torch.int64), {"weights": torch.tensor([1.0, float("nan")])}, "NaN"),
        (torch.zeros(2, 2, dtype=torch.int64), {"num_bins": 0}, "num_bins"),
    ],
)
def test_bad_data_are_named(x: Tensor, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        chow_liu_tree(x, **settings)


@pytest.mark.parametrize("parents", [[-1, -1], [1, 0], [-1, 5], [-1, 2, 1]])
def test_what_is_no_tree_has_no_center(parents: list[int]) -> None:
    with pytest.raises(ValueError, match="parents"):
        center_root(torch.tensor(parents))


def test_spanning_tree_refuses_nan() -> None:
    with pytest.raises(ValueError, match="NaN"):
        maximum_spanning_tree(torch.full((3, 3), float("nan")))

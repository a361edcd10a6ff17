"""The tree over patches: similarity against its formula, spanning, strongest, rooted at its centre."""

import itertools

import numpy as np
import pytest
import torch
from scipy.sparse.csgraph import minimum_spanning_tree
from torch import Tensor

from lvd_lightning.latents import context
from lvd_lightning.latents.context import ancestor_mask, context_tree, linear_cka


class InMemory:
    def __init__(self, x_NPE: Tensor) -> None:
        self._x = x_NPE
        self.shape = (x_NPE.shape[0], x_NPE.shape[1], x_NPE.shape[2])

    def read(self, start: int, stop: int) -> Tensor:
        return self._x[start:stop]

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        return self._x[images, positions]


def _correlated(num_images: int = 50, num_patches: int = 7, num_features: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(num_images, num_patches, num_features, generator=generator)
    return x.cumsum(1) + 5.0  # neighbours share most of their variance; a mean far from zero


def _cka_by_formula(x: np.ndarray, y: np.ndarray) -> float:
    """From the Gram matrices, centred by the centring matrix."""
    n = len(x)
    h = np.eye(n) - np.ones((n, n)) / n
    k, l = h @ x @ x.T @ h, h @ y @ y.T @ h  # noqa: E741
    return float((k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum()))


@pytest.mark.parametrize(("block_entries", "chunk_images"), [(1, 7), (200, 16), (2**24, 512)])
def test_similarity_is_the_formula(monkeypatch: pytest.MonkeyPatch, block_entries: int, chunk_images: int) -> None:
    monkeypatch.setattr(context, "_BLOCK_ENTRIES", block_entries)
    monkeypatch.setattr(context, "_CHUNK_IMAGES", chunk_images)
    x = _correlated()
    similarity = linear_cka(InMemory(x))
    truth = [[_cka_by_formula(x[:, i].double().numpy(), x[:, j].double().numpy()) for j in range(7)] for i in range(7)]
    np.testing.assert_allclose(similarity.numpy(), np.array(truth), rtol=1e-5)


def test_similarity_ignores_rotation_and_scale_and_knows_independence() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 1, 4, generator=generator)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator)).Q
    other = torch.randn(20_000, 1, 4, generator=generator)
    similarity = linear_cka(InMemory(torch.cat([x, 3.0 * x @ rotation + 1.0, other, torch.ones_like(x)], dim=1)))
    assert similarity[0, 1] == pytest.approx(1.0, abs=1e-4)
    assert similarity[0, 2] < 1e-3
    assert similarity[3].tolist() == [0.0] * 4  # never changes, like a black border


def test_similarity_needs_two_images() -> None:
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        linear_cka(InMemory(_correlated(num_images=1)))


def _edges(parents: Tensor) -> set[frozenset[int]]:
    return {frozenset((child, parent)) for child, parent in enumerate(parents.tolist()) if parent >= 0}


def _random_similarity(num_patches: int, seed: int) -> Tensor:
    s = torch.rand(num_patches, num_patches, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (s + s.T) / 2


@pytest.mark.parametrize("seed", range(5))
def test_the_tree_is_spanning_and_the_strongest(seed: int) -> None:
    similarity = _random_similarity(6, seed)
    parents = context_tree(similarity)
    assert (parents == -1).sum() == 1
    assert ancestor_mask(parents)[:, int((parents == -1).nonzero())].all()  # every patch leads to the root
    weight = sum(float(similarity[i, j]) for i, j in map(tuple, _edges(parents)))
    pairs = list(itertools.combinations(range(6), 2))
    best = -1.0
    for edges in itertools.combinations(pairs, 5):
        components = list(range(6))
        for i, j in edges:
            components = [components[i] if c == components[j] else c for c in components]
        if len(set(components)) == 1:
            best = max(best, sum(float(similarity[i, j]) for i, j in edges))
    assert weight == pytest.approx(best)


def test_the_tree_is_that_of_scipy() -> None:
    similarity = _random_similarity(64, 0)
    rows, columns = minimum_spanning_tree(2.0 - similarity.numpy()).nonzero()
    assert _edges(context_tree(similarity)) == {frozenset((int(i), int(j))) for i, j in zip(rows, columns)}


def test_a_chain_is_rooted_in_its_middle_and_ancestors_follow_it() -> None:
    similarity = torch.zeros(5, 5)
    for i in range(4):
        similarity[i, i + 1] = similarity[i + 1, i] = 0.9
    parents = context_tree(similarity)
    assert parents.tolist() == [1, 2, -1, 2, 3]
    expected = [{0, 1, 2}, {1, 2}, {2}, {3, 2}, {4, 3, 2}]
    assert [set(row.nonzero()[:, 0].tolist()) for row in ancestor_mask(parents)] == expected


def test_neighbours_of_a_random_walk_are_linked() -> None:
    assert _edges(context_tree(linear_cka(InMemory(_correlated(num_images=2000))))) == {
        frozenset((i, i + 1)) for i in range(6)
    }


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ValueError, match="cycle"):
        ancestor_mask(torch.tensor([1, 0, -1]))

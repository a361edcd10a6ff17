"""K-means: exact assignment, centroids as good as scikit-learn's, no empty clusters, the same for the same seed."""

import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from lvd_lightning.latents import kmeans
from lvd_lightning.latents.kmeans import add_seeds, assign, fit_centroids, refine, used_centroids


def _blobs(num_blobs: int = 8, size: int = 100, spread: float = 0.5) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_blobs, 1, 5, generator=generator) * 5
    return (centers + spread * torch.randn(num_blobs, size, 5, generator=generator)).flatten(0, 1)


def _inertia(points: Tensor, centroids: Tensor) -> float:
    return float((points - centroids[assign(points, centroids)]).square().sum())


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_assignment_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    points, centroids = _blobs(), torch.randn(13, 5, generator=_generator()) * 5
    nearest = (points[:, None].double() - centroids.double()).square().sum(2).argmin(1)
    assert torch.equal(assign(points, centroids), nearest)
    monkeypatch.setattr(kmeans, "_CHUNK_ENTRIES", 13 * 7)
    assert torch.equal(assign(points, centroids), nearest)


def test_a_far_origin_does_not_blur_the_assignment() -> None:
    """Squared norms of 1e10 would leave float32 nothing of distances of 1."""
    points = torch.tensor([[1e5, 1e5], [1e5 + 1, 1e5], [1e5 + 2, 1e5]])
    assert assign(points, points.flip(0)).tolist() == [2, 1, 0]


def test_ties_go_to_the_first() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    centroids = torch.tensor([[2.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    assert assign(points, centroids).tolist() == [2, 3]


def test_centroids_are_as_good_as_scikit_learns() -> None:
    points = _blobs(spread=2.0)
    ours = _inertia(points, fit_centroids(points, 8, generator=_generator()))
    theirs = KMeans(8, n_init=10, random_state=0).fit(points.numpy()).inertia_
    assert ours < 1.05 * theirs


def test_all_points_count() -> None:
    """One far blob beyond the 256 points per cluster that faiss takes by default: it would be missed by a sample."""
    points = torch.zeros(3000, 2)
    points[-1] = 1000.0
    centroids = fit_centroids(points, 2, generator=_generator())
    assert sorted(centroids[:, 0].tolist()) == [0.0, 1000.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_cluster_is_empty(seed: int) -> None:
    """Many copies of few points: what faiss starts from and splits leaves clusters empty here."""
    distinct = torch.randn(12, 3, generator=_generator(seed))
    points = distinct.repeat_interleave(torch.tensor([500] + [1] * 11), dim=0)
    centroids = fit_centroids(points, 12, generator=_generator(seed))
    assert assign(points, centroids).bincount(minlength=12).min() >= 1
    assert _inertia(points, centroids) < 1e-9


def test_the_repair_is_needed() -> None:
    """The test above would fail without it."""
    distinct = torch.randn(12, 3, generator=_generator())
    points = distinct.repeat_interleave(torch.tensor([500] + [1] * 11), dim=0)
    centroids = kmeans._train_faiss(points, 12, 25, 0, 1)
    assert assign(points, centroids).bincount(minlength=12).min() == 0


def test_fewer_distinct_points_than_clusters_are_refused() -> None:
    points = torch.randn(4, 3, generator=_generator()).repeat(50, 1)
    assert len(fit_centroids(points, 4)) == 4
    with pytest.raises(ValueError, match="fewer distinct points than clusters"):
        fit_centroids(points, 5)
    with pytest.raises(ValueError, match="num_clusters: got 300"):
        fit_centroids(points, 300)
    with pytest.raises(ValueError, match="finite"):
        fit_centroids(torch.full((10, 2), float("nan")), 2)


def test_the_seed_decides() -> None:
    points = _blobs(spread=3.0)
    first, again, other = (fit_centroids(points, 20, generator=_generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_faiss_keeps_its_threads() -> None:
    import faiss

    before = faiss.omp_get_max_threads()
    fit_centroids(_blobs(), 3, num_threads=2)
    assert faiss.omp_get_max_threads() == before


def test_seeds_and_iterations_find_the_blobs() -> None:
    points = _blobs(5, spread=0.1)
    seeds = add_seeds(points, points[:0], 5, _generator())
    assert seeds.shape == (5, 5)
    assert len(assign(seeds, points.view(5, 100, 5).mean(1)).unique()) == 5  # one in every blob
    refined = refine(points, seeds, 20)
    reference = KMeans(5, n_init=5, random_state=0).fit(points.numpy())
    assert _inertia(points, refined) == pytest.approx(reference.inertia_, rel=1e-5)
    assert _inertia(points, refined) < _inertia(points, seeds)


def test_seeds_come_after_the_centroids_there_are() -> None:
    points = _blobs(3, spread=0.1)
    means = points.view(3, 100, 5).mean(1)
    more = add_seeds(points, means[:2], 1, _generator())
    assert torch.equal(more[:2], means[:2])
    assert int(assign(more[2:], means)) == 2


def test_iterations_keep_the_order_and_empty_centroids() -> None:
    points = _blobs(2, spread=0.1)
    means = points.view(2, 100, 5).mean(1)
    start = torch.stack([means[1] + 0.3, torch.full((5,), 1e3), means[0] - 0.3])
    found = refine(points, start, 10)
    torch.testing.assert_close(found, torch.stack([means[1], torch.full((5,), 1e3), means[0]]))
    assert torch.equal(used_centroids(points, found), found[[0, 2]])


def test_equal_points_get_no_second_seed() -> None:
    assert len(add_seeds(torch.ones(9, 3), torch.ones(0, 3), 4, _generator())) == 1


def test_the_generator_decides_on_seeds() -> None:
    points = _blobs()
    found = [add_seeds(points, points[:1], 3, _generator(seed)) for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])

"""K-means: exact assignment, centroids as good as scikit-learn's, no empty clusters, the same for the same seed."""

from pathlib import Path

import pytest
import torch
from helpers.processes import free_port, one_of_two
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


def test_a_point_that_is_not_finite_is_named() -> None:
    points = torch.zeros(5, 3)
    points[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"points: got nan at \[3, 1\], expected finite values"):
        fit_centroids(points, 1)


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
    """One far blob beyond 256 points per cluster: it would be missed by a sample."""
    points = torch.zeros(3000, 2)
    points[-1] = 1000.0
    centroids = fit_centroids(points, 2, generator=_generator())
    assert sorted(centroids[:, 0].tolist()) == [0.0, 1000.0]


@pytest.mark.parametrize("seed", range(5))
def test_no_cluster_is_empty(seed: int) -> None:
    """Many copies of few points: starts drawn uniformly leave clusters empty here."""
    distinct = torch.randn(12, 3, generator=_generator(seed))
    points = distinct.repeat_interleave(torch.tensor([500] + [1] * 11), dim=0)
    centroids = fit_centroids(points, 12, generator=_generator(seed))
    assert assign(points, centroids).bincount(minlength=12).min() >= 1
    assert _inertia(points, centroids) < 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_empty_clusters_are_repaired(seed: int) -> None:
    """From first centroids of which all but one are the nearest of no point."""
    points = _blobs(6, spread=0.1)
    far = torch.full((6, 5), 1e3) + torch.arange(6)[:, None]
    assert (assign(points, refine(points, far, 25)).bincount(minlength=6) > 0).sum() == 1  # without the repair
    found = fit_centroids(points, 6, first=far, generator=_generator(seed))
    assert assign(points, found).bincount(minlength=6).min() >= 1


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


def test_first_centroids_keep_their_places() -> None:
    points = _blobs(5, spread=0.1)
    means = points.view(5, 100, 5).mean(1)
    found = fit_centroids(points, 5, first=means[[3, 1]] + 0.1, generator=_generator())
    torch.testing.assert_close(found[:2], means[[3, 1]])
    assert len(assign(found, means).unique()) == 5
    for wrong in (means.repeat(2, 1), means[:, :4], means[0]):
        with pytest.raises(ValueError, match="first: got shape"):
            fit_centroids(points, 5, first=wrong)


@pytest.mark.parametrize("precision", ["highest", "high"])
@pytest.mark.parametrize("spread", [1.0, 1e-4])
def test_rounding_of_float32_does_not_decide(precision: str, spread: float) -> None:
    """Points near the middle between two centroids, where float32 products are wrong about a half of them."""
    before = torch.get_float32_matmul_precision()
    generator = _generator()
    centroids = 100 * torch.randn(30, 7, generator=generator, dtype=torch.float64)
    pairs = torch.randint(30, (2, 5000), generator=generator)
    middle = centroids[pairs].mean(0)
    points = middle + 1e-5 * spread * torch.randn(5000, 7, generator=generator, dtype=torch.float64)
    try:
        torch.set_float32_matmul_precision(precision)
        found = assign(points, centroids)
    finally:
        torch.set_float32_matmul_precision(before)
    distances = (points[:, None] - centroids).square().sum(2)
    assert torch.equal(found, distances.argmin(1))
    rough = torch.addmm(0.5 * centroids.square().sum(1).float(), points.float(), centroids.T.float(), alpha=-1)
    assert not torch.equal(found, rough.argmin(1))


def test_chunks_and_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points = _blobs(20, spread=3.0)
    whole = fit_centroids(points, 30, generator=_generator())
    monkeypatch.setattr(kmeans, "_CHUNK_ENTRIES", 30 * 17)
    assert torch.equal(fit_centroids(points, 30, generator=_generator()), whole)


def test_sums_are_exact() -> None:
    """The order of points, which decides how they are added up, leaves every bit of the means as it is."""
    points = 1e3 + torch.randn(20_000, 3, generator=_generator())
    start = points[:4].clone()
    shuffled = points[torch.randperm(len(points), generator=_generator())]
    assert torch.equal(refine(points, start, 10), refine(shuffled, start, 10))


def _three_ways() -> Tensor:
    """K-means from k-means++, of copies of few points, and from bad first centroids."""
    torch.set_default_dtype(torch.float32)
    points = _blobs(12, spread=3.0)
    distinct = torch.randn(9, 3, generator=_generator())
    copies = distinct.repeat_interleave(torch.tensor([500] + [1] * 8), dim=0)
    bad = torch.full((12, 5), 1e3) + torch.arange(12)[:, None]
    found = [fit_centroids(points, 25, generator=_generator(3)), fit_centroids(copies, 9, generator=_generator())]
    found.append(fit_centroids(points, 12, first=bad, generator=_generator()))
    return torch.cat([tensor.flatten() for tensor in found])


def _on_rank(rank: int, port: int, folder: str) -> None:
    with one_of_two(rank, port):
        torch.save(_three_ways(), f"{folder}/{rank}.pt")


def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_on_rank, (free_port(), str(tmp_path)), nprocs=2)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt", weights_only=True), _three_ways())


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

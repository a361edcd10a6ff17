"""K-means: centroids by faiss on a sample of points, exact assignment in torch; and Lloyd's iterations for few points.

Shapes: N points, E features, K clusters.
"""

import torch
from torch import Tensor

from lvd_lightning.checks import expect

__all__ = ["add_seeds", "assign", "fit_centroids", "refine", "used_centroids"]

_CHUNK_ENTRIES = 2**24  # scores of a chunk of points against all centroids: 128 MiB of float64
_MAX_REPAIRS = 100
_REPAIR_ITERATIONS = 5


def fit_centroids(
    points: Tensor,
    num_clusters: int,
    *,
    iterations: int = 50,
    generator: torch.Generator | None = None,
    num_threads: int = 1,
) -> Tensor:
    """Centroids such that each is the nearest of at least one of the points.

    All points are used: draw a sample first if there are too many. Clusters that end up empty are put on points drawn
    with probability proportional to their squared distance from the nearest centroid, followed by a few more
    iterations.

    Args:
        points: finite float32 with shape (N, E).
        iterations: of Lloyd's algorithm.
        generator: where the start is drawn from; the same points and generator state give the same centroids.
        num_threads: threads of faiss. It brings an OpenMP of its own beside torch's, and such threads wait for each
            other in a loop: where more of them want to run than the processor has cores, two can be far slower than
            one (4.6 s in place of 0.12 s, on two cores with another program), hence one by default.

    Returns:
        float32 with shape (K, E), on the CPU.

    Raises:
        ValueError: if there are fewer distinct points than clusters, or values that are not finite.
    """
    points_NE = points.detach().to("cpu", torch.float32).contiguous()
    if points_NE.dim() != 2 or not points_NE.isfinite().all():
        raise ValueError(f"points: got shape {tuple(points.shape)} or not all are finite, expected finite (N, E)")
    fits = 1 <= num_clusters <= len(points_NE)
    expect(fits, "num_clusters", num_clusters, f"1 to the number of points, {len(points_NE)}")
    generator = generator or torch.Generator().manual_seed(0)
    seed = int(torch.randint(2**31 - 1, (), generator=generator))
    centroids_KE = _train_faiss(points_NE, num_clusters, iterations, seed, num_threads)
    for _ in range(_MAX_REPAIRS):
        label_N = assign(points_NE, centroids_KE)
        empty = (label_N.bincount(minlength=num_clusters) == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return centroids_KE
        centroids_KE = _cluster_means(points_NE, label_N, centroids_KE)
        # An update can only lower the distances, and so can a new centroid: repairs do not go round in circles.
        centroids_KE[empty] = _draw_far_points(points_NE, centroids_KE[label_N], empty, generator)
        for _ in range(_REPAIR_ITERATIONS):
            centroids_KE = _cluster_means(points_NE, assign(points_NE, centroids_KE), centroids_KE)
    raise ValueError(
        f"{len(empty)} of {num_clusters} clusters stay empty: the points are too close to each other; "
        "use fewer clusters or more points"
    )


def assign(points: Tensor, centroids: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The nearest centroid of every point; of several equally near ones the first.

    Computed in float64, with the centroids' mean subtracted, so that the answer does not depend on the device or on
    how points are split into chunks.

    Args:
        points: floats with shape (N, E).
        centroids: floats with shape (K, E).
        device: where to compute.

    Returns:
        int64 with shape (N,), on the CPU.
    """
    if points.dim() != 2 or centroids.dim() != 2 or points.shape[1] != centroids.shape[1]:
        raise ValueError(
            f"points have shape {tuple(points.shape)} and centroids {tuple(centroids.shape)}, expected (N, E), (K, E)"
        )
    centroids_KE = centroids.to(device, torch.float64)
    origin_E = centroids_KE.mean(0)
    centroids_KE = centroids_KE - origin_E
    offset_K = 0.5 * centroids_KE.square().sum(1)
    label_N = torch.empty(len(points), dtype=torch.int64)
    step = max(1, _CHUNK_ENTRIES // max(centroids.shape))
    for start in range(0, len(points), step):
        x_NE = points[start : start + step].to(device, torch.float64) - origin_E
        # Half the squared distance without the term that all centroids share; argmin takes the first minimum.
        label_N[start : start + step] = torch.addmm(offset_K, x_NE, centroids_KE.T, alpha=-1.0).argmin(1).cpu()
    return label_N


def add_seeds(points: Tensor, centroids: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` more centroids on points, each drawn in proportion to the squared distance from those there are.

    Fewer if all points lie on centroids; the first is drawn uniformly if there are none (k-means++, Arthur and
    Vassilvitskii, 2007).

    Args:
        points: floats with shape (N, E), N at least 1.
        centroids: floats with shape (K, E), K may be 0.
        generator: on the CPU.

    Returns:
        float32 with shape (K to K + count, E), those given first.
    """
    points_NE, centroids_KE = points.double(), centroids.double()
    for _ in range(count):
        if len(centroids_KE):
            nearest_NE = centroids_KE[assign(points_NE, centroids_KE)]
            weight_N = (points_NE - nearest_NE).square().sum(1)
            if not bool((weight_N > 0).any()):
                break
        else:
            weight_N = torch.ones(len(points_NE), dtype=torch.float64)
        centroids_KE = torch.cat([centroids_KE, points_NE[_draw(weight_N, 1, generator)]])
    return centroids_KE.float()


def refine(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """`iterations` of Lloyd's algorithm from given centroids, which keep their order; empty ones stay where they are.

    Args:
        points: floats with shape (N, E).
        centroids: floats with shape (K, E).
    """
    centroids_KE, previous = centroids.float(), None
    for _ in range(iterations):
        label_N = assign(points, centroids_KE)
        if previous is not None and torch.equal(label_N, previous):
            break
        centroids_KE, previous = _cluster_means(points, label_N, centroids_KE), label_N
    return centroids_KE


def used_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """The centroids that are the nearest of at least one of the points."""
    return centroids[assign(points, centroids).bincount(minlength=len(centroids)) > 0]


def _train_faiss(points_NE: Tensor, num_clusters: int, iterations: int, seed: int, num_threads: int) -> Tensor:
    # Imported here: only the latents stage needs it, and it loads a second OpenMP.
    import faiss

    kmeans = faiss.Kmeans(
        points_NE.shape[1],
        num_clusters,
        niter=iterations,
        seed=seed,
        max_points_per_centroid=len(points_NE),  # faiss would silently take 256 points per centroid
        min_points_per_centroid=1,  # faiss would warn on standard output below 39
    )
    threads_before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(num_threads)
    try:
        kmeans.train(points_NE.numpy())
    finally:
        faiss.omp_set_num_threads(threads_before)
    assert kmeans.centroids is not None
    return torch.from_numpy(kmeans.centroids.copy())


def _cluster_means(points_NE: Tensor, label_N: Tensor, centroids_KE: Tensor) -> Tensor:
    """The mean of each cluster's points; an empty cluster keeps its centroid."""
    count_K = label_N.bincount(minlength=len(centroids_KE))
    sum_KE = torch.zeros(centroids_KE.shape, dtype=torch.float64).index_add_(0, label_N, points_NE.double())
    mean_KE = (sum_KE / count_K.clamp_min(1)[:, None]).float()
    return torch.where(count_K[:, None] > 0, mean_KE, centroids_KE)


def _draw_far_points(points_NE: Tensor, nearest_NE: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """A point for every empty cluster; a point that lies on its centroid is never drawn."""
    squared_N = (points_NE.double() - nearest_NE.double()).square().sum(1)
    if not (squared_N > 0).any():
        raise ValueError(
            f"all points lie on centroids and {len(empty)} clusters are still empty: there are fewer distinct points "
            "than clusters; use fewer clusters or more points"
        )
    return points_NE[_draw(squared_N, len(empty), generator)]


def _draw(weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices drawn in proportion to weights; one of weight 0 never is."""
    # torch.multinomial takes at most 2^24 weights; searching the cumulative sum has no such limit.
    cumulative_N = weight_N.cumsum(0)
    target = torch.rand(count, generator=generator, dtype=torch.float64) * cumulative_N[-1]
    return torch.searchsorted(cumulative_N, target, right=True).clamp_max(len(weight_N) - 1)

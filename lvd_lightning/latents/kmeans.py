"""K-means on a device and over ranks: k-means++ starts, Lloyd's iterations, exact assignment, no empty clusters.

One answer for every number of ranks, threads and chunks: points are rounded to a grid so fine that it loses nothing
of float32 and so coarse that float64 adds any number of them without rounding; what is nearest is decided in float64,
and of equally near centroids it is the first.

Shapes: N points, n points of a chunk, E features, K clusters.
"""

import math

import torch
from torch import Tensor

from lvd_lightning.checks import expect
from lvd_lightning.ranks import from_first, rank_and_size, sum_in_place, summed
from lvd_lightning.stopping import stop_if_requested

__all__ = ["add_seeds", "assign", "fit_centroids", "refine", "used_centroids"]

_CHUNK_ENTRIES = 2**20  # scores of a chunk of points against all centroids: 4 MiB of float32 stay in the cache
_CHUNK_ENTRIES_ON_GPU = 2**26
_CHUNK_POINTS = 2**17
_LITTLE_LEFT = 1e-6  # of the terms of a sum in float64 that cancel each other
_SEEDING_POINTS, _SEEDING_POINTS_PER_CLUSTER = 2**16, 64
_MAX_REPAIRS = 100
_REPAIR_ITERATIONS = 5


def fit_centroids(
    points: Tensor,
    num_clusters: int,
    *,
    iterations: int = 50,
    generator: torch.Generator | None = None,
    first: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Centroids such that each is the nearest of at least one of the points. All ranks have to call, with equal points.

    Lloyd's algorithm on all points: draw a sample first if there are too many. It starts at given centroids, and for
    the clusters that these leave at points drawn by greedy k-means++ (from a sample of 65,536 points, or 64 for each
    cluster if these are more). Clusters that end up empty are put on points drawn with probability proportional to
    their squared distance from the nearest centroid, followed by a few more iterations.

    Args:
        points: finite floats with shape (N, E).
        iterations: of Lloyd's algorithm, fewer if nothing changes any more.
        generator: where starts are drawn from, on the CPU, in one state on all ranks; the same points and generator
            state give the same centroids.
        first: centroids to start at, floats with shape (at most K, E); they keep their places.
        device: where to compute; it needs float64.

    Returns:
        float32 with shape (K, E), on the CPU, the same on all ranks.

    Raises:
        ValueError: if there are fewer distinct points than clusters, or values that are not finite.

    Example:
        >>> import torch
        >>> from lvd_lightning.latents.kmeans import fit_centroids
        >>> fit_centroids(torch.tensor([[0.0], [1.0], [10.0], [12.0]]), 2).sort(0).values.flatten()
        tensor([ 0.5000, 11.0000])
    """
    if points.dim() != 2:
        raise ValueError(f"points: got shape {tuple(points.shape)}, expected (N, E)")
    if not points.isfinite().all():
        row, column = (~points.isfinite()).nonzero()[0].tolist()
        raise ValueError(f"points: got {float(points[row, column])} at [{row}, {column}], expected finite values")
    fits = 1 <= num_clusters <= len(points)
    expect(fits, "num_clusters", num_clusters, f"1 to the number of points, {len(points)}")
    if first is None:
        first = torch.zeros(0, points.shape[1])
    if first.dim() != 2 or first.shape[1] != points.shape[1] or len(first) > num_clusters:
        expected = f"(at most {num_clusters}, {points.shape[1]})"
        raise ValueError(f"first: got shape {tuple(first.shape)}, expected {expected}")
    generator = generator or torch.Generator().manual_seed(0)
    # A float32 grid point is what is stored as a centroid too: a point and a centroid on it are equal.
    points_NE = _rounded(points.detach().to(device, torch.float64)).float()
    centroids_KE = _start(points_NE, num_clusters, first.to(device), generator)
    centroids_KE, label_N = _lloyd(points_NE, centroids_KE, iterations)
    for _ in range(_MAX_REPAIRS):
        empty = (_counts(label_N, num_clusters) == 0).nonzero()[:, 0]
        if len(empty) == 0:
            return centroids_KE.cpu()
        centroids_KE = _cluster_means(points_NE, label_N, centroids_KE)
        # An update can only lower the distances, and so can a new centroid: repairs do not go round in circles.
        centroids_KE[empty] = _draw_far_points(points_NE, centroids_KE, label_N, empty, generator)
        centroids_KE, label_N = _lloyd(points_NE, centroids_KE, _REPAIR_ITERATIONS)
    raise ValueError(
        f"{len(empty)} of {num_clusters} clusters stay empty: the points are too close to each other; "
        "use fewer clusters or more points"
    )


def assign(points: Tensor, centroids: Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The nearest centroid of every point; of several equally near ones the first.

    Decided in float64, with the centroids' mean subtracted, so that the answer does not depend on the device or on
    how points are split into chunks. float32 goes first; points for which its rounding may matter are done again.

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
    return _nearest(points, centroids.to(device)).cpu()


def add_seeds(
    points: Tensor, centroids: Tensor, count: int, generator: torch.Generator, *, candidates: int = 1
) -> Tensor:
    """Up to `count` more centroids on points, each drawn in proportion to the squared distance from those there are.

    Fewer if all points lie on centroids; the first is drawn uniformly if there are none (k-means++, Arthur and
    Vassilvitskii, 2007). Of several candidates the one is taken that leaves the smallest sum of squared distances
    (their greedy variant, which starts Lloyd's algorithm visibly better).

    Args:
        points: floats with shape (N, E), N at least 1.
        centroids: floats with shape (K, E), K may be 0.
        generator: on the CPU.
        candidates: drawn for each.

    Returns:
        float32 with shape (K to K + count, E), those given first.
    """
    origin_E = points.double().mean(0)
    points_NE, picked = points.double() - origin_E, []
    norm_N, squared_N = points_NE.square().sum(1), points_NE.new_full((len(points_NE),), torch.inf)
    if len(centroids):
        given_KE = centroids.double() - origin_E
        squared_N = _squared_distances(points_NE, given_KE, _nearest(points_NE, given_KE))
    for _ in range(count):
        weight_N = squared_N if squared_N.isfinite().all() else torch.ones_like(squared_N)
        if not bool((weight_N > 0).any()):
            break
        drawn_C = _draw(weight_N, candidates, generator)
        distance_NC = _squared_distances_from(points_NE, norm_N, points_NE[drawn_C])
        left_NC = torch.minimum(squared_N[:, None], distance_NC)
        best = int(left_NC.sum(0).argmin())
        picked.append(int(drawn_C[best]))
        squared_N = left_NC[:, best].clone()
    return torch.cat([centroids.float(), points[torch.tensor(picked, dtype=torch.int64)].float()])


def refine(points: Tensor, centroids: Tensor, iterations: int) -> Tensor:
    """`iterations` of Lloyd's algorithm from given centroids, which keep their order; empty ones stay where they are.

    On this rank alone.

    Args:
        points: floats with shape (N, E).
        centroids: floats with shape (K, E).
    """
    return _lloyd(_rounded(points.double()).float(), centroids.float(), iterations, shared=False)[0]


def used_centroids(points: Tensor, centroids: Tensor) -> Tensor:
    """The centroids that are the nearest of at least one of the points."""
    return centroids[assign(points, centroids).bincount(minlength=len(centroids)) > 0]


def _chunk_entries(device: torch.device) -> int:
    return _CHUNK_ENTRIES if device.type == "cpu" else _CHUNK_ENTRIES_ON_GPU


def _rounded(points_NE: Tensor) -> Tensor:
    """Float64 points on a grid of 2^-24 of the largest value's power of two: any 2^29 of them are added exactly."""
    largest = float(points_NE.abs().max()) if points_NE.numel() else 0.0
    step = math.ldexp(1.0, math.frexp(largest)[1] - 24) if largest else 1.0
    return (points_NE / step).round() * step


def _start(points_NE: Tensor, num_clusters: int, first_KE: Tensor, generator: torch.Generator) -> Tensor:
    """The first centroids, on the first rank's word; copies of one where there are fewer distinct points."""
    wanted = num_clusters - len(first_KE)
    sample_NE = points_NE
    most = max(_SEEDING_POINTS, _SEEDING_POINTS_PER_CLUSTER * num_clusters)
    if wanted and len(points_NE) > most:
        order = torch.randperm(len(points_NE), generator=generator)[:most]
        sample_NE = points_NE[order.sort().values.to(points_NE.device)]
    # As many candidates as scikit-learn tries.
    found_KE = add_seeds(sample_NE, first_KE, wanted, generator, candidates=2 + int(math.log(num_clusters)))
    return from_first(torch.cat([found_KE, found_KE[:1].expand(num_clusters - len(found_KE), -1)]))


def _lloyd(points_NE: Tensor, centroids_KE: Tensor, iterations: int, shared: bool = True) -> tuple[Tensor, Tensor]:
    """Centroids after some iterations, and the nearest of them for each point of this rank's share."""
    label_N = _nearest(_share(points_NE, shared), centroids_KE)
    for _ in range(iterations):
        stop_if_requested()
        centroids_KE = _cluster_means(points_NE, label_N, centroids_KE, shared)
        previous, label_N = label_N, _nearest(_share(points_NE, shared), centroids_KE)
        changed = (previous != label_N).sum()
        if int(summed(changed) if shared else changed) == 0:
            break
    return centroids_KE, label_N


def _share(points_NE: Tensor, shared: bool = True) -> Tensor:
    """The rows that this rank works on."""
    if not shared:
        return points_NE
    rank, size = rank_and_size()
    return points_NE[rank * len(points_NE) // size : (rank + 1) * len(points_NE) // size]


def _counts(label_N: Tensor, num_clusters: int) -> Tensor:
    """Points of each cluster, over all ranks."""
    return summed(label_N.bincount(minlength=num_clusters))


def _cluster_means(points_NE: Tensor, label_N: Tensor, centroids_KE: Tensor, shared: bool = True) -> Tensor:
    """The mean of each cluster's points; an empty cluster keeps its centroid. The sums are exact: see `_rounded`."""
    own_NE, (count, width) = _share(points_NE, shared), centroids_KE.shape
    # Points are counted in a last column, so that one message does for both.
    sum_KE = torch.zeros(count, width + 1, dtype=torch.float64, device=points_NE.device)
    step = max(1, _chunk_entries(points_NE.device) // width)
    for start in range(0, len(own_NE), step):
        own = slice(start, start + step)
        sum_KE[:, :width].index_add_(0, label_N[own], own_NE[own].double())
    sum_KE[:, width] = label_N.bincount(minlength=count)
    if shared:
        sum_in_place([sum_KE])
    count_K1 = sum_KE[:, width:]
    mean_KE = (sum_KE[:, :width] / count_K1.clamp_min(1)).to(centroids_KE.dtype)
    return torch.where(count_K1 > 0, mean_KE, centroids_KE)


def _nearest(points_NE: Tensor, centroids_KE: Tensor) -> Tensor:
    """The nearest centroid of each point, int64 (N,), on the centroids' device."""
    centroids_KE = centroids_KE.double()
    origin_E = centroids_KE.mean(0)
    centroids_KE = centroids_KE - origin_E
    offset_K = 0.5 * centroids_KE.square().sum(1)
    label_N = torch.empty(len(points_NE), dtype=torch.int64, device=centroids_KE.device)
    # With fewer bits in products than float32 has, as a user may ask for, the bound below does not hold.
    quick = torch.get_float32_matmul_precision() == "highest" and len(centroids_KE) > 1
    table_KE, table_K = centroids_KE.float(), offset_K.float()
    # Products and sums of E terms, and what float32 leaves away of points, centroids and offsets.
    bound = 2 * (points_NE.shape[1] + 8) * torch.finfo(torch.float32).eps * float(centroids_KE.norm(dim=1).max())
    offset_bound = 8 * torch.finfo(torch.float32).eps * float(offset_K.max())
    step = max(1, _chunk_entries(centroids_KE.device) // max(centroids_KE.shape))
    for start in range(0, len(points_NE), step):
        x_nE = points_NE[start : start + step].to(centroids_KE.device, torch.float64) - origin_E
        if not quick:
            label_N[start : start + step] = _nearest_in_float64(x_nE, centroids_KE, offset_K)
            continue
        # Half the squared distance without the term that all centroids share.
        score_nK = torch.addmm(table_K, x_nE.float(), table_KE.T, alpha=-1.0)
        best_n, label_n = score_nK.min(1)
        second_n = score_nK.scatter_(1, label_n[:, None], torch.inf).amin(1)
        doubt = ~(second_n > best_n + (bound * x_nE.norm(dim=1) + offset_bound))  # NaN is doubtful too
        again = doubt.nonzero()[:, 0]
        if len(again):
            label_n[again] = _nearest_in_float64(x_nE[again], centroids_KE, offset_K)
        label_N[start : start + step] = label_n
    return label_N


def _nearest_in_float64(x_nE: Tensor, centroids_KE: Tensor, offset_K: Tensor) -> Tensor:
    return torch.addmm(offset_K, x_nE, centroids_KE.T, alpha=-1.0).argmin(1)  # takes the first minimum


def _squared_distances(points_NE: Tensor, centroids_KE: Tensor, label_N: Tensor) -> Tensor:
    """From each point's own centroid, in float64; 0 where they are equal."""
    found = [
        (own_nE.double() - centroids_KE[label_n].double()).square().sum(1)
        for own_nE, label_n in zip(points_NE.split(_CHUNK_POINTS), label_N.split(_CHUNK_POINTS))
    ]
    return torch.cat(found)


def _squared_distances_from(points_NE: Tensor, norm_N: Tensor, centroids_CE: Tensor) -> Tensor:
    """From every centroid, (N, C), by products; norm_N: squared norms of the points.

    Where little is left of products that are much larger, by differences instead, which leave 0 to equal points.
    """
    largest_NC = norm_N[:, None] + centroids_CE.square().sum(1)
    found_NC = torch.addmm(largest_NC, points_NE, centroids_CE.T, alpha=-2.0)
    n, c = (found_NC < _LITTLE_LEFT * largest_NC).nonzero(as_tuple=True)
    for some_n, some_c in zip(n.split(_CHUNK_POINTS), c.split(_CHUNK_POINTS)):
        found_NC[some_n, some_c] = (points_NE[some_n] - centroids_CE[some_c]).square().sum(1)
    return found_NC


def _draw_far_points(
    points_NE: Tensor, centroids_KE: Tensor, label_N: Tensor, empty: Tensor, generator: torch.Generator
) -> Tensor:
    """A point for every empty cluster; a point that lies on its centroid is never drawn."""
    rank, size = rank_and_size()
    squared_N = torch.zeros(len(points_NE), dtype=torch.float64, device=points_NE.device)
    start = rank * len(points_NE) // size
    squared_N[start : start + len(label_N)] = _squared_distances(_share(points_NE), centroids_KE, label_N)
    squared_N = summed(squared_N)
    if not bool((squared_N > 0).any()):
        raise ValueError(
            f"all points lie on centroids and {len(empty)} clusters are still empty: there are fewer distinct points "
            "than clusters; use fewer clusters or more points"
        )
    return points_NE[_draw(squared_N, len(empty), generator)]


def _draw(weight_N: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices drawn in proportion to weights; one of weight 0 never is."""
    # torch.multinomial takes at most 2^24 weights; searching the cumulative sum has no such limit.
    cumulative_N = weight_N.cumsum(0)
    target = torch.rand(count, generator=generator, dtype=torch.float64).to(weight_N.device) * cumulative_N[-1]
    return torch.searchsorted(cumulative_N, target, right=True).clamp_max(len(weight_N) - 1)

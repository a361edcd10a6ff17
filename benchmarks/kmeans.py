"""K-means here against faiss: time of the iterations, and what is left of the squared distances.

    pip install faiss-cpu
    python benchmarks/kmeans.py --points 1000000 --features 128 --clusters 1024

Points are drawn around centres of their own, with a common low-dimensional part, so that there is structure to find.
Both run the same number of iterations on all points, in turns in one process, on torch's number of threads; starts are
timed apart, since faiss draws its own uniformly. Not a dependency: faiss is only needed to compare.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lvd_lightning.latents import kmeans


def points_around_centres(count: int, features: int, clusters: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(2 * clusters, features, generator=generator)
    label = torch.randint(2 * clusters, (count,), generator=generator)
    return centres[label] + 0.8 * torch.randn(count, features, generator=generator)


def by_faiss(points: Tensor, clusters: int, iterations: int) -> Tensor:
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    found = faiss.Kmeans(points.shape[1], clusters, niter=iterations, seed=0, max_points_per_centroid=len(points))
    found.train(points.numpy())
    return torch.from_numpy(found.centroids.copy())


def left(points: Tensor, centroids: Tensor) -> float:
    """Mean squared distance from the nearest centroid."""
    label = kmeans.assign(points, centroids)
    chunks = zip(points.split(1 << 16), label.split(1 << 16), strict=True)
    return sum(float((x - centroids[z]).double().square().sum()) for x, z in chunks) / len(points)


def timed(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=1024)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    points = points_around_centres(arguments.points, arguments.features, arguments.clusters)
    generator = torch.Generator().manual_seed(0)
    wait, start = timed(lambda: kmeans._start(points, arguments.clusters, points[:0], generator))
    print(f"k-means++ start: {wait:.1f} s")
    times: dict[str, list[float]] = {"here": [], "faiss": []}
    for _ in range(arguments.repeats):
        seconds, ours = timed(lambda: kmeans.refine(points, start, arguments.iterations))
        times["here"].append(seconds)
        seconds, theirs = timed(lambda: by_faiss(points, arguments.clusters, arguments.iterations))
        times["faiss"].append(seconds)
    median = {name: statistics.median(found) for name, found in times.items()}
    print(f"{arguments.iterations} iterations: here {median['here']:.1f} s, faiss {median['faiss']:.1f} s,", end=" ")
    print(f"ratio {median['here'] / median['faiss']:.2f}")
    print(f"mean squared distance: here {left(points, ours):.4f}, faiss {left(points, theirs):.4f}")


if __name__ == "__main__":
    main()

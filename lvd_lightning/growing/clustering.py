"""Heads by K-means inside each circuit: the first ones, and new ones beside those that grow.

Centroids are fitted to a sample of a circuit's patches; then every patch goes to the nearest one of its circuit.

Shapes: N images, P patches, n patches of a chunk, E features, G circuits, H heads, C centroids of a circuit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.growing.examples import Examples
from lvd_lightning.growing.features import PatchFeatures
from lvd_lightning.latents.kmeans import add_seeds, refine, used_centroids
from lvd_lightning.models.routing import route
from lvd_lightning.ranks import from_first, summed
from lvd_lightning.shares import own_chunks

__all__ = ["first_heads", "nearest_centroids", "recluster"]

ITERATIONS = 25
#: Patches per centroid to which these are fitted.
POINTS_PER_CENTROID = 512
CHUNK_ENTRIES = 1 << 23


def first_heads(
    features: PatchFeatures,
    circuit: Tensor,
    num_circuits: int,
    num_heads: int,
    *,
    min_examples: int = 1,
    generator: torch.Generator,
) -> Tensor:
    """A head for every training patch: clusters of the features inside each circuit. All processes have to call.

    A circuit gets fewer heads if it has not `min_examples` patches for each, or too few distinct ones.

    Args:
        features: of the training patches.
        circuit: int (N, P), which circuit models each patch.
        generator: on the CPU, in the same state on all processes.

    Returns:
        int16 (N, P).
    """
    limit = POINTS_PER_CENTROID * num_heads
    flat = circuit.reshape(-1).long()
    count_G = torch.bincount(flat, minlength=num_circuits)
    routed = route(flat, num_circuits, slots=limit, generator=generator)
    centroids: list[Tensor] = []
    for g in range(num_circuits):
        wanted = min(num_heads, int(count_G[g]) // min_examples)
        chosen = routed.index[g][routed.weight[g] > 0].sort().values
        if wanted < 2:
            centroids.append(torch.zeros(1, features.fitted.mean.shape[1]))
            continue
        points = features.gather(chosen)
        seeds = add_seeds(points, points[:0], wanted, generator)
        centroids.append(used_centroids(points, refine(points, seeds, ITERATIONS)))
    label_NP = nearest_centroids(features, circuit, _agreed(centroids))
    return label_NP.short()


def recluster(
    features: PatchFeatures,
    examples: Examples,
    heads: list[list[int]],
    num_heads: list[int],
    *,
    generator: torch.Generator,
) -> Tensor:
    """Divide the patches of growing heads among these and their copies. All processes have to call.

    K-means of their features inside each circuit. The first centroids are the means of the growing heads' patches,
    which so keep their clusters, and for each head one more on a patch of its own, drawn in proportion to the squared
    distance from the mean: what becomes its cluster belongs to the copy. A copy may end without patches, where all
    those of its head are alike.

    Args:
        features: of the training patches.
        examples: the training patches with their heads before growth.
        heads: of every circuit the heads that grow.
        num_heads: heads of every circuit before growth; the copies are the heads after these, in the order of `heads`.
        generator: on the CPU, in the same state on all processes.

    Returns:
        int16 (N, P), the heads after growth.
    """
    table_GH = torch.full((len(heads), max(num_heads)), -1)
    for g, wanted in enumerate(heads):
        table_GH[g, wanted] = torch.arange(len(wanted))
    circuit_NP, head_NP = examples.circuit_NP.long(), examples.head_NP.long()
    place_NP = table_GH[circuit_NP, head_NP]  # which of the growing heads, -1 for the others
    flat = (place_NP.reshape(-1) >= 0).nonzero()[:, 0]
    limit = 2 * POINTS_PER_CENTROID * max(map(len, heads), default=1)
    centroids: list[Tensor] = [torch.zeros(0, features.fitted.mean.shape[1]) for _ in heads]
    if len(flat):
        routed = route(circuit_NP.reshape(-1)[flat], len(heads), slots=limit, generator=generator)
        for g, wanted in enumerate(heads):
            chosen = flat[routed.index[g][routed.weight[g] > 0]].sort().values
            if wanted and len(chosen):
                place_n = place_NP.reshape(-1)[chosen]
                centroids[g] = _grown(features.gather(chosen), place_n, len(wanted), generator)
    label_NP = nearest_centroids(features, circuit_NP, _agreed(centroids))
    target_GC = torch.zeros(len(heads), max(1, 2 * max(map(len, heads), default=0)), dtype=torch.int64)
    for g, wanted in enumerate(heads):
        copies = range(num_heads[g], num_heads[g] + len(wanted))
        target_GC[g, : 2 * len(wanted)] = torch.tensor([*wanted, *copies], dtype=torch.int64)
    return torch.where(place_NP >= 0, target_GC[circuit_NP, label_NP.long()], head_NP).short()


def nearest_centroids(features: PatchFeatures, circuit: Tensor, centroids: list[Tensor]) -> Tensor:
    """The nearest centroid of its own circuit for every patch; all processes have to call.

    Computed in float64, so that the answer does not depend on how the work is divided. Patches of circuits with at most
    one centroid get 0.

    Args:
        circuit: int (N, P).
        centroids: of every circuit, float (C, E).

    Returns:
        int32 (N, P).
    """
    width = max(len(found) for found in centroids)
    origin_E = torch.cat(centroids).double().mean(0) if width else torch.zeros(centroids[0].shape[1])
    table_GCE = torch.zeros(len(centroids), max(1, width), centroids[0].shape[1], dtype=torch.float64)
    offset_GC = torch.full(table_GCE.shape[:2], torch.inf, dtype=torch.float64)
    for g, found in enumerate(centroids):
        table_GCE[g, : len(found)] = found.double() - origin_E
        offset_GC[g, : len(found)] = 0.5 * table_GCE[g, : len(found)].square().sum(1)
    several_G = torch.tensor([len(found) > 1 for found in centroids])
    label_NP = torch.zeros(circuit.shape, dtype=torch.int32)
    images = own_chunks(len(circuit), features.images_at_once)
    step = max(1, CHUNK_ENTRIES // table_GCE[0].numel())
    for found_images, x_nE in features.chunks(images):
        circuit_n = circuit[found_images.start : found_images.stop].reshape(-1).long()
        label_n = torch.zeros(len(circuit_n), dtype=torch.int32)
        for at in several_G[circuit_n].nonzero()[:, 0].split(step):
            own_nCE = table_GCE[circuit_n[at]]
            # Half the squared distance without the term that all centroids share; argmin takes the first minimum.
            score_nC = offset_GC[circuit_n[at]] - torch.einsum("nce,ne->nc", own_nCE, x_nE[at].double() - origin_E)
            label_n[at] = score_nC.argmin(1).int()
        label_NP[found_images.start : found_images.stop] = label_n.view(-1, circuit.shape[1])
    return summed(label_NP)


def _grown(points: Tensor, place: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Centroids (2 count, E) of `count` clusters, points of cluster `place`, and of their copies."""
    means, seeds = [], []
    for number in range(count):
        own = points[place == number]
        mean_1E = own.double().mean(0, keepdim=True).float() if len(own) else points.new_full((1, points.shape[1]), 0.0)
        drawn = add_seeds(own, mean_1E, 1, generator) if len(own) else mean_1E
        means.append(mean_1E)
        seeds.append(drawn[-1:])
    return refine(points, torch.cat([*means, *seeds]), ITERATIONS)


def _agreed(centroids: list[Tensor]) -> list[Tensor]:
    """Those of the first process, which are the same on all but for rounding."""
    sizes = from_first(torch.tensor([len(found) for found in centroids])).tolist()
    width = centroids[0].shape[1]
    # Rounding may decide whether a centroid is used by any point: then the numbers of rows differ.
    rows = torch.cat(centroids)[: sum(sizes)]
    flat = torch.cat([rows, torch.zeros(sum(sizes) - len(rows), width)])
    return list(from_first(flat).split(sizes))

"""Clusters of the training patches, and the cluster of every patch.

Shapes: N images, P patches, E features, D features after centring and projection, K clusters; Q is 1 if the positions
share their clusters, else P.
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.files import read_array, read_tensors, write_array, write_json, write_tensors
from lvd_lightning.latents.encode import Encoding
from lvd_lightning.latents.features import PatchVectors
from lvd_lightning.latents.kept_patches import PATCHES_FILE, keep_patches
from lvd_lightning.latents.keys import key_of, stored_key
from lvd_lightning.latents.kmeans import assign, fit_centroids
from lvd_lightning.latents.sampling import sample_distinct
from lvd_lightning.latents.settings import SPLITS, LatentsContext, LatentsSettings, float64_device
from lvd_lightning.latents.transform import AffineMap, fit_map
from lvd_lightning.ranks import check_agreement, on_first, summed
from lvd_lightning.shares import own_chunks
from lvd_lightning.stopping import stop_if_requested

__all__ = ["INFO_FILE", "assignments_path", "write_clusters"]

INFO_FILE = "latents.json"

_POINTS_PER_CLUSTER = 1024
_CHUNK_ENTRIES = 2**23  # features held at once while they are assigned: 32 MiB
_POINTS_FOR_FIGURES = 2**16


def assignments_path(folder: Path, split: str) -> Path:
    return folder / f"assignments_{split}.npy"


def write_clusters(context: LatentsContext, settings: LatentsSettings, encoding: Encoding) -> None:
    """Write centroids, assignments of every split, some patches of every cluster, and last what they are.

    What is there already stays.

    All ranks have to call: they share the work, and the first one writes.
    """
    folder, train, begun = context.dir, encoding.vectors["train"], time.monotonic()
    center = settings.center or ("position" if encoding.positional and settings.pooled else "none")
    without = ("batch_size", "keep_features", "cache_gb")  # settings that change nothing
    facts = {name: value for name, value in asdict(settings).items() if name not in without}
    if not settings.normalize:  # as it was before there was that setting
        del facts["normalize"]
    if not settings.value_share:
        del facts["value_share"]
    facts |= {"center": center, "context": "none" if encoding.parents is None else "tree"}
    key = key_of(encoding.key, facts, context.generator("centroids").initial_seed())
    if on_first(lambda: stored_key(folder / "centroids.json")) != key:
        on_first(partial(_forget, folder))
        if settings.method == "codes":
            fitted, centroids_QKD = _used_codes(context, encoding)
        else:
            fitted, centroids_QKD = _fit(context, settings, encoding, center == "position")
        check_agreement("the centroids of the latent values", "", {"centroids": centroids_QKD})
        on_first(partial(_save, folder, fitted, centroids_QKD[0] if settings.pooled else centroids_QKD, key))
    fitted = _load_map(folder / "map.safetensors")._replace(normalize=settings.normalize)
    centroids = torch.from_numpy(read_array(folder / "centroids.npy"))
    for split in SPLITS:
        path = assignments_path(folder, split)
        if not on_first(path.is_file):
            label_NP = _assign_all(encoding.vectors[split], fitted, centroids, float64_device(context.device))
            on_first(partial(write_array, path, label_NP.numpy().astype(np.int32)))

    def describe() -> None:
        label_NP = torch.from_numpy(read_array(assignments_path(folder, "train")).astype(np.int64))
        if not (folder / PATCHES_FILE).is_file():
            keep_patches(context, label_NP, centroids.shape[-2], pooled=settings.pooled)
        write_json(
            folder / INFO_FILE,
            {
                **facts,
                "num_clusters": centroids.shape[-2],
                "source": encoding.source,
                "parents": encoding.parents,
                "num_patches": train.shape[1],
                "num_features": train.shape[2],
                "num_examples": {split: encoding.vectors[split].shape[0] for split in SPLITS},
                "figures": _use_of_clusters(label_NP, centroids.shape[-2], settings.pooled)
                | {"mean_squared_distance": _mean_squared_distance(context, train, fitted, centroids, label_NP)}
                | _speed(encoding, time.monotonic() - begun),
            },
        )

    on_first(describe)


def _save(folder: Path, fitted: AffineMap, centroids: Tensor, key: str) -> None:
    write_array(folder / "centroids.npy", centroids.numpy())
    _save_map(folder / "map.safetensors", fitted)
    write_json(folder / "centroids.json", {"key": key})


def _forget(folder: Path) -> None:
    """Remove what belongs to other centroids, the statement of what is there first."""
    (folder / INFO_FILE).unlink(missing_ok=True)
    (folder / "centroids.json").unlink(missing_ok=True)
    (folder / PATCHES_FILE).unlink(missing_ok=True)
    for split in SPLITS:
        assignments_path(folder, split).unlink(missing_ok=True)


def _used_codes(context: LatentsContext, encoding: Encoding) -> tuple[AffineMap, Tensor]:
    """The identity, and the codes of the teacher's codebook that training patches have, with shape (1, K, E)."""
    codebook = encoding.codebook
    assert codebook is not None
    identity = AffineMap(torch.zeros(1, codebook.shape[1]), None)
    label_NP = _assign_all(encoding.vectors["train"], identity, codebook, float64_device(context.device))
    return identity, codebook[label_NP.unique()][None]


def _fit(
    context: LatentsContext, settings: LatentsSettings, encoding: Encoding, center: bool
) -> tuple[AffineMap, Tensor]:
    """The map before clustering, and centroids with shape (Q, K, D), Q = 1 if pooled, else P; the same on all ranks."""
    assert settings.num_clusters is not None
    vectors = encoding.vectors["train"]
    num_images, num_patches, _ = vectors.shape
    device = float64_device(context.device)
    per_position = not settings.pooled
    fit = partial(fit_map, vectors, center=center, per_position=per_position, whiten=settings.whiten, device=device)
    values = (encoding.num_values, settings.value_share) if encoding.num_values else None
    fitted = on_first(partial(fit, num_components=settings.pca, values=values))._replace(normalize=settings.normalize)
    groups: list[int | None] = [None] if settings.pooled else list(range(num_patches))
    size = num_images * num_patches if settings.pooled else num_images
    max_points = min(size, settings.max_points or _POINTS_PER_CLUSTER * settings.num_clusters)
    centroids = []
    for position in groups:
        generator = context.generator("centroids", -1 if position is None else position)
        drawn = sample_distinct(size, max_points, generator)
        if position is None:
            images, positions = drawn // num_patches, drawn % num_patches
        else:
            images, positions = drawn, torch.full_like(drawn, position)
        points = fitted.of_patches(vectors.gather(images, positions), positions)
        try:
            cluster = partial(fit_centroids, iterations=settings.iterations, generator=generator, device=device)
            centroids.append(cluster(points, settings.num_clusters))
        except ValueError as error:
            where = "all positions" if position is None else f"position {position}"
            raise ValueError(f"clustering the training patches of {where}: {error}") from error
    return fitted, torch.stack(centroids)


def _assign_all(vectors: PatchVectors, fitted: AffineMap, centroids: Tensor, device: torch.device) -> Tensor:
    """The cluster of every patch, int64 with shape (N, P), on all ranks, which share the work."""
    num_images, num_patches, num_features = vectors.shape
    label_NP = torch.zeros(num_images, num_patches, dtype=torch.int64)
    step = max(1, _CHUNK_ENTRIES // (num_patches * num_features))
    own = own_chunks(num_images, step)
    for start in range(own.start, own.stop, step):
        stop_if_requested()
        stop = min(start + step, own.stop)
        x_NPD = fitted.of_images(vectors.read(start, stop))
        if centroids.dim() == 2:
            label_NP[start:stop] = assign(x_NPD.flatten(0, 1), centroids, device).view(-1, num_patches)
        else:
            for p, centroids_KD in enumerate(centroids):
                label_NP[start:stop, p] = assign(x_NPD[:, p], centroids_KD, device)
    return summed(label_NP)


def _use_of_clusters(label_NP: Tensor, num_clusters: int, pooled: bool) -> dict[str, float]:
    """Over the training patches; if positions have clusters of their own, the mean perplexity and smallest share."""
    groups = [label_NP.flatten()] if pooled else list(label_NP.T)
    share_QK = torch.stack([label.bincount(minlength=num_clusters) for label in groups]).double()
    share_QK /= share_QK.sum(1, keepdim=True)
    perplexity_Q = torch.special.entr(share_QK).sum(1).exp()
    return {
        "num_clusters": num_clusters,
        "cluster_perplexity": perplexity_Q.mean().item(),
        "smallest_cluster_share": share_QK.min().item(),
    }


def _mean_squared_distance(
    context: LatentsContext, vectors: PatchVectors, fitted: AffineMap, centroids: Tensor, label_NP: Tensor
) -> float:
    """From the centroids, of a sample of the training patches."""
    num_patches = vectors.shape[1]
    drawn = sample_distinct(label_NP.numel(), _POINTS_FOR_FIGURES, context.generator("figures"))
    images, positions = drawn // num_patches, drawn % num_patches
    label = label_NP[images, positions]
    nearest = centroids[label] if centroids.dim() == 2 else centroids[positions, label]
    points = fitted.of_patches(vectors.gather(images, positions), positions)
    return (points - nearest).double().square().sum(1).mean().item()


def _speed(encoding: Encoding, seconds: float) -> dict[str, float]:
    """What an encoder of texts and the clustering of its features took."""
    clock = encoding.clock
    if clock is None or not clock.seconds:
        return {}
    rate = clock.num_parts / clock.seconds
    return {"words_per_second": rate, "encoding_seconds": clock.seconds, "clustering_seconds": seconds}


def _save_map(path: Path, fitted: AffineMap) -> None:
    matrix = {} if fitted.matrix is None else {"matrix": fitted.matrix}
    write_tensors(path, {"mean": fitted.mean, **matrix})


def _load_map(path: Path) -> AffineMap:
    tensors = read_tensors(path)
    return AffineMap(tensors["mean"], tensors.get("matrix"))

"""What the latents stage is told, and what it is given."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from lvd_lightning.checks import check_at_least, check_choice, check_counts, expect

__all__ = ["SPLITS", "LatentsContext", "LatentsSettings", "float64_device"]

SPLITS = ("train", "val", "test")


class LatentsContext(Protocol):
    """What the stage is given: see `lvd_lightning.context.StageContext`."""

    @property
    def dir(self) -> Path: ...
    @property
    def data(self) -> Any: ...
    @property
    def shared(self) -> Mapping[str, Any]: ...
    @property
    def device(self) -> torch.device: ...
    def artefact(self, kind: str) -> Path | None: ...
    def generator(self, *parts: int | str) -> torch.Generator: ...


@dataclass(frozen=True)
class LatentsSettings:
    """How features become latent variables.

    num_clusters: values of a latent variable, K; with codes the size of the teacher's codebook, which None stands for.
    method: "kmeans": the latent variable of a patch is the cluster of its feature; "codes": it is the code that the
        teacher itself gives it (a VQVAE has codes). Codes that no training patch has are left out, so there may be
        fewer values than `num_clusters`.
    pooled: one clustering for all patch positions, or one for each.
    max_points: training patches that the centroids are fitted to, drawn at random; if not pooled, so many of each
        position; None: 1024 per cluster.
    iterations: of Lloyd's algorithm.
    batch_size: images, or windows of a text, per call of the teacher.
    context: "tree": a patch is encoded together with its ancestors in a tree over the patches; "none": alone, or in
        sight of the whole image by a teacher that always is. None: "tree" for a teacher that can hide patches (MAE).
    context_images: training images that the tree is learned from.
    center: "position" subtracts every position's mean from its features, "none" does not. None: "position" for pooled
        features of a teacher that embeds positions (MAE). These carry the position and the number of visible ancestors,
        which a position's mean takes up for the most part; left in, clusters tell positions apart instead of contents
        (64 clusters of CIFAR-10: 3.8 bits about the position in place of 0.5). Pixels, and features of convolutions,
        are left as they are: they mean the same at all positions.
    pca: cluster so many principal components of the features; None: the features.
    whiten: scale the components to unit variance.
    normalize: scale what is clustered to length 1, so that clusters are of directions; for features of texts, whose
        lengths say little about what follows (four books of the King James Bible, 64 clusters: a validation perplexity
        of 87 from counts, and not 101).
    value_share: of the parts' own values, such as pixels, in the total variance of what is clustered, beside the
        features of a teacher: each is scaled as a whole, before principal components are taken. Features of a VQ-VAE
        say what a patch shows and little about its level, by which neighbours have to agree.
    keep_features: leave the features on disk, for clustering them again.
    cache_gb: gigabytes that features may take on disk; if they would take more, none are kept, and they are computed
        whenever they are read: up to four times if `pooled`, else once for every position and twice more (of suffixes
        of a text three times, since only what is asked for is encoded). None: as many as they take.
    """

    num_clusters: int | None = None
    method: str = "kmeans"
    pooled: bool = True
    max_points: int | None = None
    iterations: int = 50
    batch_size: int = 256
    context: str | None = None
    context_images: int = 4096
    center: str | None = None
    pca: int | None = None
    whiten: bool = False
    normalize: bool = False
    value_share: float = 0.0
    keep_features: bool = True
    cache_gb: float | None = None

    def __post_init__(self) -> None:
        counts = ("num_clusters", "max_points", "iterations", "batch_size", "context_images", "pca")
        check_counts(**{name: getattr(self, name) for name in counts})
        check_at_least(0, cache_gb=self.cache_gb)
        check_choice(("kmeans", "codes"), method=self.method)
        is_told = self.method != "kmeans" or self.num_clusters is not None
        expect(is_told, "num_clusters", self.num_clusters, "the number of values of a latent variable")
        fits = 0 <= self.value_share < 1
        expect(fits, "value_share", self.value_share, "from 0 to less than 1; values alone: leave the teacher away")
        check_choice(("tree", "none"), context=self.context)
        check_choice(("position", "none"), center=self.center)
        if self.method == "codes":
            for name, value, only in (
                ("pooled", self.pooled, True),
                ("center", self.center or "none", "none"),
                ("pca", self.pca, None),
                ("whiten", self.whiten, False),
                ("normalize", self.normalize, False),
                ("value_share", self.value_share, 0),
            ):
                expect(
                    value == only,
                    name,
                    value,
                    f"{only!r} with method codes: codes are nearest to the features as they are, and the same for all "
                    "positions",
                )


def float64_device(device: torch.device) -> torch.device:
    """Where to compute in float64: Apple's GPUs have none."""
    return torch.device("cpu") if device.type == "mps" else device

"""The features that patches are clustered by inside their circuits: those that were clustered.

Shapes: N images, P patches, E features, n patches.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning.context import StageContext
from lvd_lightning.files import read_tensors
from lvd_lightning.latents import load_latents_info
from lvd_lightning.latents.features import FeatureStore, PartValues, PatchVectors
from lvd_lightning.latents.transform import AffineMap
from lvd_lightning.stopping import stop_if_requested

__all__ = ["PatchFeatures"]

#: Numbers that are read at once.
CHUNK_ENTRIES = 1 << 23


@dataclass(frozen=True)
class PatchFeatures:
    """Features of the training patches, mapped as they were before their clustering.

    vectors: as stored, (N, P, E); fitted: the map.
    """

    vectors: PatchVectors
    fitted: AffineMap

    @classmethod
    def of(cls, context: StageContext) -> PatchFeatures:
        """Those that were clustered; the values of parts if there was no teacher, or its features were removed."""
        folder = context.artefact("latents")
        values = PartValues(context.data, "train")
        plain = AffineMap(torch.zeros(1, values.shape[2]), None)
        if folder is None or not (folder / "map.safetensors").is_file():
            return cls(values, plain)
        tensors, info = read_tensors(folder / "map.safetensors"), load_latents_info(folder)
        fitted = AffineMap(tensors["mean"], tensors.get("matrix"), info.get("normalize", False))
        if info.get("source") != "teacher":
            return cls(values, fitted)
        try:
            return cls(FeatureStore(folder / "features_train.npy"), fitted)
        except FileNotFoundError:
            warnings.warn(
                f"{folder}: the teacher's features were removed (keep_features: false), so heads are told apart by the "
                "values of their patches",
                stacklevel=2,
            )
            return cls(values, plain)

    @property
    def num_positions(self) -> int:
        """P."""
        return self.vectors.shape[1]

    def gather(self, flat: Tensor) -> Tensor:
        """Features of patches at numbers image * P + position, float32 (n, D)."""
        images, positions = flat // self.num_positions, flat % self.num_positions
        return self.fitted.of_patches(self.vectors.gather(images, positions), positions)

    @property
    def images_at_once(self) -> int:
        """How many images a chunk has."""
        _, positions, size = self.vectors.shape
        return int(max(1, CHUNK_ENTRIES // (positions * size)))

    def chunks(self, images: range) -> Iterator[tuple[range, Tensor]]:
        """The features of all patches of some images at a time: these images, and float32 (n P, D)."""
        step = self.images_at_once
        for low in range(images.start, images.stop, step):
            stop_if_requested()
            high = min(low + step, images.stop)
            yield range(low, high), self.fitted.of_images(self.vectors.read(low, high)).flatten(0, 1)

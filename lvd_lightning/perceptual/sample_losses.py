"""The losses on samples and on reconstructions, each with its weight, in one place.

Shapes: B images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from lvd_lightning.checks import check_at_least, expect
from lvd_lightning.parts import ImagePatches
from lvd_lightning.perceptual.activations import activation_distance, last_features, seeing
from lvd_lightning.perceptual.discriminator import sample_loss
from lvd_lightning.perceptual.mmd import mmd
from lvd_lightning.teachers.scaling import PixelScale

__all__ = ["LossWeights", "SampleLosses"]


@dataclass(frozen=True)
class LossWeights:
    """What every loss counts; 0 leaves it out.

    nll: of the negative log-likelihood, in nats per dimension.
    mmd: of the maximum mean discrepancy between samples and images, of pixels.
    feature_mmd: the same of the teacher's features of all patches.
    adversarial: of what a discriminator is not taken in by.
    autoencode: of the mean squared error of reconstructions, pixels being spread over -1..1.
    feature_distance: of the distance of reconstructions in the teacher's layers, see `activation_distance`.
    """

    nll: float = 1.0
    mmd: float = 0.0
    feature_mmd: float = 0.0
    adversarial: float = 0.0
    autoencode: float = 0.0
    feature_distance: float = 0.0

    def __post_init__(self) -> None:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        check_at_least(0, **values)
        expect(any(values.values()), "weights", values, "one above 0 at least, or there is nothing to learn")

    @property
    def needs_features(self) -> bool:
        """Whether a loss looks through the teacher."""
        return self.feature_mmd > 0 or self.feature_distance > 0

    @property
    def needs_samples(self) -> bool:
        return self.mmd > 0 or self.feature_mmd > 0 or self.adversarial > 0

    @property
    def needs_reconstructions(self) -> bool:
        return self.autoencode > 0 or self.feature_distance > 0


class SampleLosses:
    """Computes those losses whose weights are above 0.

    Args:
        weights: of all losses.
        parts: of the images, which say how many values a pixel has.
        teacher: with `activations`, if a loss on features is asked for.

    Raises:
        ValueError: the teacher is missing or has no `activations`.
    """

    def __init__(self, weights: LossWeights, parts: ImagePatches, teacher: nn.Module | None = None) -> None:
        channels, height, width = parts.example_shape
        self.weights = weights
        self.scale = PixelScale((channels, height, width), parts.num_categories)
        self.teacher: Any = None
        if weights.needs_features:
            if teacher is None:
                raise ValueError("feature_mmd, feature_distance: there is no teacher whose features they could look at")
            self.teacher = seeing(teacher, "feature_mmd, feature_distance")

    def to(self, like: Tensor) -> SampleLosses:
        """Move the teacher to the device, and to the type, of a tensor."""
        if self.teacher is not None:
            self.teacher.to(like)
        return self

    def spread(self, images: Tensor, like: Tensor) -> Tensor:
        """Images (B, C, H, W) in the values of the data, whole or real numbers, in -1..1; of the type of `like`."""
        return self.scale.spread(images.to(like.dtype))

    def of_samples(self, samples: Tensor, images: Tensor, discriminator: nn.Module | None = None) -> dict[str, Tensor]:
        """By name, without weights; samples and images (B, C, H, W) in -1..1, not necessarily equally many."""
        found = {}
        if self.weights.mmd > 0:
            found["mmd"] = mmd(samples, images)
        if self.weights.feature_mmd > 0:
            found["feature_mmd"] = mmd(last_features(self.teacher, samples), last_features(self.teacher, images))
        if self.weights.adversarial > 0:
            assert discriminator is not None
            found["adversarial"] = sample_loss(discriminator(samples))
        return found

    def of_reconstructions(self, again: Tensor, images: Tensor) -> dict[str, Tensor]:
        """By name, without weights; pairs of images (B, C, H, W) in -1..1."""
        found = {}
        if self.weights.autoencode > 0:
            found["autoencode"] = (again - images).square().mean()
        if self.weights.feature_distance > 0:
            found["feature_distance"] = activation_distance(self.teacher, again, images).mean()
        return found

    def weighted(self, found: dict[str, Tensor]) -> Tensor:
        """Their weighted sum; there is at least one."""
        terms = [getattr(self.weights, name) * loss for name, loss in found.items()]
        return sum(terms[1:], terms[0])

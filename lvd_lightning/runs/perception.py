"""Samples of a model beside test images, for runs that were trained on samples: contrast, borders, what a teacher sees.

Shapes: N images, E features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.context import VisibleData
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.perceptual.activations import pooled_features
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.contrast import Contrast, contrast, histogram_distance
from lvd_lightning.runs.frechet import frechet
from lvd_lightning.runs.sample_figures import BATCH, batches, border_step, isolated_pixels
from lvd_lightning.runs.settings import EVALUATE
from lvd_lightning.seeds import generator_for
from lvd_lightning.teachers.scaling import PixelScale

__all__ = ["NUM_SAMPLES", "Perception", "perception_table"]

#: So many samples are drawn, and at most so many test images looked at.
NUM_SAMPLES = 5_000


@dataclass
class Perception:
    """Looks at samples as a person would, and as a teacher does.

    data: images, whose test split samples are compared with.
    teacher: with `activations`, on the ranks' device, if there is one.
    ranks: the processes that share the drawing.
    seed: the seed of the run.
    """

    data: VisibleData
    teacher: Any | None
    ranks: Ranks
    seed: int
    num_samples: int = field(default_factory=lambda: NUM_SAMPLES)

    def __post_init__(self) -> None:
        count = self.data.num_examples("test")
        rows_N = torch.linspace(0, count - 1, min(count, self.num_samples)).long()
        images = self.data.batch("test", rows_N)
        self._scale = PixelScale(self.data.image_shape, self.data.parts.num_categories)  # type: ignore[attr-defined]
        self._test: Contrast = contrast(self.data.to_rgb(images))
        self._test_features = None if self.teacher is None else self._features(images)
        self._test_images = images

    def of_test(self) -> dict[str, float]:
        """The figures of the test images themselves."""
        return self._looked_at(self._test_images)

    def of_samples(self, circuit: AssembledCircuit) -> dict[str, float]:
        """The figures of what a circuit draws; all ranks have to call.

        Returns:
            "std" and "saturation" (see `Contrast`), "step_distance": how far the histogram of steps from pixel to pixel
            is from that of test images, in levels; "border_step" and "isolated_pixels"; with a teacher "frechet", the
            Frechet distance from test images in its mean feature of an image, with "frechet_low" and "frechet_high".
        """
        drawn = self._draw(circuit)
        found = self._looked_at(drawn)
        if self._test_features is not None:
            interval = frechet(self._features(drawn), self._test_features)
            found |= {"frechet": interval.distance, "frechet_low": interval.low, "frechet_high": interval.high}
        return found

    def _looked_at(self, images: Tensor) -> dict[str, float]:
        rgb = self.data.to_rgb(images)
        figures = contrast(rgb)
        return {
            "std": figures.std,
            "saturation": figures.saturation,
            "step_distance": histogram_distance(figures.steps, self._test.steps),
            "border_step": border_step(rgb, int(self.data.parts.shape[-1]))[0],
            "isolated_pixels": isolated_pixels(rgb),
        }

    def _draw(self, circuit: AssembledCircuit) -> Tensor:
        """Samples (N, C, H, W), on all ranks the same."""
        parts = {}
        for number, size in batches(self.num_samples, self.ranks):
            generator = generator_for(self.seed, EVALUATE, "perception", number, device=self.ranks.device)
            parts[number] = circuit.sample(size, generator=generator).cpu()
        if self.ranks.world_size == 1:
            return torch.cat(list(parts.values()))
        total = torch.zeros(self.num_samples, *self.data.image_shape, dtype=torch.int32)
        for number, part in parts.items():
            total[number * BATCH : number * BATCH + len(part)] = part.int()
        return self.ranks.sum(total)

    @torch.no_grad()
    def _features(self, images: Tensor) -> Tensor:
        """(N, E), float64."""
        assert self.teacher is not None
        like = next(iter(self.teacher.parameters()))
        found = [
            pooled_features(self.teacher, self._scale.spread(part.to(like))).double().cpu()
            for part in images.split(250)
        ]
        return torch.cat(found)


def perception_table(found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Lines of Markdown: what `Perception` says of several models, by their titles, and what the columns mean."""
    lines = [
        f"Of {NUM_SAMPLES:,} samples of each model. Deviation: of the luma within an image, in levels. Saturation: "
        "(max - min) / max of red, green and blue. Steps: how far the histogram of differences of neighbouring pixels "
        "is from that of the test images, in levels. Distance: the Fréchet distance from the test images in the "
        "teacher's mean feature of an image, with a 95 % interval; it is no FID, and other teachers have other units.",
        "",
        "| | deviation | saturation | steps | border step | isolated pixels | distance |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for title, figures in found.items():
        distance = ""
        if "frechet" in figures:
            low, high = figures["frechet_low"], figures["frechet_high"]
            distance = f"{figures['frechet']:.4g} ({low:.4g} to {high:.4g})"
        cells = [
            *(f"{figures['std']:.1f}", f"{figures['saturation']:.3f}", f"{figures['step_distance']:.2f}"),
            *(f"{figures['border_step']:.2f}", f"{100 * figures['isolated_pixels']:.2f} %", distance),
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines

"""Samples of a run's flow as further training images of another run."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from datamodules.images import Pixels
from datamodules.rgb import RGBDataModule
from datamodules.splits import SPLITS, Split
from lvd_lightning import Run
from lvd_lightning.checks import check_above, check_between, check_choice
from lvd_lightning.seeds import generator_for
from lvd_lightning.teachers import ImageFlow, load_teacher

__all__ = ["Synthesized"]

#: Samples that are drawn at a time, from a generator of their own.
BATCH = 256


class Synthesized(RGBDataModule):
    """The images of a finished run, with samples of its flow beside those for training.

    Training images of the run come first, without their mirror images, and samples after them. Validation and test
    images are those of the run, so that figures compare with those of circuits that saw no samples. Samples depend on
    the flow alone, not on `seed`.

    Args:
        run: the run's directory. Its data are square RGB images; the flow that it trained is drawn from.
        share: how much of the training images are samples, from 0 to below 1.
        flow: "teacher", or "student" for the flow that was distilled from it.
        temperature: the standard deviation of latents.
        **common: the settings of every `RGBDataModule`; `image_size` is that of the run.

    Raises:
        ValueError: a setting is out of range; at `setup`, the run has no such flow or other data.

    Example:
        >>> from datamodules import Synthesized
        >>> data = Synthesized("runs/flow_photos", share=0.25, image_size=32)  # a quarter of the images are samples
        >>> data.facts["synthesized_share"]
        0.25
    """

    def __init__(
        self, run: str, share: float = 0.5, flow: str = "teacher", temperature: float = 1.0, **common: Any
    ) -> None:
        super().__init__(**common)
        check_between(0, 0.99, share=share)
        check_choice(("teacher", "student"), flow=flow)
        check_above(0, temperature=temperature)
        self.run = run
        self.share = share
        self.flow = flow
        self.temperature = temperature

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {**super().facts, "synthesized_share": self.share}

    @override
    def load(self) -> Mapping[Split, Tensor]:
        finished = Run.open(self.run)
        data: Any = finished.experiment.data()
        if not isinstance(data, RGBDataModule) or data.region != "whole" or data.image_size != self.image_size:
            raise ValueError(
                f"{self.run}: its data are {type(data).__name__}, expected whole square RGB images of image_size "
                f"{self.image_size}"
            )
        data.flip = False  # mirror images come with the flip of this one
        data.setup()
        folder = finished.artefact("flow" if self.flow == "teacher" else "model")
        if folder is None or not isinstance(flow := load_teacher(folder), ImageFlow):
            raise ValueError(f"{self.run}: holds no finished {self.flow} that is a flow of images")
        self.left_out = dict(data.left_out)
        found: dict[Split, Pixels] = {}
        for split in SPLITS:
            images = data.images(split)[torch.arange(data.num_examples(split))]
            found[split] = data.to_rgb(images).numpy()[self.limit(len(images))]
        num_real = len(found["train"])
        sizes = _batches(round(num_real * self.share / (1 - self.share)))
        drawn = [
            data.to_rgb(flow.sample(size, self.temperature, generator_for("synthesized", number))).numpy()
            for number, size in enumerate(sizes)
        ]
        found["train"] = np.concatenate([found["train"], *drawn])
        return {split: self.encode(pixels) for split, pixels in found.items()}


def _batches(count: int) -> list[int]:
    return [min(BATCH, count - start) for start in range(0, count, BATCH)]

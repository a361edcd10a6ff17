"""What a stage of an experiment is given: its folder, the data, and where its random numbers come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from lvd_lightning.seeds import derive_seed

__all__ = ["DONE_MARKER", "ImageData", "StageContext"]

DONE_MARKER = "done.json"


class ImageData(Protocol):
    """What stages read of a datamodule; the library itself imports none."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, H, W) of the images after the region was cut out."""

    @property
    def color(self) -> str: ...

    @property
    def region(self) -> str: ...

    @property
    def lossy(self) -> bool: ...

    def num_examples(self, split: str) -> int: ...

    def images(self, split: str) -> Any:
        """The whole split, array-like uint8 [N, 3, H, W], colour-encoded."""

    def batch(self, split: str, indices: Tensor) -> Tensor:
        """Images uint8 [n, 3, H, W] of a split ("train", "val", "test") at int64 `indices` [n]."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs, what it may read, and where its random numbers come from.

    run_dir: the run's directory; `dir` is this stage's own folder in it.
    seed: the seed of the run; derive every generator from it by `generator`, never use the global one for anything
        that has to be the same after an interruption.
    data: the stage's datamodule, set up.
    shared: the config's shared values (patch_size, color, region, ...).
    stages: the names of the experiment's stages in order; None: what the run directory holds is the experiment.
    device: the device of this process, for stages that compute outside a Trainer.
    """

    run_dir: Path
    stage: str
    seed: int
    data: Any
    shared: Mapping[str, Any] = field(default_factory=dict)
    stages: tuple[str, ...] | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def dir(self) -> Path:
        return self.run_dir / self.stage

    def previous(self, stage: str) -> Path | None:
        """The folder of a finished stage, or None when the experiment has no such stage before this one.

        Raises ValueError when the experiment has the stage and it is not finished.
        """
        folder = self.run_dir / stage
        finished = (folder / DONE_MARKER).is_file()
        if self.stages is None:
            return folder if finished else None
        if stage not in self.stages[: self.stages.index(self.stage)]:
            return None
        if not finished:
            raise ValueError(
                f"stage {self.stage!r} needs what stage {stage!r} hands on, but {folder} is not finished: "
                f"run stage {stage!r} first, or all stages by leaving --stage away"
            )
        return folder

    def generator(self, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator seeded by (seed, stage, *parts), for example `generator("mask", epoch)`."""
        return torch.Generator(device).manual_seed(derive_seed(self.seed, self.stage, *parts))

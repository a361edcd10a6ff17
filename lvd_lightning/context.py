"""What a stage of an experiment is given: its folder, the data, and where its random numbers come from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from lvd_lightning.parts import Parts
from lvd_lightning.seeds import generator_for
from lvd_lightning.units import Unit

__all__ = ["DONE_MARKER", "Artefacts", "Data", "StageContext", "VisibleData", "missing_need"]

DONE_MARKER = "done.json"


class Data(Protocol):
    """What stages read of a datamodule; the library itself imports none.

    parts: how an example falls into the parts that have a latent variable each.
    unit: in which the likelihood of an example is told.
    protocol: what stands in brackets beside every figure; empty if there is nothing to say.
    facts: the same for scripts.
    num_dims: dimensions of an example. Data that people can look at also have `to_rgb` (see `VisibleData`).
    """

    @property
    def parts(self) -> Parts: ...
    @property
    def unit(self) -> Unit: ...
    @property
    def protocol(self) -> str: ...
    @property
    def facts(self) -> Mapping[str, Any]: ...
    @property
    def num_dims(self) -> int: ...

    def num_examples(self, split: str) -> int: ...

    def batch(self, split: str, indices: Tensor) -> Tensor:
        """Examples (n, ...) of a split ("train", "val", "test") at int64 `indices` [n]."""


@runtime_checkable
class VisibleData(Data, Protocol):
    """Data that are pictures."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""

    def to_rgb(self, images: Tensor) -> Tensor:
        """What a person sees: uint8 (..., 3, H, W) of images (..., C, H, W), or of real-valued means of them."""


class Artefacts(Protocol):
    """Where what stages leave is found: a stage's context, or a run."""

    def artefact(self, kind: str) -> Path | None:
        """The folder of the last stage that left such an artefact, or None."""


@dataclass(frozen=True)
class StageContext:
    """Where a stage runs, what it may read, and where its random numbers come from.

    run_dir: the run's directory; `dir` is this stage's own folder in it.
    seed: the seed of the run; derive every generator from it by `generator`, never use the global one for anything
        that has to be the same after an interruption.
    data: the stage's datamodule, set up.
    shared: the config's shared values.
    earlier: the names of the stages before this one, in order, with the kinds of artefact that each leaves.
    device: the device of this process, for stages that compute outside a Trainer.
    """

    run_dir: Path
    stage: str
    seed: int
    data: Any
    shared: Mapping[str, Any] = field(default_factory=dict)
    earlier: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def dir(self) -> Path:
        return self.run_dir / self.stage

    def artefact(self, kind: str) -> Path | None:
        """The folder of the last stage before this one that leaves such an artefact; None when there is none.

        Raises ValueError when there is one and it is not finished.
        """
        names = [name for name, kinds in self.earlier.items() if kind in kinds]
        return self._finished(names[-1]) if names else None

    def required(self, kind: str) -> Path:
        """The same, of an artefact that the stage cannot do without: a ValueError when no earlier stage leaves it."""
        folder = self.artefact(kind)
        if folder is None:
            raise ValueError(missing_need(self.stage, kind))
        return folder

    def earlier_folders(self) -> list[Path]:
        """The folders of the stages before this one that leave something."""
        return [self._finished(name) for name, kinds in self.earlier.items() if kinds]

    def generator(self, *parts: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator seeded by (seed, stage, *parts), for example `generator("mask", epoch)`."""
        return generator_for(self.seed, self.stage, *parts, device=device)

    def _finished(self, stage: str) -> Path:
        folder = self.run_dir / stage
        if not (folder / DONE_MARKER).is_file():
            raise ValueError(
                f"stage {self.stage!r} needs what stage {stage!r} hands on, but {folder} is not finished: "
                f"run stage {stage!r} first, or all stages by leaving --stage away"
            )
        return folder


def missing_need(stage: str, kind: str) -> str:
    """What to tell whoever has planned a stage without one that leaves what it needs."""
    return f"stage {stage!r} needs {kind}; no stage before it leaves {'them' if kind.endswith('s') else 'it'}"

"""What a stage of an experiment is given, and what it has to provide."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

from lvd_lightning.circuits import Circuit

__all__ = ["DONE_MARKER", "ImageData", "StageContext", "StageModule", "derive_seed"]

DONE_MARKER = "done.json"


def derive_seed(*parts: int | str) -> int:
    """A seed in [0, 2^32) that is a function of `parts` alone: the same in every process and on every machine.

    Python's own `hash` is salted per process, and sums of seeds collide (seed 0, epoch 1 against seed 1, epoch 0).
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:4], "little")


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


class StageModule(LightningModule):
    """A LightningModule that is one stage of an experiment.

    The pipeline calls `begin_stage`, `Trainer.fit`, loads the best checkpoint, then calls `finish_stage`. After an
    interruption it does the same with the last epoch-end checkpoint given to `fit`; a module needs no code of its own
    for that, if its random numbers come from `StageContext.generator("...", epoch)`.

    A module that defines `train_dataloader` brings its own data (patches, codes, cached likelihoods); otherwise the
    loaders are those of the datamodule and yield `(images uint8 [b, 3, H, W], index int64 [b])`.

    monitor, monitor_mode: the logged validation metric that says which epoch is best.
    em: whether the module is trained by EM, whose optimizers all-reduce sums themselves, so that the distributed
        strategy has to leave its gradients alone.
    """

    monitor: str = "val/bpd"
    monitor_mode: str = "min"
    em: ClassVar[bool] = False

    @override
    def on_train_end(self) -> None:
        """On a GPU values are checked behind the computation: ask about the last batches as well."""
        for module in self.modules():
            if isinstance(module, Circuit):
                module.check_inputs()

    def begin_stage(self, context: StageContext) -> None:
        """Read what earlier stages handed on and build what depends on data.

        Called on every rank before the Trainer sees the module, on the first start and on every resume alike: it has
        to be a function of (files, seed).
        """

    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Write into `context.dir` what later stages read, and return figures for the report (val_bpd, ...).

        Called with the parameters of the best epoch, on rank 0 alone while the other ranks wait: no collectives here.
        Write to a temporary name, then `os.replace`: an interruption may come at any moment.
        """
        return {}

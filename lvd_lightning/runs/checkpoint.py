"""The checkpoints of a stage: its best epoch and its last one, whole or not there."""

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from typing_extensions import override

from lvd_lightning.circuits import Circuit
from lvd_lightning.events import record
from lvd_lightning.files import errors_naming, put_in_place, temporary_name

__all__ = ["BEST_CHECKPOINT", "LAST_CHECKPOINT", "EpochCheckpoint", "link_or_copy", "save_whole"]

LAST_CHECKPOINT = "last.ckpt"
BEST_CHECKPOINT = "best.ckpt"


class EpochCheckpoint(Checkpoint):
    """Writes `best.ckpt` and `last.ckpt` in `folder` after every epoch's validation.

    Lightning's ModelCheckpoint writes its last.ckpt only when a top-k file was written too, skips an epoch without
    optimizer steps (closed forms have none), and remembers absolute paths, so that a run directory cannot be moved.

    Parameters that are NaN or infinite are a ValueError: what was saved before stays.

    monitor, mode: the metric that says which epoch is best; an epoch without it, or with a NaN, is never best.
    """

    def __init__(self, folder: Path, monitor: str, mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"monitor_mode is 'min' or 'max', got {mode!r}")
        self.folder = folder
        self.monitor = monitor
        self.mode = mode
        self.best_score: float | None = None

    @property
    def best_path(self) -> Path:
        return self.folder / BEST_CHECKPOINT

    @property
    def last_path(self) -> Path:
        return self.folder / LAST_CHECKPOINT

    def is_better(self, score: float | None) -> bool:
        if score is None or math.isnan(score):
            return False
        if self.best_score is None:
            return True
        return score < self.best_score if self.mode == "min" else score > self.best_score

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        fault = _first_fault(pl_module)
        if not trainer.strategy.reduce_boolean_decision(fault is None, all=True):
            epoch = trainer.current_epoch + 1
            raise ValueError(f"epoch {epoch} is not saved: {fault or 'another process found a fault in its circuits'}")
        value = trainer.callback_metrics.get(self.monitor)
        score = None if value is None else float(value)
        better, score = trainer.strategy.broadcast((self.is_better(score), score))
        if better:
            self.best_score = score
        # The best file goes first: if the process dies between the two, the epoch is done again and writes both.
        target = self.best_path if better else self.last_path
        save_whole(trainer, target)
        if trainer.is_global_zero and better:
            link_or_copy(self.best_path, self.last_path)
        trainer.strategy.barrier()
        facts = {"epoch": trainer.current_epoch, "step": trainer.global_step, "best": better, self.monitor: score}
        record("checkpoint", stage=self.folder.name, file=target.name, **facts)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


def save_whole(trainer: Trainer, target: Path) -> None:
    """Write a checkpoint, whole or not at all; all ranks call, the first writes.

    Raises:
        OSError: it could not be written; the error names `target`, and what was there before still is. Nothing of the
            new one is left: it may have filled the disk.
    """
    temporary = temporary_name(target)
    try:
        with errors_naming(target):
            trainer.save_checkpoint(temporary)
            if trainer.is_global_zero:
                put_in_place(temporary, target)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def _first_fault(module: LightningModule) -> str | None:
    """What must not get into a checkpoint: parameters that are NaN or infinite, or faults that a GPU tells late."""
    for circuit in module.modules():
        if isinstance(circuit, Circuit):
            try:
                circuit.check_inputs()
            except ValueError as error:
                return str(error)
    found = {name: tensor.isfinite().all() for name, tensor in module.named_parameters() if tensor.is_floating_point()}
    bad = [name for name, is_finite in found.items() if not is_finite]
    return f"NaN or infinity in {len(bad)} parameters, first in {bad[0]}" if bad else None


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links; what was there goes."""
    temporary = temporary_name(target)
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    put_in_place(temporary, target)

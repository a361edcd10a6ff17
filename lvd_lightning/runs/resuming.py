"""Where an interrupted stage goes on: at the newest of its checkpoints that can be read."""

from __future__ import annotations

import pickle
import struct
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from lvd_lightning.runs.checkpoint import EpochCheckpoint, link_or_copy
from lvd_lightning.runs.step_checkpoint import STEP_CHECKPOINT, WITHIN

__all__ = ["Resumption", "where_to_resume"]

# What zipfile, zlib and torch raise on files that were cut short or garbled.
DAMAGED = (
    *(RuntimeError, OSError, EOFError, LookupError, ValueError, TypeError, OverflowError, AttributeError),
    *(zipfile.BadZipFile, zlib.error, struct.error),
)
_INSTEAD = "an earlier one is taken, or the stage starts again"


@dataclass(frozen=True)
class Resumption:
    """A checkpoint to go on from, if there is one.

    last_epoch: the last epoch (0-based) that is complete; -1 for none.
    path: the checkpoint; None where the stage starts.
    step: of a checkpoint within the epoch after it, how many optimizer steps it has; else None.
    """

    last_epoch: int = -1
    path: Path | None = None
    step: int | None = None

    @property
    def said(self) -> str:
        """What to tell whoever waits."""
        within = "" if self.step is None else f", within epoch {self.last_epoch + 2} at step {self.step}"
        return f"goes on after epoch {self.last_epoch + 1}{within}"


def where_to_resume(checkpoint: EpochCheckpoint) -> Resumption:
    """What the stage of these checkpoints goes on from; if it starts, no older checkpoint is left.

    A file that was cut short or garbled, which only a full disk or a broken machine can do, is told of and the one
    before it taken: of a checkpoint within an epoch the last epoch's, of that the best epoch's.
    """
    folder = checkpoint.folder
    # What Lightning saves when SLURM sends a job back is taken in the middle of a step, and would go first.
    for interrupted in folder.glob("hpc_ckpt_*"):
        interrupted.unlink()
    step_path, last_path = folder / STEP_CHECKPOINT, checkpoint.last_path
    within, last = _read(step_path), _read(last_path)
    if last is None and last_path.is_file():
        # The best epoch's file alone may be newer than the last one's, and then of an epoch that was not noted.
        last = _read(checkpoint.best_path)
        if last is not None:
            link_or_copy(checkpoint.best_path, last_path)
            last = replace(last, path=last_path)
    last = last or Resumption()
    if within is not None and within.last_epoch >= last.last_epoch:
        return within
    step_path.unlink(missing_ok=True)  # damaged, or of an epoch that is done
    if last.path is None:
        last_path.unlink(missing_ok=True)
        checkpoint.best_path.unlink(missing_ok=True)
    return last


def _read(path: Path) -> Resumption | None:
    """What is in a checkpoint; None, and a warning, if it is damaged."""
    if not path.is_file():
        return None
    if not _is_archive(path):
        warnings.warn(f"{path} is not a complete checkpoint: {_INSTEAD}", stacklevel=3)
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # mapped from disk, tensors would be taken as they are
        if damaged is not None:
            raise OSError(f"{damaged} is damaged")
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
        epoch = int(content["epoch"])
        return (
            Resumption(epoch - 1, path, int(content["global_step"])) if WITHIN in content else Resumption(epoch, path)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: holds more than tensors and plain values, which could run code when it is loaded "
            f"({str(error).splitlines()[0]}): a module may not put such things into its checkpoints; if the file is "
            f"not yours, remove {path.parent} and run the stage again"
        ) from error
    except DAMAGED as error:
        warnings.warn(f"{path} cannot be read ({error}): {_INSTEAD}", stacklevel=3)
        return None


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its last bytes speak of several disks
        return False

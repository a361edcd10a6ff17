"""What the pipeline adds to every Trainer: a clock, metrics.csv, epoch-end checkpoints, seeds, a line per epoch."""

import csv
import math
import os
import shutil
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lvd_lightning.circuits import Circuit
from lvd_lightning.seeds import derive_seed

__all__ = [
    "LAST_CHECKPOINT",
    "EpochCheckpoint",
    "EpochLines",
    "EpochSeed",
    "MetricsFile",
    "Noted",
    "ProgressBar",
    "Stopwatch",
    "read_metrics",
]

LAST_CHECKPOINT = "last.ckpt"


@dataclass(frozen=True)
class Noted:
    """What stands beside which figures: the data's protocol beside likelihoods.

    unit: the name that likelihoods end with; protocol: see `Data`.
    """

    unit: str
    protocol: str = ""

    def beside(self, name: str) -> str:
        """The protocol in brackets if the figure of this name is a likelihood and there is one; else empty."""
        return f" ({self.protocol})" if self.protocol and name.endswith(self.unit) else ""


class Stopwatch(Callback):
    """Seconds spent on a stage, summed over interruptions.

    The time up to an epoch-end checkpoint travels in the checkpoint, so an epoch that was lost and is done again counts
    once: the figure says how long the result took, not how long the machine was up.
    """

    def __init__(self) -> None:
        self._earlier = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = float(state_dict["seconds"])


class EpochSeed(Callback):
    """Seeds the global random numbers at every epoch from (seed, epoch, rank).

    Checkpoints hold no random state. With this, dropout and whatever else draws from the global generators is the same
    in an epoch that was begun again after an interruption. The second seeding, at the first batch, is there because an
    epoch's data iterator, which draws a number, is built before the epoch starts on a resume and after it otherwise.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def _seed(self, trainer: Trainer) -> None:
        seed_everything(derive_seed(self.seed, "epoch", trainer.current_epoch, trainer.global_rank), verbose=False)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._seed(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._seed(trainer)


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
        return self.folder / "best.ckpt"

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
        temporary = target.with_name(target.name + ".tmp")
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            os.replace(temporary, target)
            if better:
                _link_or_copy(self.best_path, self.last_path)
        trainer.strategy.barrier()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best_score = state_dict["best_score"]


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


def _link_or_copy(source: Path, target: Path) -> None:
    temporary = target.with_name(target.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, temporary)
    os.replace(temporary, target)


class EpochLines(Checkpoint):
    """Prints one line per epoch, for output that is a file.

    It is a Checkpoint callback because these run after the module's own `on_train_epoch_end`, whose metrics would
    otherwise be missing from the line.

    noted: what stands beside likelihoods, see `Noted`.
    """

    def __init__(self, stage: str, clock: Callable[[], float], noted: Noted) -> None:
        self.stage = stage
        self.clock = clock
        self.noted = noted

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        # Where Lightning also keeps a "_step" and an "_epoch" form of a metric, its plain name says it all.
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if value.numel() == 1 and not name.endswith(("_step", "_epoch"))
        }
        shown = [f"{name} {value:.4f}{self.noted.beside(name)}" for name, value in metrics.items()]
        of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        text = f"{self.stage}: epoch {trainer.current_epoch + 1}{of}"
        print("  ".join([text, *shown, f"{self.clock():.1f} s"]), flush=True)


class ProgressBar(RichProgressBar):
    """The progress bar of a terminal, with the data's protocol beside every likelihood."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self.noted = noted

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        return {f"{name}{self.noted.beside(name)}": value for name, value in metrics.items()}


class MetricsFile(Logger):
    """A logger that writes metrics.csv: columns epoch, step, seconds, then one per metric; one row per log call.

    Unlike Lightning's CSVLogger, which begins the file again, it goes on where an earlier process stopped. Call `keep`
    when training continues after some epoch, so that what was logged beyond it is not there twice.
    """

    _FIRST = ("epoch", "step", "seconds")

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        super().__init__()
        self.path = path
        self.clock = clock
        self._columns: list[str] | None = None

    @property
    @override
    def name(self) -> str:
        return self.path.parent.name

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The stage's config.yaml has them."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, "seconds": round(self.clock(), 3), **metrics}
        if self._columns is None:
            self._columns = _header(self.path)
        new = [name for name in (*self._FIRST, *metrics) if name not in self._columns]
        if new:
            self._write(read_metrics(self.path), [*self._columns, *new])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def keep(self, last_epoch: int) -> None:
        """Drop the rows of epochs after `last_epoch` (0-based; -1 drops all)."""
        rows = [row for row in read_metrics(self.path) if row.get("epoch") and float(row["epoch"]) <= last_epoch]
        self._write(rows, _header(self.path) or list(self._FIRST))

    def _write(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self._columns = columns
        temporary = self.path.with_name(self.path.name + ".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv; a last line that a dying process left unfinished is not one of them."""
    if not path.is_file():
        return []
    text = path.read_text()
    complete = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(complete.splitlines()) if None not in row.values()]


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])

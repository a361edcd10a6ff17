"""How fast a stage trains and what it takes of the machine: a row of `machine/...` figures per epoch."""

import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lvd_lightning.events import record
from lvd_lightning.ranks import rank_and_size, summed
from lvd_lightning.traffic import TRAFFIC, Traffic

__all__ = ["MACHINE", "MachineLog", "peak_memory"]

MACHINE = "machine/"
_SECONDS_BETWEEN_LOOKS = 1.0


class MachineLog(Callback):
    """After every epoch, figures of its training batches for the loggers and for events.jsonl.

    - `machine/examples_per_second`: of all ranks together, from the first batch to the last; validation and what
      callbacks do between epochs is not in it, the loading of data is.
    - `machine/step_seconds`: the time between two optimizer steps, on average. Not there where an epoch has none.
    - `machine/communication_share`: of that time, how much this rank's messages took: sums of flows and, where torch
      averages gradients behind the backward pass, from giving a bucket away until it is there. These overlap with
      computation. Not there for one process.
    - `machine/memory_mib`: the most memory that this process has had so far; `machine/gpu_memory_mib`: the most that
      tensors have had on its GPU; `machine/gpu_utilization`: the share of time in which the GPU was busy, looked at
      once a second. That one needs nvidia-ml-py.

    An epoch that was interrupted counts from where it went on. The row is written before the epoch's checkpoint, so
    that there is one for every epoch that is kept.

    stage: its name, for events.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage
        self._watched: Any = None
        self._start: float | None = None
        self._end = self._looked = 0.0
        self._num_examples = self._step = 0
        self._before = Traffic()
        self._busy: list[float] = []

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and model is not self._watched:
            self._watched = model
            with suppress(RuntimeError):  # the strategy was given a hook of its own, whose time is not counted
                model.register_comm_hook(None, _averaged)
        self._begin(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._start is None:
            self._start, self._step = time.perf_counter(), trainer.global_step
            self._before = replace(TRAFFIC)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._end = time.perf_counter()
        self._num_examples += _num_examples(batch)
        device = trainer.strategy.root_device
        if device.type == "cuda" and self._end - self._looked > _SECONDS_BETWEEN_LOOKS:
            self._looked = self._end
            with suppress(Exception):  # without nvidia-ml-py, or on a part of a GPU
                self._busy.append(torch.cuda.utilization(device) / 100)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        figures = self.figures(trainer)
        named = {f"{MACHINE}{name}": value for name, value in figures.items()}
        for logger in trainer.loggers:
            logger.log_metrics({"epoch": trainer.current_epoch, **named}, step=trainer.global_step)
        record("epoch", stage=self.stage, epoch=trainer.current_epoch, step=trainer.global_step, **figures)
        self._begin(trainer)

    def figures(self, trainer: Trainer) -> dict[str, float]:
        """Of the batches since the epoch began; all ranks call together."""
        num_examples = float(summed(torch.tensor(float(self._num_examples), dtype=torch.float64)))
        found: dict[str, float] = {}
        seconds, steps = (0.0 if self._start is None else self._end - self._start), trainer.global_step - self._step
        if seconds > 0:
            found["examples_per_second"] = num_examples / seconds
            if steps > 0:
                found["step_seconds"] = seconds / steps
            if rank_and_size()[1] > 1:
                found["communication_share"] = (TRAFFIC.seconds - self._before.seconds) / seconds
        found["memory_mib"] = peak_memory()
        device = trainer.strategy.root_device
        if device.type == "cuda":
            found["gpu_memory_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
            if self._busy:
                found["gpu_utilization"] = sum(self._busy) / len(self._busy)
        return found

    def _begin(self, trainer: Trainer) -> None:
        self._start = None
        self._end = self._looked = 0.0
        self._num_examples, self._step = 0, trainer.global_step
        self._before = replace(TRAFFIC)
        self._busy = []


def peak_memory() -> float:
    """The most memory that this process has had, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


# torch reads the annotations of such a hook, which must not be text here.
def _averaged(state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """What torch does without a hook, with the time that it takes counted."""
    start, gradients = time.perf_counter(), bucket.buffer()
    gradients.mul_(1 / dist.get_world_size())
    work: Any = dist.all_reduce(gradients, async_op=True)

    def done(future: Any) -> Tensor:
        TRAFFIC.seconds += time.perf_counter() - start
        TRAFFIC.num_bytes += gradients.nbytes
        TRAFFIC.num_messages += 1
        found: Tensor = future.value()[0]
        return found

    averaged: torch.futures.Future[Tensor] = work.get_future().then(done)
    return averaged


def _num_examples(batch: Any) -> int:
    """The length of the first tensor in a batch."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    return next((_num_examples(part) for part in parts), 0)

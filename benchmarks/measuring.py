"""What benchmarks of training steps share: contenders with their figures, and the memory of a step."""

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["Contender", "adam_contender", "measure_peak", "take_step"]


@dataclass
class Contender:
    """Something that trains: `step` takes examples, (B, D) or (G, B, D); times in seconds, memory in MiB."""

    name: str
    num_circuits: int
    step: Callable[[Tensor], float]
    num_parameters: int
    times: list[float] = field(default_factory=list)
    peak_memory: float = float("nan")
    last_loss: float = float("nan")

    @property
    def median(self) -> float:
        """Median milliseconds of a step, per circuit."""
        return 1000 * statistics.median(self.times) / self.num_circuits

    @property
    def fastest(self) -> float:
        """Milliseconds of the fastest step, per circuit."""
        return 1000 * min(self.times) / self.num_circuits


def adam_contender(circuit: Any) -> Contender:
    """A compiled circuit of cirkit under Adam."""
    parameters: Iterable[Tensor] = list(circuit.parameters())
    optimizer = torch.optim.Adam(parameters, lr=0.01)

    def step(batch: Tensor) -> float:
        optimizer.zero_grad()
        loss = -circuit(batch).mean()
        loss.backward()
        optimizer.step()
        return loss.item()

    return Contender("cirkit, Adam", 1, step, sum(parameter.numel() for parameter in parameters))


def take_step(contender: Contender, batch: Tensor) -> None:
    """One step on the clock."""
    start = time.perf_counter()
    contender.last_loss = contender.step(batch)
    contender.times.append(time.perf_counter() - start)


def measure_peak(contender: Contender, batch: Tensor) -> None:
    """Peak resident memory of the first two steps in MiB, beyond what was there before: gradients, state, buffers."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    except OSError:
        return  # not Linux: no figure
    before = _status("VmRSS")
    contender.step(batch)
    contender.step(batch)
    contender.peak_memory = (_status("VmHWM") - before) / 1024


def _status(key: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))

"""How fast a device copies and multiplies, and what a training step must copy and multiply; for `gpu.py`."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import lvd_lightning.circuits as pc

Step = Callable[[Tensor], object]


def two_digits(x: float) -> str:
    """Two digits, or nothing if `x` is NaN."""
    return "" if math.isnan(x) else f"{x:.2g}"


def timed(step: Step, batch: Tensor) -> float:
    """Seconds of a step, on the device's own clock where it has one."""
    if not batch.is_cuda:
        start = time.perf_counter()
        step(batch)
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    first.record()
    step(batch)
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


@dataclass
class Work:
    """What a step of the fused kernels has to do, every buffer read or written once by each kernel that needs it."""

    num_bytes: int
    flops: int

    @classmethod
    def of(cls, circuit: pc.Circuit, batch_size: int) -> "Work":
        plan, tables = circuit.plan, sum(table.numel() for table in circuit.tables)
        sums = [layer for layer in plan.layers if layer.group >= 0]
        outer = sum(len(layer.nodes) * layer.outer_units for layer in sums) * batch_size
        inner = sum(len(layer.nodes) * layer.inner_units for layer in sums) * batch_size
        leaves = sum(len(found.nodes) * found.num_units for found in plan.inputs) * batch_size
        weights = sum(len(layer.nodes) * layer.outer_units * layer.inner_units for layer in sums)
        leaf_tables = tables - weights
        forward = leaf_tables + leaves + (leaves + outer + inner) + (inner + weights + 2 * outer)
        backward = 3 * outer + (outer + weights + 2 * inner) + (outer + inner + weights) + leaves + 2 * leaf_tables
        update = 3 * tables
        return cls(4 * (forward + backward + update), 6 * weights * batch_size)


def copy_rate(device: torch.device) -> float:
    """Bytes per second that a copy reads and writes."""
    a = torch.empty((1 << 30 if device.type == "cuda" else 1 << 26) // 4, device=device)
    b = torch.zeros_like(a)
    a.copy_(b)
    return 2 * a.nbytes / min(timed(b.copy_, a) for _ in range(10))


def matmul_rate(device: torch.device, num_latents: int, batch_size: int, precision: str) -> float:
    """Floating point operations per second of `torch.bmm` in a precision."""
    number = max(1, (1 << 26 if device.type == "cuda" else 1 << 20) // (num_latents * max(num_latents, batch_size)))
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    a = torch.rand(number, num_latents, num_latents, device=device).to(kind)
    b = torch.rand(number, num_latents, batch_size, device=device).to(kind)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    try:
        torch.bmm(a, b)
        seconds = min(timed(lambda right: torch.bmm(a, right), b) for _ in range(10))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * number * num_latents * num_latents * batch_size / seconds

"""What fewer bits in matrix products do to log-likelihoods and flows, measured on the CPU: operands are rounded.

For `gpu.py`. A GPU multiplies TF32 numbers (10 bits of mantissa) or bfloat16 (7 bits) exactly and sums in float32.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from floors import two_digits
from torch import Tensor
from torch.overrides import TorchFunctionMode

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels


@dataclass
class Error:
    """Of log-likelihoods, in nats; `flow`: of flows, relative to their sum, where it was measured."""

    largest: float
    mean: float
    flow: float = math.nan

    def cells(self, num_vars: int) -> str:
        """For a table."""
        bits = self.mean / (num_vars * math.log(2))
        return f"{self.largest:.2g} | {self.mean:.2g} | {bits:.1g} | {two_digits(self.flow)}"


def error_of(found: Tensor, exact: Tensor) -> Error:
    difference = (found.double() - exact).abs()
    return Error(float(difference.max()), float(difference.mean()))


class Rounded(TorchFunctionMode):
    """Matrix products as a GPU computes them: operands rounded, sums in float32."""

    def __init__(self, precision: str) -> None:
        super().__init__()
        self.precision = precision

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.bmm:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            a, b = args
            high, low = [_round(a, self.precision), _round(b, self.precision)], []
            found = torch.bmm(*high)
            if self.precision == "tf32x3":
                low = [_round(x - y, "tf32") for x, y in zip((a, b), high, strict=True)]
                found += torch.bmm(high[0], low[1]) + torch.bmm(low[0], high[1])
            return kwargs["out"].copy_(found) if "out" in kwargs else found


def _round(x: Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return x.bfloat16().float()
    if precision == "ieee":
        return x
    return ((x.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


def emulated_errors(circuit: pc.Circuit, x: Tensor) -> dict[str, Error]:
    """What every precision does to log-likelihoods and flows, computed on the CPU by PyTorch's general pass."""
    exact = copy.deepcopy(circuit).double()
    log_exact = exact.log_prob(x, head=0)
    log_exact.sum().backward()
    flows = _flows(exact)
    found = {}
    for precision in triton_kernels.PRECISIONS:
        single = copy.deepcopy(circuit)
        single.engine.is_linear = False  # as on a GPU: logarithms between layers
        with Rounded(precision):
            log_p = single.log_prob(x, head=0)
            log_p.sum().backward()
        error = error_of(log_p.detach(), log_exact.detach())
        error.flow = sum(float((a - b).abs().sum()) for a, b in zip(_flows(single), flows, strict=True))
        error.flow /= sum(float(flow.sum()) for flow in flows)
        found[precision] = error
    return found


def _flows(circuit: pc.Circuit) -> list[Tensor]:
    return [table.grad.double() * table.detach().double() for table in circuit.tables]


def error_table(errors: dict[str, Error], num_vars: int) -> list[str]:
    lines = ["| matrix products | largest error, nats | mean, nats | mean, bpd | flows |", "| --- |" + " ---: |" * 4]
    return lines + [f"| {name} | {error.cells(num_vars)} |" for name, error in errors.items()]

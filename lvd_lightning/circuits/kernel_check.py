"""Do the fused kernels for GPUs agree with PyTorch on a device? Asked of small circuits before any other runs there."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Categorical
from lvd_lightning.circuits.em import Anemone, CircuitEM
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.structures import hclt

__all__ = ["compare"]

#: (latents, examples): tiles that are full, as in large circuits, and tiles that are cut off.
SIZES = ((64, 64), (5, 3))
NUM_CATEGORIES = 4


def compare(device: torch.device) -> None:
    """Compute log-likelihoods, gradients and M-steps of a small circuit, and with PyTorch in double precision.

    Raises:
        RuntimeError: they differ.
        Exception: whatever Triton raises where it cannot compile or start the kernels.
    """
    cases = list(itertools.product(SIZES, triton_kernels.PRECISIONS))
    if triton_kernels.interprets():  # it is slow
        cases = [(SIZES[-1], triton_kernels.PRECISIONS[0])]
    for (num_latents, size), precision in cases:
        with triton_kernels.switched(True), torch.autocast(device.type, enabled=False):
            found = _results(device, num_latents, size, precision, torch.float32)
            expected = _results(device, num_latents, size, precision, torch.float64)
        tolerance = {"bf16": 0.1, "tf32": 1e-2}.get(precision, 1e-3)
        for name, a in found.items():
            b = expected[name]
            if not torch.allclose(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max())):
                raise RuntimeError(f"{name} differs by {float((a - b).abs().max()):.3g} ({precision}, {num_latents})")


@torch.inference_mode(False)
@torch.enable_grad()
def _results(
    device: torch.device, num_latents: int, size: int, precision: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """What a step computes, by the kernels in float32, by PyTorch in float64; always from the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    tree = torch.tensor([-1, 0, 0, 1])
    graph = hclt(tree, num_latents, Categorical(NUM_CATEGORIES), generator=generator)
    x = torch.randint(NUM_CATEGORIES, (size, len(tree)), generator=generator).to(device)
    found: dict[str, Tensor] = {}
    for rule in (CircuitEM, Anemone):
        circuit = Circuit(graph).to(device, dtype)
        circuit.matmul_precision = precision
        optimizer = rule(circuit)
        log_p = circuit.log_prob(x, head=0)
        (-log_p.sum()).backward()
        found["log_prob"] = log_p.detach()
        for number, table in enumerate(circuit.tables):
            assert table.grad is not None
            found[f"gradient {number}"] = table.grad.clone()
        with torch.no_grad():  # not `step`: what ranks add up is none of this circuit's business
            for group in optimizer.param_groups:
                optimizer._step_circuit(circuit, group)
        for number, table in enumerate(circuit.tables):
            found[f"{rule.__name__} {number}"] = table.detach().clone()
    return found


triton_kernels.check_first_with(compare)

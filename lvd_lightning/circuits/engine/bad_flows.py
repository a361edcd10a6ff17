"""Gradients with NaN or infinity: an EM step on them is refused before it moves anything.

One NaN in a loss, a weight or a batch is in all flows above and below it. On the CPU every gradient is looked at, which
is little beside the pass that made it. On an accelerator nobody waits: the gradients of the heads, where whatever went
wrong below or above arrives, decide on the device whether flows count, and the circuit's late check tells it.

Shapes: F nodes, H heads, K inner units.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.late_checks import is_late

if TYPE_CHECKING:
    from lvd_lightning.circuits.circuit import Circuit

__all__ = ["BAD_FLOWS", "refuse_bad_flows"]

#: What the late check of a circuit says.
BAD_FLOWS = "EM: gradients hold NaN or infinity (the loss, a weight or the batch did); the step went without any flow"


def refuse_bad_flows(circuit: Circuit, name: str) -> None:
    """Raise a ValueError if gradients, or sums for EM, hold NaN or infinity; `name` is that of the optimizer.

    On an accelerator they become 0 instead, and the late check of the circuit raises.
    """
    if is_late(circuit.device):
        _empty_bad_flows(circuit)
        return
    first = [number for number, _, _ in circuit.root_places()]  # a head is easier to recognise than a node
    for number in sorted(range(len(circuit.tables)), key=lambda number: number not in first):
        for found in (circuit.tables[number].grad, circuit.statistics.get(number)):
            if found is not None and not _is_finite(found):
                where = circuit.bad_example or _place(circuit, number, found)
                raise ValueError(
                    f"{name}: the step is refused, parameters are as they were: gradients hold NaN or infinity, first "
                    f"of {where}; look for it in the loss, its weights and the batch (zero_grad() forgets it)"
                )


def _is_finite(found: Tensor) -> bool:
    """Whether all numbers are; a sum that is finite says so at once."""
    return math.isfinite(found.sum()) or bool(found.isfinite().all())


def _place(circuit: Circuit, number: int, found: Tensor) -> str:
    """The unit of the first such number."""
    table = found if number in circuit.statistics else circuit.dense(number, found)
    row, unit = (~table.isfinite()).any(-1).nonzero()[0].tolist()
    g, index = circuit.plan.groups[number].owners[row]
    node = f"head {unit}" if index == circuit.structures[g].root else f"unit {unit} of node {index}"
    return node + (f" of circuit {g}" if circuit.batched else "")


def _empty_bad_flows(circuit: Circuit) -> None:
    roots = [circuit.tables[number].grad for number, _, _ in circuit.root_places()]
    sums = [found for found in circuit.statistics.values() if found.device == circuit.device]
    found = [tensor for tensor in (*roots, *sums) if tensor is not None]
    if not found:
        return
    bad = torch.stack([~tensor.isfinite().all() for tensor in found]).any()
    circuit.checks.add(len(circuit.plan.inputs) + 1, [bad])
    for tensor in (*(table.grad for table in circuit.tables), *sums):
        if tensor is not None:
            tensor.masked_fill_(bad, 0.0)

"""Gradients with NaN or infinity: an EM step on them is refused before it moves anything.

The gradients of the heads and the sums for EM are looked at, which are few numbers beside all gradients: one NaN in a
loss, a weight or a batch is in the flow of a head, whether it came from above or, with the values, from below. On an
accelerator nobody waits: these numbers decide on the device whether flows count, and the engine's late check tells it.

Shapes: G circuits, H heads, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import may_ask
from lvd_lightning.circuits.engine.late_checks import is_late

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.engine import Engine

__all__ = ["BAD_FLOWS", "note_bad_gradient", "refuse_bad_flows"]

#: What the late check of an engine says.
BAD_FLOWS = "EM: gradients hold NaN or infinity (the loss, a weight or the batch did); the step went without any flow"


def note_bad_gradient(engine: Engine, grad_GHB: Tensor) -> None:
    """Remember the first example whose gradient is NaN or infinite: in the sums over examples it is lost."""
    if may_ask(grad_GHB) and not math.isfinite(grad_GHB.sum()) and engine.bad_example is None:
        found = (~grad_GHB.isfinite()).nonzero().tolist()
        if found:
            g, h, b = found[0]
            engine.bad_example = f"example {b} under head {h}" + (f" of circuit {g}" if engine.batched else "")


def refuse_bad_flows(engine: Engine, tables: Sequence[Tensor], name: str) -> None:
    """Raise a ValueError if gradients, or sums for EM, hold NaN or infinity; `name` is that of the optimizer.

    On an accelerator they become 0 instead, and the late check of the engine raises.
    """
    device = engine.device
    watched = [(number, tables[number].grad) for number, _, _ in engine.root_parameters]
    watched += engine.statistics.items()
    found = {number: tensor for number, tensor in watched if tensor is not None and tensor.device == device}
    if is_late(device):
        _empty_bad_flows(engine, tables, list(found.values()))
        return
    for number, tensor in found.items():
        # a sum that is finite says at once that all numbers are
        if not math.isfinite(tensor.sum()) and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"{name}: the step is refused, parameters are as they were: gradients hold NaN or infinity, first of "
                f"{engine.bad_example or _place(engine, number, tensor)}; look for it in the loss, its weights and "
                "the batch (zero_grad() forgets it)"
            )


def _place(engine: Engine, number: int, found: Tensor) -> str:
    """The unit of the first such number."""
    row, unit = (~found.isfinite()).any(-1).nonzero()[0].tolist()
    g, index = engine.plan.groups[number].owners[row]
    node = f"head {unit}" if index == engine.structures[g].root else f"unit {unit} of node {index}"
    return node + (f" of circuit {g}" if engine.batched else "")


def _empty_bad_flows(engine: Engine, tables: Sequence[Tensor], found: list[Tensor]) -> None:
    if not found:
        return
    bad = torch.stack([~tensor.isfinite().all() for tensor in found]).any()
    engine.checks.add(len(engine.plan.inputs) + 1, [bad])
    for tensor in (*(table.grad for table in tables), *found):
        if tensor is not None:
            tensor.masked_fill_(bad, 0.0)

"""What callers hand to a circuit, checked: examples, masks, heads, and which results they want.

Shapes: G circuits, B batch, D variables, H heads, F folded input nodes, K states, S chosen examples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import described, is_whole, plain_integers
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.engine.late_checks import is_late

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.engine import Engine
    from lvd_lightning.circuits.engine.layers import InputLayer

__all__ = ["Batch", "expected_shape", "head_index", "prepare", "wanted_heads"]


@dataclass
class Batch:
    """Checked inputs, one entry per input layer: values (F, B), or (F, B, K) for evidence, and masks (F, B)."""

    values: list[Tensor]
    observed: list[Tensor] | None
    size: int

    def take(self, columns: list[Tensor]) -> Batch:
        """Other examples for every fold: columns of its values, one (F, S) for each input layer of tables."""
        values = [found.gather(1, at) for found, at in zip(self.values, columns, strict=True)]
        observed = None
        if self.observed is not None:
            observed = [found.gather(1, at) for found, at in zip(self.observed, columns, strict=True)]
        return Batch(values, observed, columns[0].shape[1])


def prepare(engine: Engine, x: Tensor, observed: Tensor | None, late: bool = False, checked: bool = True) -> Batch:
    """Check `x` and `observed` and hand every input layer its rows.

    With `late` the values of `x` are checked without waiting for a GPU; unless `checked`, shapes alone are.
    """
    engine.checks.ask()
    x = plain_integers(x)
    late = late and checked and is_late(engine.device)
    shape = (x.shape[:-1] if engine.is_evidence else x.shape) if isinstance(x, Tensor) else None
    if shape is None or len(shape) not in ((2, 3) if engine.batched else (2,)):
        raise ValueError(f"x: got {_describe(x)}, expected a tensor of shape {expected_shape(engine)}")
    if shape[-1] != engine.num_variables or (len(shape) == 3 and shape[0] != engine.num_circuits):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected {expected_shape(engine)}")
    if observed is not None and not (
        isinstance(observed, Tensor) and observed.dtype == torch.bool and observed.shape == shape
    ):
        raise ValueError(f"observed: got {described(observed)}, expected a bool tensor of shape {tuple(shape)}")
    if x.device != engine.device:
        raise ValueError(f"x: is on {x.device}, the circuit is on {engine.device}; move one of them")
    shared = len(shape) == 2
    values, masks, outside = [], [], []
    columns = _variables_first(x.detach(), shared)
    mask_columns = None if observed is None else _variables_first(observed, shared)
    for layer in engine.leaf_layers():
        found = layer.select(columns, shared)
        if mask_columns is not None:
            mask = layer.select(mask_columns, shared)
            found = found.masked_fill(~mask if found.ndim == 2 else ~mask[..., None], 0)
            masks.append(mask)
        if late:
            outside.append(layer.distribution.is_outside(found))
        elif checked:
            layer.distribution.check_values(found)
        if not found.is_floating_point() or layer.distribution.is_table:
            found = _whole(found, layer)
        if late and layer.distribution.is_table:
            found = found.clamp_(0, layer.distribution.size - 1)
        values.append(found)
    if late:
        engine.checks.add(0, outside)
    return Batch(values, None if observed is None else masks, shape[-2])


def head_index(engine: Engine, head: int | Tensor, size: int, late: bool = False, checked: bool = True) -> Tensor:
    """Heads as an int64 tensor (G, B), checked; with `late`, those on a GPU without waiting for it.

    Unless `checked`, the shape alone is.
    """
    head = plain_integers(head)
    if isinstance(head, Tensor):
        expected = (engine.num_circuits, size) if engine.batched else (size,)
        if head.shape != expected or head.is_floating_point() or head.dtype == torch.bool:
            raise ValueError(f"head: got {described(head)}, expected an int or an integer tensor of shape {expected}")
        index = head.to(engine.device, torch.int64).view(engine.num_circuits, size)
    else:
        if not is_whole(head):
            raise ValueError(f"head: got {described(head)}, expected an int or an integer tensor")
        return torch.full((engine.num_circuits, size), _check_head(engine, int(head)), device=engine.device)
    if not checked:
        return index
    if late and is_late(head.device):
        engine.checks.add(len(engine.plan.inputs), [((index < 0) | (index >= engine.num_heads)).any()])
        return index.clamp(0, engine.num_heads - 1)
    if head.numel():
        for bound in head.aminmax():  # not of `index`: a head that is on the CPU is looked at there
            _check_head(engine, int(bound))
    return index


def wanted_heads(
    engine: Engine, wanted: Tensor | None, head_GB: Tensor | None, shape: tuple[int, ...]
) -> Tensor | None:
    """Which heads matter for which examples, bool (G, H, B); None: all of them."""
    expected = shape if engine.batched else shape[1:]
    if wanted is not None and not (
        isinstance(wanted, Tensor) and wanted.dtype == torch.bool and wanted.shape == expected
    ):
        raise ValueError(f"wanted: got {described(wanted)}, expected a bool tensor of shape {expected}")
    if not engine.is_linear or triton_kernels.applies(engine.device, engine.dtype):
        return None
    if head_GB is None:
        return None if wanted is None else wanted.view(shape).transpose(1, 2)
    out_GHB = head_GB.new_zeros(len(head_GB), engine.num_heads, head_GB.shape[1], dtype=torch.bool)
    return out_GHB.scatter_(1, head_GB[:, None], True if wanted is None else wanted.view(shape)[:, None])


def expected_shape(engine: Engine) -> str:
    """The shape of `x`, for messages."""
    shape = f"(batch, {engine.num_variables}"
    if engine.is_evidence:
        shape += f", {engine.plan.inputs[0].num_units}"
    return f"{shape})" + (f" or ({engine.num_circuits}, {shape[1:]})" if engine.batched else "")


def _check_head(engine: Engine, head: int) -> int:
    if not 0 <= head < engine.num_heads:
        raise ValueError(f"head: got {head}, expected 0..{engine.num_heads - 1}")
    return head


def _variables_first(x: Tensor, shared: bool) -> Tensor:
    """(B, D, ...) or (G, B, D, ...) to (variables, B, ...)."""
    return x.transpose(0, 1) if shared else x.transpose(1, 2).flatten(0, 1)


def _whole(found: Tensor, layer: InputLayer) -> Tensor:
    return found.long() if layer.distribution.is_linear else found


def _describe(x: object) -> str:
    return f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__

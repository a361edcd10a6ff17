"""EM updates of tables in the kernels of this package: each number is read once or twice and written once.

Shapes: P parameter rows, X units, Y alternatives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.kernels.triton import applies, on

__all__ = ["update_table"]

#: Numbers that one program takes at once.
ITEM_SIZE = 2048


def update_table(
    theta_PXY: Tensor,
    grad_PXY: Tensor | None,
    mask_PXY: Tensor | None,
    *,
    step: float,
    pseudocount: float,
    floor: bool,
    flow_PXY: Tensor | None = None,
    scale_PX1: Tensor | None = None,
    momentum: float = 0.0,
    forgotten: float = -1.0,
    starts: Tensor | None = None,
) -> bool:
    """An M-step in place, if the kernels can do it: arguments and result are those of `cpu.updates.update_table`.

    Rows of unequal length have none here.
    """
    if starts is not None:
        return False
    given = [tensor for tensor in (theta_PXY, grad_PXY, mask_PXY, flow_PXY, scale_PX1) if tensor is not None]
    if not applies(theta_PXY.device, theta_PXY.dtype) or not all(tensor.is_contiguous() for tensor in given):
        return False
    if any(tensor.dtype != theta_PXY.dtype for tensor in given if tensor is not mask_PXY):
        return False
    with on(theta_PXY.device):
        _launch(theta_PXY, grad_PXY, mask_PXY, flow_PXY, scale_PX1, step, pseudocount, floor, momentum, forgotten)
    if flow_PXY is None or scale_PX1 is not None:
        torch.autograd.graph.increment_version(theta_PXY)  # so that a backward pass through older values is refused
    return True


def _launch(
    theta_PXY: Tensor,
    grad_PXY: Tensor | None,
    mask_PXY: Tensor | None,
    flow_PXY: Tensor | None,
    scale_PX1: Tensor | None,
    step: float,
    pseudocount: float,
    floor: bool,
    momentum: float,
    forgotten: float,
) -> None:
    from lvd_lightning.circuits.engine.kernels.triton import table_kernels

    if flow_PXY is not None and scale_PX1 is None:
        table_kernels.average_flows[(-(-theta_PXY.numel() // ITEM_SIZE),)](
            flow_PXY, theta_PXY, grad_PXY, theta_PXY.numel(), float(momentum), float(forgotten), NUMBERS=ITEM_SIZE
        )
        return
    num_rows, width = theta_PXY[..., 0].numel(), theta_PXY.shape[-1]
    columns = min(ITEM_SIZE // 2, 1 << (width - 1).bit_length())
    rows = ITEM_SIZE // columns
    first = (theta_PXY, grad_PXY) if scale_PX1 is None else (theta_PXY, flow_PXY, scale_PX1)
    kernel = table_kernels.step_of_parameters if scale_PX1 is None else table_kernels.step_of_averages
    kernel[(-(-num_rows // rows),)](
        *first,
        theta_PXY if mask_PXY is None else mask_PXY,
        num_rows,
        width,
        float(step),
        float(pseudocount),
        MASKED=mask_PXY is not None,
        FLOORED=floor,
        ROWS=rows,
        COLUMNS=columns,
    )

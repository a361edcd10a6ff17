"""EM updates of tables in the kernels of `kernels.c`: one or two passes over each row while it is in the cache.

Shapes: P parameter rows, X units, Y alternatives.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.smooth_prior import SmoothPrior
from lvd_lightning.circuits.engine.kernels.cpu import library, suits

__all__ = ["update_table", "update_table_with_prior"]

#: Numbers that one item of work takes.
ITEM_SIZE = 1 << 14


class _Update(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("rows", "width", "rows_per_item")),
        *((name, c_void_p) for name in ("starts", "theta", "grad", "live")),
        ("floor", c_int64),
        *((name, c_double) for name in ("step", "pseudocount")),
        *((name, c_void_p) for name in ("flow", "scale")),
        *((name, c_double) for name in ("momentum", "forgotten")),
        ("radius", c_int64),
        *((name, c_void_p) for name in ("kernel", "inside")),
        *((name, c_double) for name in ("share", "constant", "correction")),
        ("scratch", c_void_p),
    )


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
    """An M-step in place, if the kernels can do it; False, with nothing done, if not.

    Without `flow_PXY` it is that of `CircuitEM`. With it, moving averages of flows, it is that of `Anemone`: given a
    gradient the averages are updated, given a scale, (1 - s) N TD(n), the parameters.

    Args:
        theta_PXY: probabilities.
        grad_PXY: gradient of the loss, minus flow / probability.
        mask_PXY: live alternatives; None for all.
        step: s, for `Anemone` divided by the bias correction.
        pseudocount: a, spread over the live alternatives of a row.
        floor: whether positive probabilities stay at `distributions.SMALLEST` or above.
        flow_PXY: moving averages of flows.
        scale_PX1: what a row's parameters weigh.
        momentum: of the moving averages.
        forgotten: averages up to this become 0; nothing below 0.
        starts: for rows of unequal length, one after the other in flat tensors: where each begins and the last one
            ends, int64 (rows + 1).
    """
    given = [tensor for tensor in (theta_PXY, grad_PXY, mask_PXY, flow_PXY, scale_PX1, starts) if tensor is not None]
    found = library(theta_PXY.dtype)
    if found is None or not suits(given):
        return False
    if any(tensor.dtype != theta_PXY.dtype for tensor in given if tensor is not mask_PXY and tensor is not starts):
        return False
    if starts is None:
        rows, width = theta_PXY[..., 0].numel(), theta_PXY.shape[-1]
    else:
        rows = len(starts) - 1
        width = max(1, len(theta_PXY) // rows)
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in (starts, theta_PXY, grad_PXY, mask_PXY)]
    averages = [None if tensor is None else tensor.data_ptr() for tensor in (flow_PXY, scale_PX1)]
    rows_per_item = max(1, ITEM_SIZE // width)
    update = _Update(rows, width, rows_per_item, *pointers, floor, step, pseudocount, *averages, momentum, forgotten)
    found.update_table(ctypes.byref(update), torch.get_num_threads())
    if flow_PXY is None or scale_PX1 is not None:
        torch.autograd.graph.increment_version(theta_PXY)  # so that a backward pass through older values is refused
    return True


def update_table_with_prior(
    theta_PXY: Tensor,
    prior: SmoothPrior,
    *,
    step: float,
    pseudocount: float,
    floor: bool,
    grad_PXY: Tensor | None = None,
    flow_PXY: Tensor | None = None,
    expected_PX1: Tensor | None = None,
    correction: float = 1.0,
) -> bool:
    """An M-step in place with a prior beside the flows, if the kernels can do it; False, with nothing done, if not.

    Given a gradient it is that of `CircuitEM`, given averaged flows that of `Anemone`.

    Args:
        theta_PXY: probabilities.
        prior: what is added to the flows.
        step: s.
        pseudocount: a, spread over the alternatives of a row.
        floor: whether positive probabilities stay at `distributions.SMALLEST` or above.
        grad_PXY: gradient of the loss, minus flow / probability.
        flow_PXY: moving averages of flows, which stay.
        expected_PX1: N TD(n), the flow that a row's parameters stand for.
        correction: what averages are divided by.
    """
    given = [tensor for tensor in (theta_PXY, grad_PXY, flow_PXY, expected_PX1) if tensor is not None]
    found = library(theta_PXY.dtype)
    if found is None or not suits(given) or any(tensor.dtype != theta_PXY.dtype for tensor in given):
        return False
    rows, width = theta_PXY[..., 0].numel(), theta_PXY.shape[-1]
    kernel_R, inside_S = prior.kernel(width, theta_PXY.dtype)
    radius, threads = len(kernel_R) - 1, torch.get_num_threads()
    scratch = theta_PXY.new_empty(threads, 2 * (width + radius))
    update = _Update(
        rows=rows,
        width=width,
        rows_per_item=max(1, ITEM_SIZE // width),
        theta=theta_PXY.data_ptr(),
        grad=None if grad_PXY is None else grad_PXY.data_ptr(),
        floor=floor,
        step=step,
        pseudocount=pseudocount,
        flow=None if flow_PXY is None else flow_PXY.data_ptr(),
        scale=None if expected_PX1 is None else expected_PX1.data_ptr(),
        radius=radius,
        kernel=kernel_R.data_ptr(),
        inside=inside_S.data_ptr(),
        share=prior.share,
        constant=prior.constant,
        correction=correction,
        scratch=scratch.data_ptr(),
    )
    found.update_table(ctypes.byref(update), threads)
    torch.autograd.graph.increment_version(theta_PXY)  # so that a backward pass through older values is refused
    return True

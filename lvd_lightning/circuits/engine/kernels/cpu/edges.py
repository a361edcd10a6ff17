"""Top-down probabilities through the live edges of a sparse layer, in the kernels of `kernels.c`.

Shapes: F folded nodes, H outer units, K inner units, E live edges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.kernels.cpu import library, suits

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.sparse import EdgeIndex

__all__ = ["pass_edges"]


def pass_edges(index: EdgeIndex, weight_E: Tensor, from_FH1: Tensor, out_FK1: Tensor, low: int) -> bool:
    """out = the sum over h of `from` times the weights, for folds from `low` on; False, with nothing done, if not.

    The kernels can do it for one column on the CPU.
    """
    found = library(weight_E.dtype)
    if found is None or from_FH1.shape[2] != 1 or not suits([weight_E, from_FH1, out_FK1]):
        return False
    folds, outer, units = len(from_FH1), index.shape[1], index.shape[2]
    start = index.start[low * outer :]
    pointers = (
        start.ctypes.data,
        index.column.ctypes.data,
        weight_E.data_ptr(),
        from_FH1.data_ptr(),
        out_FK1.data_ptr(),
    )
    found.pass_edges(folds, outer, units, *pointers, torch.get_num_threads())
    return True

"""Which rows are added up to the units of a layer's nodes, in the order in which the kernels read them.

Shapes: F folded nodes, N units of all of them, M entries.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.circuits.engine.gather import GatherRows

__all__ = ["RowTable"]

#: The row to read where a unit has fewer rows than others of its node: log 1 in V, no gradient in E.
NOTHING = 0


@dataclass
class RowTable:
    """For every node a block of rows: the first rows of all its units, then the second ones and so on.

    rows: int32 (M,). first: int64 (F,), where the node's block begins. count: int32 (F,), rows per unit.
    """

    rows: Tensor
    first: Tensor
    count: Tensor

    @classmethod
    def of(cls, gather: GatherRows, num_folds: int) -> RowTable:
        """Of a layer's gather; nodes with few rows per unit do not pay for those with many."""
        device = gather.first.device
        first_N = gather.first.cpu().numpy()
        width = len(first_N) // num_folds
        slots = [(getattr(gather, f"src{n}").cpu().numpy(), dst) for n, dst in enumerate(gather.bounds)]
        count_F = np.ones(num_folds, dtype=np.int64)
        place: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for src, dst in slots:
            place.append((src, dst, count_F[dst // width]))
            count_F[np.unique(dst // width)] += 1
        start_F = np.concatenate([[0], np.cumsum(count_F * width)])
        rows_M = np.full(start_F[-1], NOTHING, dtype=np.int64)
        fold_N, unit_N = np.divmod(np.arange(len(first_N)), width)
        rows_M[start_F[fold_N] + unit_N] = first_N
        for src, dst, rank in place:
            rows_M[start_F[dst // width] + rank * width + dst % width] = src
        if rows_M.max(initial=0) >= 1 << 31:
            raise ValueError(f"Circuit: has {rows_M.max()} rows, more than the kernels can count")
        return cls(
            torch.from_numpy(rows_M.astype(np.int32)).to(device),
            torch.from_numpy(start_F[:-1]).to(device),
            torch.from_numpy(count_F.astype(np.int32)).to(device),
        )

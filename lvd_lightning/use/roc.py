"""How well a score tells two sets apart."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = ["auroc", "roc_curve"]


def roc_curve(inside: Sequence[float], outside: Sequence[float]) -> tuple[npt.NDArray[np.float64], ...]:
    """Shares of false and true alarms, both rising from 0 to 1, over all thresholds; an alarm is a score at or above.

    inside: scores of what should raise no alarm; outside: of what should.

    Raises:
        ValueError: one of them is empty, or a score is NaN.
    """
    low, high = np.asarray(inside, dtype=np.float64), np.asarray(outside, dtype=np.float64)
    if not len(low) or not len(high):
        raise ValueError(f"roc: got {len(low)} and {len(high)} scores, expected some of both")
    if np.isnan(low).any() or np.isnan(high).any():
        raise ValueError("roc: a score is NaN")
    thresholds = np.unique(np.concatenate([low, high]))[::-1]
    false = 1 - np.searchsorted(np.sort(low), thresholds) / len(low)
    true = 1 - np.searchsorted(np.sort(high), thresholds) / len(high)
    return np.concatenate([[0.0], false]), np.concatenate([[0.0], true])


def auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    """The area under that curve: how often the score of one from outside exceeds that of one from inside, ties halved.

    Example:
        >>> from lvd_lightning.use.roc import auroc
        >>> auroc([1.0, 2.0], [2.0, 3.0])
        0.875
    """
    false, true = roc_curve(inside, outside)
    return float(np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2))

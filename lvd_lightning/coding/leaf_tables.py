"""p(value | unit) of input distributions in float64, by operations that give the same numbers everywhere.

Shapes: U units, V values, S numbers stored per unit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions import DiscretizedLogistic, Distribution
from lvd_lightning.coding.exact import exp_of_negative

__all__ = ["leaf_table"]


def leaf_table(distribution: Distribution, params: Tensor) -> Tensor:
    """p(value | unit), float64 (U, V) on the CPU.

    Tables are what they are, and logistics are computed by `exp_of_negative`. Other families are asked for their own
    numbers in float64, whose last bits depend on the machine's mathematical library.

    params: (U, S).

    Raises:
        ValueError: a family without a list of values.
    """
    params_US = params.detach().cpu().double()
    if distribution.num_outcomes is None:
        raise ValueError(f"{distribution} has no list of values: what it models cannot be coded without loss")
    if distribution.is_table:
        return distribution.probabilities(params_US[None])[0]
    if isinstance(distribution, DiscretizedLogistic):
        return _logistic(params_US, distribution.num_values)
    return distribution.probabilities(params_US[None])[0]


def _logistic(params_US: Tensor, num_values: int) -> Tensor:
    """s(b) s(-a) (1 - e^(a - b)) with the edges a and b of every value's bin; the first and the last bin are open."""
    mean_U1, scale_U1 = params_US[:, :1], params_US[:, 1:]
    deviation_UV = torch.arange(num_values, dtype=torch.float64) - mean_U1
    above_UV = _sigmoid(-(deviation_UV - 0.5) / scale_U1)
    below_UV = _sigmoid((deviation_UV + 0.5) / scale_U1)
    above_UV[:, 0] = 1.0
    below_UV[:, -1] = 1.0
    between_UV = (1.0 - exp_of_negative(1.0 / scale_U1)).expand(-1, num_values).clone()
    between_UV[:, 0] = 1.0
    between_UV[:, -1] = 1.0
    return above_UV * below_UV * between_UV


def _sigmoid(values: Tensor) -> Tensor:
    small = exp_of_negative(values.abs())
    return torch.where(values < 0, small, 1.0) / (1.0 + small)

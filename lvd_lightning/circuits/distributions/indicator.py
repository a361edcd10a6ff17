"""Indicators: which unit a latent variable stands for, once it is a variable.

Shapes: F folded nodes, K units, B batch, S states.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.tables import Categorical

__all__ = ["Indicator"]


@dataclass(frozen=True)
class Indicator(Categorical):
    """A categorical each of whose units has all its mass on one state; it says what a unit means and is not learnt.

    No optimizer moves it: EM gives no pseudocounts to the other states, growth does not perturb it, and it counts no
    parameters. `materialize` makes them.

    Args:
        num_categories: how many states there are, at least 1. Parameters are rows of zeros with a single one.

    Raises:
        ValueError: num_categories is no such number.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> pc.Indicator(3).initial(num_units=3)
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 1.]])
    """

    is_fixed: ClassVar[bool] = True

    @property
    def num_free(self) -> int:
        return 0

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        """State k for unit k, from the first one again where there are more units than states."""
        return torch.eye(self.num_categories)[torch.arange(num_units) % self.num_categories]

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """As `initial`: data do not change what a unit means."""
        return self.initial(num_units).expand(x_ND.shape[1], -1, -1)

    def check_params(self, params: Tensor) -> None:
        if not bool(((params == 0) | (params == 1)).all()) or not bool((params.sum(-1) == 1).all()):
            raise ValueError(f"{self}: rows of params must have a single 1 among zeros")

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """The same: a copy of a unit stands for the same state."""
        return params

    def to_logits(self, params: Tensor) -> Tensor:
        """The parameters themselves."""
        return params

    def from_logits(self, logits: Tensor) -> Tensor:
        return logits

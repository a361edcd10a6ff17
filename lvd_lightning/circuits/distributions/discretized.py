"""What continuous distributions that are rounded to whole numbers share.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import Distribution, check_size, check_whole, is_not_whole, is_number
from lvd_lightning.circuits.distributions.moments import unit_moments

__all__ = ["Discretized"]


@dataclass(frozen=True)
class Discretized(Distribution):
    """A density with a place and a spread, integrated over the bins [x - 1/2, x + 1/2] of whole numbers x.

    The first and the last bin are open, so that the probabilities of 0..num_values - 1 add up to one. Parameters are
    (mean, spread), those before rounding, in units of x; the mean may lie outside the values. Subclasses name the
    spread and its floor.

    num_values: at least 2. The spread has a ceiling too, 100 num_values, and the mean keeps within num_values of the
        values: beyond, the probabilities hardly change.
    """

    num_values: int
    is_whole: ClassVar[bool] = True
    is_smooth: ClassVar[bool] = True
    #: What the spread is called, and the field that holds its floor.
    spread: ClassVar[str]
    #: Standard deviation of the density of spread 1.
    deviation: ClassVar[float]

    def __post_init__(self) -> None:
        check_size(self, "num_values", 2)
        if not is_number(self.least) or not 0 < self.least < self.num_values:
            name = f"{type(self).__name__}: min_{self.spread}"
            raise ValueError(f"{name} must lie in (0, num_values), got {self.least!r}")

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        return cls(**({"num_values": num_values} | settings))

    @property
    def least(self) -> float:
        """The floor of the spread."""
        found: float = getattr(self, f"min_{self.spread}")
        return found

    @property
    def size(self) -> int:
        return 2

    @property
    def num_outcomes(self) -> int:
        return self.num_values

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        mean = (self.num_values - 1) * torch.rand(num_units, 1, generator=generator)
        return self.floored(torch.cat([mean, torch.full_like(mean, self.num_values / 8)], 1))

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """Means and deviations of the values of each unit."""
        mean_DK, variance_DK = unit_moments(x_ND, unit_ND, num_units, weight_N, smoothing)
        params_DKS = torch.stack([mean_DK, variance_DK.sqrt() / self.deviation], -1)
        return self.floored(params_DKS.to(torch.get_default_dtype()))

    def check_params(self, params: Tensor) -> None:
        if not bool(torch.isfinite(params).all()) or not bool((params[..., 1] > 0).all()):
            raise ValueError(f"{self}: params are (mean, {self.spread}) with finite values and positive {self.spread}")

    def check_values(self, values: Tensor) -> None:
        check_whole(values, self.num_values, self)

    def is_outside(self, values: Tensor) -> Tensor:
        return is_not_whole(values, self.num_values)

    def floored(self, params: Tensor) -> Tensor:
        """Means and spreads within their bounds."""
        mean, spread = params.unbind(-1)
        return torch.stack([self._bounded_mean(mean), spread.clamp(self.least, 100.0 * self.num_values)], -1)

    @abstractmethod
    def noise(self, like_FB: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draws of the density with mean 0 and spread 1."""

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        mean_FB, spread_FB = params_FBS.unbind(-1)
        drawn_FB = mean_FB + spread_FB * self.noise(mean_FB, generator)
        return drawn_FB.round().clamp(0, self.num_values - 1)

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        last = self.num_values - 1
        mean_FK = params_FKS[..., 0]
        nearest_FK = mean_FK.round().clamp(0, last)
        places_FK3 = torch.stack([nearest_FK, torch.zeros_like(mean_FK), torch.full_like(mean_FK, last)], -1)
        log_FK3 = torch.empty_like(places_FK3)
        flat = params_FKS.reshape(-1, 1, 2)  # every unit looks at three values of its own
        self.forward(flat, places_FK3.view(-1, 3), log_FK3.view(-1, 1, 3))
        best_FK, index_FK = log_FK3.max(-1)
        return places_FK3.gather(-1, index_FK[..., None])[..., 0], best_FK * math.log(2.0)

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """The mean moves by (factor - 1) standard deviations; the spread is multiplied."""
        mean, spread = params.unbind(-1)
        moved = mean + self.deviation * spread * (factor[..., 0] - 1)
        return self.floored(torch.stack([moved, spread * factor[..., 1]], -1))

    def to_logits(self, params: Tensor) -> Tensor:
        """The mean with the values at -1..1, and the log of what the spread has above its floor."""
        mean, spread = params.unbind(-1)
        above = (spread - self.least).clamp_min(1e-3 * self.least)
        return torch.stack([(mean - self._middle) / self._middle, above.log()], -1)

    def from_logits(self, logits: Tensor) -> Tensor:
        mean, above = logits.unbind(-1)
        return self.floored(torch.stack([self._middle * (1 + mean), self.least + above.exp()], -1))

    @property
    def _middle(self) -> float:
        return (self.num_values - 1) / 2

    def _bounded_mean(self, mean: Tensor) -> Tensor:
        return mean.clamp(-self.num_values, 2 * self.num_values)

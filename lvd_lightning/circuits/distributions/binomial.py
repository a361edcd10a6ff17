"""Numbers of successes.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import Distribution, check_size, check_whole, is_not_whole, is_number
from lvd_lightning.circuits.distributions.moments import unit_moments

__all__ = ["Binomial"]


@dataclass(frozen=True)
class Binomial(Distribution):
    r"""Successes among `total` independent trials, with one parameter, the probability p of a success.

    .. math:: p(x) = \binom{n}{x} p^x (1 - p)^{n - x}, \quad x = 0..n

    EM reads the flows F and the sums F x; it blends the expectation E x = n p. p stays in [min_prob, 1 - min_prob],
    so that values that were never seen stay possible.

    Args:
        total: n, the largest value, at least 1.
        min_prob: the floor of p and of 1 - p, in (0, 1/2).

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.CircuitGraph()
        >>> _ = graph.add_sum([graph.add_input(0, pc.Binomial(2), 1, params=[[0.5]])], 1)
        >>> pc.Circuit(graph).log_prob(torch.arange(3)[:, None]).detach().exp().flatten()
        tensor([0.2500, 0.5000, 0.2500])
    """

    total: int
    min_prob: float = 1e-6
    is_whole: ClassVar[bool] = True
    num_statistics: ClassVar[int] = 2

    def __post_init__(self) -> None:
        check_size(self, "total", 1)
        if not is_number(self.min_prob) or not 0 < self.min_prob < 0.5:
            raise ValueError(f"Binomial: min_prob must lie in (0, 1/2), got {self.min_prob!r}")

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        return cls(**({"total": None if num_values is None else num_values - 1} | settings))

    @property
    def size(self) -> int:
        return 1

    @property
    def num_outcomes(self) -> int:
        return self.total + 1

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        return self.floored(0.05 + 0.9 * torch.rand(num_units, 1, generator=generator))

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """Means of the values of each unit."""
        mean_DK, _ = unit_moments(x_ND, unit_ND, num_units, weight_N, smoothing)
        return self.floored((mean_DK / self.total)[..., None].to(torch.get_default_dtype()))

    def check_params(self, params: Tensor) -> None:
        if not bool(((params >= 0) & (params <= 1)).all()):
            raise ValueError(f"{self}: params are probabilities of a success in [0, 1]")

    def check_values(self, values: Tensor) -> None:
        check_whole(values, self.total + 1, self)

    def is_outside(self, values: Tensor) -> Tensor:
        return is_not_whole(values, self.total + 1)

    def floored(self, params: Tensor) -> Tensor:
        """Probabilities in [min_prob, 1 - min_prob]."""
        return params.clamp(self.min_prob, 1 - self.min_prob)

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        logs_FK2 = torch.cat([params_FKS.log2(), torch.log1p(-params_FKS) / math.log(2.0)], -1)
        torch.bmm(logs_FK2, self._counts(x_FB, out_FKB.dtype).transpose(1, 2), out=out_FKB)
        out_FKB.add_(self._log_orders(x_FB)[:, None, :].to(out_FKB.dtype) / math.log(2.0))

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        x_F1B = x_FB[:, None].to(params_FKS.dtype)
        orders_F1B = self._log_orders(x_FB)[:, None].to(params_FKS.dtype)
        return x_F1B * params_FKS.log() + (self.total - x_F1B) * torch.log1p(-params_FKS) + orders_F1B

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        successes_FK, failures_FK = torch.bmm(grad_FKB, self._counts(x_FB, grad_FKB.dtype)).unbind(-1)
        p_FK = params_FKS[..., 0]
        out_FKS[..., 0] = successes_FK / p_FK - failures_FK / (1 - p_FK)

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums of (1, x)."""
        x_FB = x_FB.to(grad_FKB.dtype)
        return torch.bmm(grad_FKB, torch.stack([torch.ones_like(x_FB), x_FB], -1)).double()

    def expected(self, params: Tensor) -> Tensor:
        """E x."""
        return self.total * params.double()

    def maximise(self, expected: Tensor) -> Tensor:
        return self.floored(expected / self.total)

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        p_FB = params_FBS[..., 0].contiguous()
        return torch.binomial(torch.full_like(p_FB, self.total), p_FB, generator=generator)

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        p_FK = params_FKS[..., 0]
        mode_FK = ((self.total + 1) * p_FK).floor().clamp(0, self.total)
        log_FK = mode_FK * p_FK.log() + (self.total - mode_FK) * torch.log1p(-p_FK)
        return mode_FK, log_FK + self._log_orders(mode_FK).to(p_FK.dtype)

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """E x moves by (factor - 1) standard deviations."""
        deviation = (params * (1 - params) / self.total).sqrt()
        return self.floored(params + deviation * (factor - 1))

    def to_logits(self, params: Tensor) -> Tensor:
        return ((params - self.min_prob) / (1 - 2 * self.min_prob)).logit(eps=1e-7)

    def from_logits(self, logits: Tensor) -> Tensor:
        return self.min_prob + (1 - 2 * self.min_prob) * logits.sigmoid()

    def _counts(self, x_FB: Tensor, dtype: torch.dtype) -> Tensor:
        """Successes and failures, (F, B, 2)."""
        x_FB = x_FB.to(dtype)
        return torch.stack([x_FB, self.total - x_FB], -1)

    def _log_orders(self, x: Tensor) -> Tensor:
        """log of the binomial coefficient, in float64: it is a small difference of large numbers."""
        x = x.double()
        whole = math.lgamma(self.total + 1)
        return whole - torch.lgamma(x + 1) - torch.lgamma(self.total - x + 1)

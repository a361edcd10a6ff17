"""Normal densities.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import Distribution, is_number
from lvd_lightning.circuits.distributions.discretized_gaussian import DiscretizedGaussian
from lvd_lightning.circuits.distributions.moments import moments_from_centred, unit_moments

__all__ = ["Gaussian"]


@dataclass(frozen=True)
class Gaussian(Distribution):
    """Normal density with parameters (mean, standard deviation); `min_std` is the floor of every M-step.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.CircuitGraph()
        >>> _ = graph.add_sum([graph.add_input(0, pc.Gaussian(), 1, params=[[1.0, 2.0]])], 1)
        >>> print(f"{pc.Circuit(graph).log_prob(torch.tensor([[1.0]])).item():.4f}")  # -log(2 sqrt(2 pi))
        -1.6121
    """

    min_std: float = 1e-3
    is_smooth: ClassVar[bool] = True
    num_statistics: ClassVar[int] = 3

    def __post_init__(self) -> None:
        if not is_number(self.min_std) or not self.min_std > 0:
            raise ValueError(f"Gaussian: min_std: got {self.min_std!r}, expected a positive number")

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        """A `DiscretizedGaussian` where values are whole: a density of those would be no likelihood to compare."""
        return cls(**settings) if num_values is None else DiscretizedGaussian(**({"num_values": num_values} | settings))

    @property
    def size(self) -> int:
        return 2

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        mean = torch.randn(num_units, 1, generator=generator)
        return torch.cat([mean, torch.ones(num_units, 1)], 1)

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
        params_DKS = torch.stack([mean_DK, variance_DK.sqrt().clamp_min(self.min_std)], -1)
        return params_DKS.to(torch.get_default_dtype())

    def check_params(self, params: Tensor) -> None:
        if not bool(torch.isfinite(params).all()) or not bool((params[..., 1] > 0).all()):
            raise ValueError("Gaussian: params are (mean, std) with finite values and positive std")

    def check_values(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                "x: Gaussian expects finite values, got NaN or infinity (mask missing values by `observed`)"
            )

    def is_outside(self, values: Tensor) -> Tensor:
        return ~torch.isfinite(values).all()

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        mean, std = params_FKS[..., :1], params_FKS[..., 1:]
        torch.sub(x_FB[:, None, :].to(out_FKB.dtype), mean, out=out_FKB)
        out_FKB.div_(std).square_().mul_(-0.5 / math.log(2.0)).sub_(std.log2() + 0.5 * math.log2(2 * math.pi))

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        mean_FK1, std_FK1 = params_FKS.split(1, -1)
        z_FKB = (x_FB[:, None].to(params_FKS.dtype) - mean_FK1) / std_FK1
        return -0.5 * z_FKB.square() - std_FK1.log() - 0.5 * math.log(2 * math.pi)

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        mean, std = params_FKS[..., :1], params_FKS[..., 1:]
        z = (x_FB[:, None, :].to(grad_FKB.dtype) - mean) / std
        out_FKS[..., 0] = ((grad_FKB * z) / std).sum(-1)
        out_FKS[..., 1] = (grad_FKB * (z.square() - 1) / std).sum(-1)

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums of (1, x, x^2)."""
        mean_FK = params_FKS[..., 0]
        deviation_FKB = x_FB[:, None, :].to(grad_FKB.dtype) - mean_FK[..., None]
        first_FKB = grad_FKB * deviation_FKB
        second_FK = (first_FKB * deviation_FKB).sum(-1)
        return moments_from_centred(grad_FKB.sum(-1), first_FKB.sum(-1), second_FK, mean_FK)

    def expected(self, params: Tensor) -> Tensor:
        """(E x, E x^2)."""
        mean, std = params.double().unbind(-1)
        return torch.stack([mean, mean.square() + std.square()], -1)

    def maximise(self, expected: Tensor) -> Tensor:
        mean, second = expected.unbind(-1)
        return torch.stack([mean, (second - mean.square()).clamp_min(self.min_std**2).sqrt()], -1)

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(params_FBS[..., 0]).normal_(generator=generator)
        return params_FBS[..., 0] + params_FBS[..., 1] * noise

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        return params_FKS[..., 0], -params_FKS[..., 1].log() - 0.5 * math.log(2 * math.pi)

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """The mean moves by (factor - 1) standard deviations; the deviation is multiplied."""
        mean, std = params.unbind(-1)
        moved = mean + std * (factor[..., 0] - 1)
        return torch.stack([moved, (std * factor[..., 1]).clamp_min(self.min_std)], -1)

    def to_logits(self, params: Tensor) -> Tensor:
        return torch.cat([params[..., :1], params[..., 1:].log()], -1)

    def from_logits(self, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :1], logits[..., 1:].exp().clamp_min(self.min_std)], -1)

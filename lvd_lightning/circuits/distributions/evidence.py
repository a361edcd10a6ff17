"""Soft evidence: variables that are seen through log-likelihoods."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import Distribution, check_size

__all__ = ["SoftEvidence"]


@dataclass(frozen=True)
class SoftEvidence(Distribution):
    """A variable with `num_states` states that is seen through log-likelihoods: unit k passes on evidence[..., k].

    `log_prob` then takes evidence of shape (B, D, num_states), log p(e_v | z_v = k), and gradients flow into it;
    queries return states. In `hclt`, a latent with `num_states` states is the variable itself; any other number of
    latent states adds an emission p(z_v | y_v).

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> prior = pc.Circuit(pc.hclt([-1, 0], num_latents=3, leaf=pc.SoftEvidence(3)))
        >>> evidence = torch.randn(5, 2, 3, requires_grad=True)  # log p(e_v | z_v = k) of five examples
        >>> prior.log_prob(evidence).sum().backward()
        >>> evidence.grad.sum(2).round(decimals=4)[0]  # posteriors of both variables
        tensor([1., 1.])
    """

    num_states: int
    is_evidence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self, "num_states", 1)

    @property
    def size(self) -> int:
        return 0

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        """There are no parameters."""
        return torch.empty(num_units, 0)

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """There are no parameters."""
        return torch.empty(x_ND.shape[1], num_units, 0)

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        """x is the evidence, (F, B, K) in nats."""
        torch.mul(x_FB.transpose(1, 2), 1 / math.log(2.0), out=out_FKB)

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        """There are no parameters; the gradient for the evidence is that for the log-likelihoods."""

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        raise ValueError("SoftEvidence: has no values to draw; a circuit's `sample` returns states")

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        raise ValueError("SoftEvidence: has no values; a circuit's `mpe` returns states")

    def to_logits(self, params: Tensor) -> Tensor:
        return params

    def from_logits(self, logits: Tensor) -> Tensor:
        return logits

    def check_values(self, values: Tensor) -> None:
        if bool(torch.isnan(values).any()) or bool((values == math.inf).any()):
            raise ValueError("evidence: expects log-likelihoods below +inf, got NaN or +inf")

    def is_outside(self, values: Tensor) -> Tensor:
        return (torch.isnan(values) | (values == math.inf)).any()

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        """The evidence itself, given as (F, B, K); there are no parameters."""
        return x_FB.transpose(1, 2)

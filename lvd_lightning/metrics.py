"""Metrics of density models, for torchmetrics."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["BitsPerDim"]


class BitsPerDim(Metric):
    """Mean of -log2 p(x) / num_dims over examples, summed over ranks.

    Args:
        num_dims: dimensions of an example: every channel of every pixel of the image.
    """

    is_differentiable = True
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    weight: Tensor

    def __init__(self, num_dims: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_dims < 1:
            raise ValueError(f"num_dims: expected at least 1, got {num_dims}")
        self.num_dims = num_dims
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add log-likelihoods in nats, shape (B,), of `weight` examples each (a number, or shape (B,))."""
        nats_B = log_prob.detach().double()
        weight_B = torch.as_tensor(weight, dtype=torch.float64, device=nats_B.device).expand(nats_B.shape)
        self.nats += torch.where(weight_B > 0, nats_B * weight_B, 0.0).sum()
        self.weight += weight_B.sum()

    def compute(self) -> Tensor:
        """Bits per dimension; NaN without examples."""
        return -self.nats / (self.weight * self.num_dims * math.log(2.0))

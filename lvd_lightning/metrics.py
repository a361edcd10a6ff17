"""Metrics of density models, for torchmetrics."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

__all__ = ["BitsPerDim", "LVDGap"]


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


class LVDGap(Metric):
    """What is lost and won between a teacher and its student, on the same images: means over examples.

    The teacher's evidence lower bound, the LVD objective log p(x, z) with the latents that the student was given, and
    the student's log-likelihood log p(x), which sums the latents out (Liu, Liu, Van den Broeck and Liang, ICML 2023,
    section 3). The teacher's latents are codes and the student's are clusters, so the first is no bound of the second,
    and the student may exceed its teacher.

    Args:
        num_dims: dimensions of an example: every channel of every pixel of the image.
    """

    is_differentiable = False
    full_state_update = False
    STATES = ("teacher_elbo", "lvd_objective", "log_prob", "count", "teacher_count")
    teacher_elbo: Tensor
    lvd_objective: Tensor
    log_prob: Tensor
    count: Tensor
    teacher_count: Tensor

    def __init__(self, num_dims: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_dims < 1:
            raise ValueError(f"num_dims: expected at least 1, got {num_dims}")
        self.num_dims = num_dims
        for name in self.STATES:
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, lvd_objective: Tensor, teacher_elbo: Tensor | None = None) -> None:
        """Add figures of examples in nats, each of shape (B,); a teacher without an ELBO has none."""
        self.log_prob += log_prob.detach().double().sum()
        self.lvd_objective += lvd_objective.detach().double().sum()
        self.count += len(log_prob)
        if teacher_elbo is not None:
            self.teacher_elbo += teacher_elbo.detach().double().sum()
            self.teacher_count += len(teacher_elbo)

    def compute(self) -> dict[str, dict[str, float]]:
        """{"teacher_elbo" | "lvd_objective" | "log_prob": {"nats": per example, "bpd": bits per dimension}}.

        "teacher_elbo" is absent unless it was given for all examples; NaN without examples.
        """
        names = ["lvd_objective", "log_prob"]
        if self.teacher_count == self.count:
            names.insert(0, "teacher_elbo")
        means = {name: float(getattr(self, name) / self.count) for name in names}
        return {name: {"nats": nats, "bpd": -nats / (self.num_dims * math.log(2.0))} for name, nats in means.items()}

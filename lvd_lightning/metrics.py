"""Metrics of density models, for torchmetrics."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lvd_lightning.checks import check_choice, check_counts
from lvd_lightning.units import BitsPerDimension, Unit

__all__ = ["BitsPerDim", "LVDGap", "MeanLikelihood", "TokenPerplexity"]


class MeanLikelihood(Metric):
    """The likelihood of a model in the data's unit, over examples of all ranks.

    Args:
        unit: what is told.
        num_dims: dimensions of an example, such as every channel of every pixel of an image.

    Raises:
        ValueError: no dimension.

    Example:
        >>> from lvd_lightning.units import BitsPerDimension
        >>> metric = MeanLikelihood(BitsPerDimension(), num_dims=2)
        >>> metric.update(torch.tensor([-2.0, -2.0]))  # nats
        >>> round(float(metric.compute()), 4)
        1.4427
    """

    is_differentiable = True
    full_state_update = False
    nats: Tensor
    weight: Tensor

    def __init__(self, unit: Unit, num_dims: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(num_dims=num_dims)
        self.unit = unit
        self.num_dims = num_dims
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("weight", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def higher_is_better(self) -> bool:  # type: ignore[override]
        """As the unit says."""
        return not self.unit.lower_is_better

    def update(self, log_prob: Tensor, weight: Tensor | float = 1.0) -> None:
        """Add log-likelihoods in nats, shape (B,), of `weight` examples each (a number, or shape (B,))."""
        nats_B = log_prob.detach().double()
        weight_B = torch.as_tensor(weight, dtype=torch.float64, device=nats_B.device).expand(nats_B.shape)
        self.nats += torch.where(weight_B > 0, nats_B * weight_B, 0.0).sum()
        self.weight += weight_B.sum()

    def compute(self) -> Tensor:
        """The mean in the unit; NaN without examples."""
        return self.unit.from_nats(self.nats, self.num_dims, self.weight)


class BitsPerDim(MeanLikelihood):
    """Mean of -log2 p(x) / num_dims over examples, summed over ranks.

    Args:
        num_dims: dimensions of an example: every channel of every pixel of the image.
    """

    def __init__(self, num_dims: int, **kwargs: Any) -> None:
        super().__init__(BitsPerDimension(), num_dims, **kwargs)


class TokenPerplexity(Metric):
    """exp of the mean of -log p per token, over texts of any lengths on all ranks; of log-likelihoods, without logits.

    Perplexities of two protocols are never to be mixed or compared: those of windows, whose first words have no
    context, and those with the state carried from window to window. A metric is of one of them.

    Args:
        protocol: "window" or "carried".

    Raises:
        ValueError: another protocol.

    Example:
        >>> import math
        >>> metric = TokenPerplexity("window")
        >>> metric.update(torch.tensor([-2.0, -3.0]) * math.log(5.0), num_tokens=torch.tensor([2, 3]))
        >>> round(float(metric.compute()), 4)
        5.0
    """

    is_differentiable = False
    higher_is_better = False
    full_state_update = False
    nats: Tensor
    tokens: Tensor

    def __init__(self, protocol: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_choice(("window", "carried"), protocol=protocol)
        self.protocol = protocol
        self.add_state("nats", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, log_prob: Tensor, num_tokens: Tensor | int) -> None:
        """Add log-likelihoods in nats, shape (B,), of `num_tokens` tokens each (a number, or shape (B,))."""
        tokens_B = torch.as_tensor(num_tokens, dtype=torch.float64, device=log_prob.device).expand(log_prob.shape)
        self.nats += log_prob.detach().double().sum()
        self.tokens += tokens_B.sum()

    def compute(self) -> Tensor:
        """The perplexity; NaN without tokens."""
        return (-self.nats / self.tokens).exp()


class LVDGap(Metric):
    """What is lost and won between a teacher and its student, on the same images: means over examples.

    The teacher's evidence lower bound, the LVD objective log p(x, z) with the latents that the student was given, and
    the student's log-likelihood log p(x), which sums the latents out (Liu, Liu, Van den Broeck and Liang, ICML 2023,
    section 3). The teacher's latents are codes and the student's are clusters, so the first is no bound of the second,
    and the student may exceed its teacher.

    Args:
        unit: in which the means are told, beside nats.
        num_dims: dimensions of an example, such as every channel of every pixel of an image.
    """

    is_differentiable = False
    full_state_update = False
    STATES = ("teacher_elbo", "lvd_objective", "log_prob", "count", "teacher_count")
    teacher_elbo: Tensor
    lvd_objective: Tensor
    log_prob: Tensor
    count: Tensor
    teacher_count: Tensor

    def __init__(self, unit: Unit, num_dims: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        check_counts(num_dims=num_dims)
        self.unit = unit
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
        """{"teacher_elbo" | "lvd_objective" | "log_prob": {"nats": per example, and the unit's name: in the unit}}.

        "teacher_elbo" is absent unless it was given for all examples; NaN without examples.
        """
        names = ["lvd_objective", "log_prob"]
        if self.teacher_count == self.count:
            names.insert(0, "teacher_elbo")
        means = {name: float(getattr(self, name) / self.count) for name in names}
        unit = self.unit
        return {name: {"nats": nats, unit.name: unit.from_nats(nats, self.num_dims)} for name, nats in means.items()}

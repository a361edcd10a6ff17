"""Input distributions: log-likelihoods, closed-form gradients, sampling and modes of univariate units.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

#: The smallest positive probability of a category: flow / probability has to stay finite in single precision.
SMALLEST = 1e-30

__all__ = ["Bernoulli", "Categorical", "Distribution", "Gaussian", "SoftEvidence"]


@dataclass(frozen=True)
class Distribution:
    """A family of univariate distributions; one object describes all units of a node.

    Parameters of a node are one tensor of shape (num_units, size).
    """

    #: Rows of parameters are probabilities: the M-step is "normalise the flows".
    is_table: ClassVar[bool] = False
    #: Values are log-likelihood vectors rather than numbers.
    is_evidence: ClassVar[bool] = False
    #: EM needs `statistics` beyond the gradient.
    has_statistics: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """Numbers stored per unit."""
        raise TypeError(f"{type(self).__name__} is abstract")

    @property
    def num_free(self) -> int:
        """Free parameters per unit."""
        return self.size

    @property
    def num_values(self) -> int | None:
        """How many values there are, which are 0, 1, ... then; None: they are no such list."""
        return None

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Random parameters, shape (num_units, size)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def check_params(self, params: Tensor) -> None:
        """Raise a ValueError if `params` are no parameters of this family."""

    def check_values(self, values: Tensor) -> None:
        """Raise a ValueError if `values` (any shape) lie outside the support."""

    def floored(self, params: Tensor) -> Tensor:
        """Parameters in the range in which gradients are finite."""
        return params

    def statistics(self, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums that EM needs beyond the gradient, shape (F, K, 3)."""
        raise TypeError(f"{type(self).__name__} has none")

    def probabilities(self, params_FKS: Tensor) -> Tensor:
        """p(value | unit) of all `num_values` values, shape (F, K, values)."""
        if self.num_values is None:
            raise TypeError(f"{type(self).__name__} has no list of values")
        values_FB = torch.arange(self.num_values, device=params_FKS.device).expand(len(params_FKS), -1)
        out_FKB = params_FKS.new_empty(*params_FKS.shape[:2], self.num_values)
        self.forward(params_FKS, values_FB, out_FKB)
        return out_FKB.exp2_()

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        """Write log2 p(x | unit) to `out_FKB`."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def likelihood(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        """Write p(x | unit) to `out_FKB`; tables only."""
        raise TypeError(f"{type(self).__name__} is no table")

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        """Write the gradient for the parameters to `out_FKS`, given that for the log-likelihoods."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one value for each row of parameters, shape (F, B)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely value of every unit and its log-likelihood, both of shape (F, K)."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def to_logits(self, params: Tensor) -> Tensor:
        """Unconstrained coordinates for gradient optimizers."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def from_logits(self, logits: Tensor) -> Tensor:
        """Inverse of `to_logits`, differentiable."""
        raise TypeError(f"{type(self).__name__} is abstract")


@dataclass(frozen=True)
class Categorical(Distribution):
    """p(x = c | unit k) = probs[k, c] over the integers 0..num_categories - 1."""

    num_categories: int
    is_table: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_categories < 1:
            raise ValueError(f"Categorical: num_categories must be at least 1, got {self.num_categories}")

    @property
    def size(self) -> int:
        return self.num_categories

    @property
    def num_free(self) -> int:
        return self.num_categories - 1

    @property
    def num_values(self) -> int:
        return self.num_categories

    def probabilities(self, params_FKS: Tensor) -> Tensor:
        return params_FKS

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        probs = torch.rand(num_units, self.num_categories, generator=generator) + 0.05
        return probs / probs.sum(1, keepdim=True)

    def check_params(self, params: Tensor) -> None:
        total = params.sum(-1)
        if bool((params < 0).any()) or not bool(((total - 1).abs() < 1e-3).all()):
            raise ValueError(f"{self}: rows of params must be non-negative and sum to one")

    def check_values(self, values: Tensor) -> None:
        if values.numel() == 0:
            return
        if values.is_floating_point() and not bool((values == values.round()).all()):
            raise ValueError(f"x: {self} expects whole numbers, got a fraction or NaN")
        low, high = (int(bound) for bound in values.aminmax())
        if low < 0 or high >= self.num_categories:
            bad = low if low < 0 else high
            raise ValueError(f"x: {self} expects values in 0..{self.num_categories - 1}, got {bad}")

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        if self.num_categories < x_FB.shape[1]:  # the logarithm goes where there are fewer numbers
            self.likelihood(params_FKS.log2(), x_FB, out_FKB)
        else:
            self.likelihood(params_FKS, x_FB, out_FKB)
            out_FKB.log2_()

    def likelihood(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        torch.gather(params_FKS, 2, x_FB.long()[:, None, :].expand(out_FKB.shape), out=out_FKB)

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        index = x_FB.long()[:, None, :].expand(grad_FKB.shape)
        out_FKS.zero_().scatter_add_(2, index, grad_FKB)
        # flow / parameter; where the parameter is 0 the flow is 0 as well, and so is this gradient by convention
        if params_FKS.is_cuda or float(params_FKS.amin()) < SMALLEST:
            params_FKS = params_FKS.clamp_min(SMALLEST)
        out_FKS.div_(params_FKS)

    def floored(self, params: Tensor) -> Tensor:
        """Positive probabilities of at least `SMALLEST`; zeros stay zeros."""
        low = (params < SMALLEST) & (params > 0)
        return params.masked_fill(low, SMALLEST) if bool(low.any()) else params

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(params_FBS).exponential_(generator=generator)
        return (params_FBS / noise).argmax(-1)

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        value, index = params_FKS.max(-1)
        return index, value.log()

    def to_logits(self, params: Tensor) -> Tensor:
        return params.clamp_min(torch.finfo(params.dtype).tiny).log()

    def from_logits(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


@dataclass(frozen=True)
class Bernoulli(Categorical):
    """p(x = 1 | unit k) = probs[k, 1]; stored as the pair (1 - p, p)."""

    num_categories: int = 2

    def __post_init__(self) -> None:
        if self.num_categories != 2:
            raise ValueError(f"Bernoulli: has 2 categories, got num_categories={self.num_categories}")


@dataclass(frozen=True)
class Gaussian(Distribution):
    """Normal density with parameters (mean, standard deviation); `min_std` is the floor of every M-step."""

    min_std: float = 1e-3
    has_statistics: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.min_std > 0:
            raise ValueError(f"Gaussian: min_std must be positive, got {self.min_std}")

    @property
    def size(self) -> int:
        return 2

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        mean = torch.randn(num_units, 1, generator=generator)
        return torch.cat([mean, torch.ones(num_units, 1)], 1)

    def check_params(self, params: Tensor) -> None:
        if not bool(torch.isfinite(params).all()) or not bool((params[..., 1] > 0).all()):
            raise ValueError("Gaussian: params are (mean, std) with finite values and positive std")

    def check_values(self, values: Tensor) -> None:
        if not bool(torch.isfinite(values).all()):
            raise ValueError(
                "x: Gaussian expects finite values, got NaN or infinity (mask missing values by `observed`)"
            )

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        mean, std = params_FKS[..., :1], params_FKS[..., 1:]
        torch.sub(x_FB[:, None, :].to(out_FKB.dtype), mean, out=out_FKB)
        out_FKB.div_(std).square_().mul_(-0.5 / math.log(2.0)).sub_(std.log2() + 0.5 * math.log2(2 * math.pi))

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        mean, std = params_FKS[..., :1], params_FKS[..., 1:]
        z = (x_FB[:, None, :].to(grad_FKB.dtype) - mean) / std
        out_FKS[..., 0] = ((grad_FKB * z) / std).sum(-1)
        out_FKS[..., 1] = (grad_FKB * (z.square() - 1) / std).sum(-1)

    def statistics(self, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums of (1, x, x^2), shape (F, K, 3): what EM needs beyond the gradient."""
        x = x_FB.to(grad_FKB.dtype)
        powers_FB3 = torch.stack([torch.ones_like(x), x, x.square()], -1)
        return torch.bmm(grad_FKB, powers_FB3)

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.empty_like(params_FBS[..., 0]).normal_(generator=generator)
        return params_FBS[..., 0] + params_FBS[..., 1] * noise

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        return params_FKS[..., 0], -params_FKS[..., 1].log() - 0.5 * math.log(2 * math.pi)

    def to_logits(self, params: Tensor) -> Tensor:
        return torch.cat([params[..., :1], params[..., 1:].log()], -1)

    def from_logits(self, logits: Tensor) -> Tensor:
        return torch.cat([logits[..., :1], logits[..., 1:].exp().clamp_min(self.min_std)], -1)


@dataclass(frozen=True)
class SoftEvidence(Distribution):
    """A variable with `num_states` states that is seen through log-likelihoods: unit k passes on evidence[..., k].

    `log_prob` then takes evidence of shape (B, D, num_states), log p(e_v | z_v = k), and gradients flow into it;
    queries return states. In `hclt`, a latent with `num_states` states is the variable itself; any other number of
    latent states adds an emission p(z_v | y_v).
    """

    num_states: int
    is_evidence: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.num_states < 1:
            raise ValueError(f"SoftEvidence: num_states must be at least 1, got {self.num_states}")

    @property
    def size(self) -> int:
        return 0

    def check_values(self, values: Tensor) -> None:
        if bool(torch.isnan(values).any()) or bool((values == math.inf).any()):
            raise ValueError("evidence: expects log-likelihoods below +inf, got NaN or +inf")

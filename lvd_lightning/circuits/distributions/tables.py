"""Tables of probabilities: one number per unit and category.

Shapes: F folded nodes, K units, B batch, S categories, N examples, D variables.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import Distribution, check_size, check_whole, is_not_whole, may_ask

__all__ = ["SMALLEST", "Bernoulli", "Categorical"]

#: The smallest positive probability of a category: flow / probability has to stay finite in single precision.
SMALLEST = 1e-30


@dataclass(frozen=True)
class Categorical(Distribution):
    """p(x = c | unit k) = probs[k, c] over the integers 0..num_categories - 1.

    Args:
        num_categories: how many values there are, at least 1. Parameters are probs, (units, num_categories), rows of
            non-negative numbers that sum to one.

    Raises:
        ValueError: num_categories is no such number.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.CircuitGraph()
        >>> _ = graph.add_sum([graph.add_input(0, pc.Categorical(3), 1, params=[[0.5, 0.25, 0.25]])], 1)
        >>> pc.Circuit(graph).log_prob(torch.tensor([[0], [2]])).detach().exp().flatten()
        tensor([0.5000, 0.2500])
    """

    num_categories: int
    is_table: ClassVar[bool] = True
    is_linear: ClassVar[bool] = True
    is_whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_size(self, "num_categories", 1)

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        return cls(**({"num_categories": num_values} | settings))

    @property
    def size(self) -> int:
        return self.num_categories

    @property
    def num_outcomes(self) -> int:
        return self.num_categories

    def probabilities(self, params_FKS: Tensor) -> Tensor:
        return params_FKS

    @property
    def num_free(self) -> int:
        return self.num_categories - 1

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        probs = torch.rand(num_units, self.num_categories, generator=generator) + 0.05
        return probs / probs.sum(1, keepdim=True)

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """How often each value came in each unit, smoothed towards the values of all (0.05 added to each)."""
        size = x_ND.shape[1]
        cell_ND = (torch.arange(size) * num_units + unit_ND) * self.num_categories + x_ND.long()
        weight_M = None if weight_N is None else weight_N.double()[:, None].expand(x_ND.shape).reshape(-1)
        counts_M = torch.bincount(cell_ND.reshape(-1), weight_M, minlength=size * num_units * self.num_categories)
        counts_DKS = counts_M.view(size, num_units, self.num_categories).to(torch.get_default_dtype())
        counts_DKS = counts_DKS if self.prior is None else counts_DKS + self.prior.pseudocounts(counts_DKS)
        marginal_D1S = counts_DKS.sum(1, keepdim=True) + 0.05
        per_unit_DK1 = counts_DKS.sum(-1, keepdim=True).mean(1, keepdim=True)
        params_DKS = counts_DKS + smoothing * per_unit_DK1 * marginal_D1S / marginal_D1S.sum(-1, keepdim=True)
        return params_DKS / params_DKS.sum(-1, keepdim=True)

    def check_params(self, params: Tensor) -> None:
        total = params.sum(-1)
        if bool((params < 0).any()) or not bool(((total - 1).abs() < 1e-3).all()):
            raise ValueError(f"{self}: rows of params must be non-negative and sum to one")

    def check_values(self, values: Tensor) -> None:
        check_whole(values, self.num_categories, self)

    def is_outside(self, values: Tensor) -> Tensor:
        return is_not_whole(values, self.num_categories)

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        if self.num_categories < x_FB.shape[1]:  # the logarithm goes where there are fewer numbers
            self.likelihood(params_FKS.log2(), x_FB, out_FKB)
        else:
            self.likelihood(params_FKS, x_FB, out_FKB)
            out_FKB.log2_()

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        index_FKB = x_FB.long()[:, None].expand(-1, params_FKS.shape[1], -1)
        p_FKB = params_FKS.gather(2, index_FKB)
        is_zero_FKB = p_FKB.detach() == 0  # such a category has no gradient, as in `backward`
        return p_FKB.masked_fill(is_zero_FKB, 1.0).log().masked_fill(is_zero_FKB, -torch.inf)

    def likelihood(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        torch.gather(params_FKS, 2, x_FB.long()[:, None, :].expand(out_FKB.shape), out=out_FKB)

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        index = x_FB.long()[:, None, :].expand(grad_FKB.shape)
        out_FKS.zero_().scatter_add_(2, index, grad_FKB)
        # flow / parameter; where the parameter is 0 the flow is 0 as well, and so is this gradient by convention
        if not may_ask(params_FKS) or float(params_FKS.amin()) < SMALLEST:
            params_FKS = params_FKS.clamp_min(SMALLEST)
        out_FKS.div_(params_FKS)

    def floored(self, params: Tensor) -> Tensor:
        """Positive probabilities of at least `SMALLEST`; zeros stay zeros."""
        low = (params < SMALLEST) & (params > 0)
        return params.masked_fill(low, SMALLEST) if not may_ask(low) or bool(low.any()) else params

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        below_FBS = params_FBS.cumsum(-1, dtype=torch.float64)  # in double precision rare categories keep their share
        total_FB1 = below_FBS[..., -1:]
        drawn_FB1 = torch.rand(total_FB1.shape, dtype=torch.float64, device=params_FBS.device, generator=generator)
        # The first category up to which there is more than what was drawn: never one of probability 0.
        index_FB1 = torch.searchsorted(below_FBS, drawn_FB1 * total_FB1, right=True)
        return index_FB1[..., 0].clamp_max(self.num_categories - 1)

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        value, index = params_FKS.max(-1)
        return index, value.log()

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """Probabilities times factors, normalised."""
        moved = params * factor
        return moved / moved.sum(-1, keepdim=True)

    def to_logits(self, params: Tensor) -> Tensor:
        return params.clamp_min(torch.finfo(params.dtype).tiny).log()

    def from_logits(self, logits: Tensor) -> Tensor:
        return logits.softmax(-1)


@dataclass(frozen=True)
class Bernoulli(Categorical):
    """p(x = 1 | unit k) = probs[k, 1], over 0 and 1: a `Categorical` of two categories.

    Args:
        num_categories: always 2, and need not be given. Parameters are the pairs (1 - p, p), (units, 2).

    Raises:
        ValueError: another number of categories.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=2, leaf=pc.Bernoulli()))
        >>> circuit.num_parameters  # two units of each variable, two transitions of two rows, the root
        11
    """

    num_categories: int = 2

    def __post_init__(self) -> None:
        given: Any = self.num_categories
        if not isinstance(given, Integral) or given != 2:
            raise ValueError(f"Bernoulli: has 2 categories, got num_categories={given}")

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        return cls(**settings)

"""What every family of input distributions can do.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit, T statistics; leading dimensions "..." may be any.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.smooth_prior import SmoothPrior

__all__ = ["Distribution", "check_size", "check_whole", "is_not_whole", "is_number", "may_ask"]


@dataclass(frozen=True)
class Distribution(ABC):
    """A family of univariate distributions; one object describes all units of a node.

    A family is a frozen dataclass whose fields are numbers or strings: nodes fold by its equality, and files keep its
    fields. One that is neither a table nor evidence learns from sums of functions of x and says which: it sets
    `num_statistics` and has `statistics`, `expected` and `maximise`.

    Parameters of a node are one tensor of shape (num_units, size). Nodes of one circuit may be of different families,
    soft evidence apart. They read one tensor x of one type: whole numbers in any integer type if all families are over
    whole numbers, else floating point numbers, of which float32 holds whole numbers up to 2^24 exactly (float16 only up
    to 2048, bfloat16 up to 256).

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> pc.Categorical(3) == pc.Categorical(3)  # nodes of equal families are computed together
        True
        >>> pc.Categorical(3).initial(num_units=2).shape, pc.Categorical(3).num_free
        (torch.Size([2, 3]), 2)
    """

    #: Rows of parameters are probabilities: the M-step is "normalise the flows".
    is_table: ClassVar[bool] = False
    #: p(x) is a probability, which `likelihood` writes: circuits can do without logarithms. Tables are linear.
    is_linear: ClassVar[bool] = False
    #: Values are log-likelihood vectors rather than numbers.
    is_evidence: ClassVar[bool] = False
    #: Parameters say what the units are: nothing trains them.
    is_fixed: ClassVar[bool] = False
    #: Values are whole numbers.
    is_whole: ClassVar[bool] = False
    #: log p(x) has a derivative in x, which `log_prob` lets through.
    is_smooth: ClassVar[bool] = False
    #: T, how many sums EM needs: the flow, and those of T - 1 functions of x. 0 for tables: gradients say it all.
    num_statistics: ClassVar[int] = 0

    def __init_subclass__(cls, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if cls.is_table or cls.is_evidence or cls.forward is Distribution.forward:
            return
        lacking = [name for name in _STATISTICS if getattr(cls, name) is getattr(Distribution, name)]
        if cls.num_statistics < 2 or lacking:
            missing = "num_statistics of 2 or more" if cls.num_statistics < 2 else lacking[0]
            raise TypeError(f"{cls.__name__}: a family that is no table learns from statistics, but it lacks {missing}")

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers stored per unit."""

    @property
    def num_free(self) -> int:
        """Free parameters per unit."""
        return self.size

    @property
    def num_outcomes(self) -> int | None:
        """How many values there are, which are 0, 1, ... then; None: no list holds them."""
        return None

    @property
    def prior(self) -> SmoothPrior | None:
        """What EM adds to the flows of this table before it normalises them; None: nothing."""
        return None

    @abstractmethod
    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Random parameters, shape (num_units, size)."""

    @abstractmethod
    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        """First parameters of D variables, (D, num_units, size), from examples whose units are known, on the CPU.

        x_ND: their values, of any type.
        unit_ND: int64, the unit of each value, 0..num_units - 1.
        weight_N: how much each example counts, not negative; 1 by default.
        smoothing: how much of all values of the variable a unit gets besides its own: tables as a share of what units
            have on average, families of few numbers as a number of examples. Positive, so that units without values
            have parameters too.
        """

    @classmethod
    def for_values(cls, num_values: int | None, **settings: Any) -> Distribution:
        """The member of this family for a variable with the values 0..num_values - 1, or any real values (None).

        settings: fields of the family. Those that depend on the number of values need not be given.
        """
        return cls(**settings)

    def check_params(self, params: Tensor) -> None:  # noqa: B027 (nothing to check is the default)
        """Raise a ValueError if `params` are no parameters of this family."""

    def check_values(self, values: Tensor) -> None:  # noqa: B027 (a support without bounds is the default)
        """Raise a ValueError if `values` (any shape) lie outside the support."""

    def is_outside(self, values: Tensor) -> Tensor:
        """What `check_values` asks, as a bool tensor () that stays on the device."""
        return torch.zeros((), dtype=torch.bool, device=values.device)

    def floored(self, params: Tensor) -> Tensor:
        """Parameters in the range in which gradients are finite."""
        return params

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums that EM needs beyond the gradient, float64 (F, K, T); the first is the flow."""
        raise TypeError(f"{type(self).__name__} has none")

    def expected(self, params: Tensor) -> Tensor:
        """What the functions of x behind `statistics` are on average under `params` (..., S): float64 (..., T - 1)."""
        raise TypeError(f"{type(self).__name__} has no statistics")

    def maximise(self, expected: Tensor) -> Tensor:
        """The parameters (..., S) of largest likelihood where these functions have the means `expected`, float64."""
        raise TypeError(f"{type(self).__name__} has no statistics")

    def probabilities(self, params_FKS: Tensor) -> Tensor:
        """p(value | unit) of all `num_outcomes` values, shape (F, K, values)."""
        if self.num_outcomes is None:
            raise TypeError(f"{type(self).__name__} has no list of values")
        values_FB = torch.arange(self.num_outcomes, device=params_FKS.device).expand(len(params_FKS), -1)
        out_FKB = params_FKS.new_empty(*params_FKS.shape[:2], self.num_outcomes)
        self.forward(params_FKS, values_FB, out_FKB)
        return out_FKB.exp2_()

    @abstractmethod
    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        """Write log2 p(x | unit) to `out_FKB`."""

    @abstractmethod
    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        """log p(x | unit) in nats, (F, K, B): out of place and differentiable, for the reference pass."""

    def likelihood(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        """Write p(x | unit) to `out_FKB`; linear families only."""
        raise TypeError(f"{type(self).__name__} is not linear")

    @abstractmethod
    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        """Write the gradient for the parameters to `out_FKS`, given that for the log-likelihoods."""

    @abstractmethod
    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw one value for each row of parameters, shape (F, B)."""

    @abstractmethod
    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely value of every unit and its log-likelihood, both of shape (F, K)."""

    def perturbed(self, params: Tensor, factor: Tensor) -> Tensor:
        """Parameters of copies that growth makes: `params` (N, S) under random factors of the same shape around 1."""
        return self.from_logits(self.to_logits(params) + factor.log())

    @abstractmethod
    def to_logits(self, params: Tensor) -> Tensor:
        """Unconstrained coordinates for gradient optimizers."""

    @abstractmethod
    def from_logits(self, logits: Tensor) -> Tensor:
        """Inverse of `to_logits`, differentiable."""


#: What EM asks of a family with statistics.
_STATISTICS = ("statistics", "expected", "maximise")


def is_number(value: Any) -> bool:
    """Whether this is a real number, of Python or of an array."""
    return isinstance(value, Real)


def check_size(family: Distribution, name: str, least: int) -> None:
    """Raise a ValueError unless the field `name` of a family is a whole number of at least `least`."""
    value: Any = getattr(family, name)
    try:
        fits = not isinstance(value, bool) and operator.index(value) >= least
    except TypeError:
        fits = False
    if not fits:
        kind = type(family).__name__
        raise ValueError(f"{kind}: {name}: got {repr(value)[:80]}, expected a whole number of at least {least}")


def may_ask(tensor: Tensor) -> bool:
    """Whether the host may look at numbers to save work: on an accelerator it would wait for all work before them."""
    return tensor.device.type == "cpu"


def is_not_whole(values: Tensor, num_values: int) -> Tensor:
    """Whether some of `values` are no whole numbers 0..num_values - 1: a bool tensor ()."""
    bad = (values < 0) | (values >= num_values)
    if values.is_floating_point():
        bad |= values != values.round()
    return bad.any()


def check_whole(values: Tensor, num_values: int, family: Distribution) -> None:
    """Raise a ValueError unless `values` are whole numbers 0..num_values - 1."""
    if values.numel() == 0:
        return
    if values.is_floating_point() and not bool((values == values.round()).all()):
        raise ValueError(f"x: {family} expects whole numbers, got a fraction or NaN")
    low, high = (float(bound) for bound in values.aminmax())
    if low < 0 or high >= num_values:
        bad = low if low < 0 else high
        raise ValueError(f"x: {family} expects values in 0..{num_values - 1}, got {bad:.0f}")

"""In which unit the likelihood of data is told: bits per dimension, perplexity, nats."""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import ClassVar, TypeVar

from torch import Tensor

__all__ = ["BitsPerDimension", "Nats", "Perplexity", "Unit"]

Number = TypeVar("Number", float, Tensor)


class Unit(abc.ABC):
    """How a mean log-likelihood is told to people and scripts.

    name: stands in the names of metrics (`val/bpd`), of figures (`val_bpd`) and in tables.
    title: the name written out, for axes.
    lower_is_better: whether a better model has a smaller number.
    uniform: what a model reaches that knows nothing; None if there is no such model.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    lower_is_better: ClassVar[bool]
    uniform: float | None

    @abc.abstractmethod
    def from_nats(self, nats: Number, num_dims: int, num_examples: float | Tensor = 1) -> Number:
        """The number for `nats`, the sum of the log-likelihoods of `num_examples` of `num_dims` dimensions each."""

    @property
    def label(self) -> str:
        """The name as tables show it."""
        return self.name

    @property
    def mode(self) -> str:
        """ "min" or "max", as checkpoints and schedulers want it."""
        return "min" if self.lower_is_better else "max"

    def is_worse_than_uniform(self, value: float) -> bool:
        """Whether a model that knows nothing would do better."""
        if self.uniform is None:
            return False
        return value > self.uniform if self.lower_is_better else value < self.uniform


@dataclass(frozen=True)
class BitsPerDimension(Unit):
    """-log2 p(x) / D, over all D dimensions of an example.

    Args:
        uniform: of a uniform distribution: log2 of the number of values, on average over the dimensions.

    Example:
        >>> BitsPerDimension().from_nats(-8 * math.log(2.0), num_dims=4)
        2.0
    """

    name: ClassVar[str] = "bpd"
    title: ClassVar[str] = "bits per dimension"
    lower_is_better: ClassVar[bool] = True
    uniform: float | None = 8.0

    def from_nats(self, nats: Number, num_dims: int, num_examples: float | Tensor = 1) -> Number:
        value: Number = -nats / (num_examples * num_dims * math.log(2.0))  # type: ignore[assignment]
        return value


@dataclass(frozen=True)
class Perplexity(Unit):
    """exp(-log p(x) / D), D tokens an example.

    Args:
        uniform: the size of the vocabulary.

    Example:
        >>> round(Perplexity(100).from_nats(-2 * math.log(5.0), num_dims=2), 9)
        5.0
    """

    name: ClassVar[str] = "ppl"
    title: ClassVar[str] = "perplexity"
    lower_is_better: ClassVar[bool] = True
    uniform: float | None = None

    def from_nats(self, nats: Number, num_dims: int, num_examples: float | Tensor = 1) -> Number:
        mean = -nats / (num_examples * num_dims)
        value: Number = mean.exp() if isinstance(mean, Tensor) else math.exp(mean)  # type: ignore[assignment]
        return value


@dataclass(frozen=True)
class Nats(Unit):
    """log p(x) of an example in nats: of a probability, or of a density.

    Args:
        uniform: of a uniform distribution, if there is one.
        is_density: whether log p is that of a density, which is no number of bits; said beside the figures.

    Example:
        >>> Nats().from_nats(-12.0, num_dims=3, num_examples=2)
        -6.0
    """

    name: ClassVar[str] = "nats"
    title: ClassVar[str] = "nats per example"
    lower_is_better: ClassVar[bool] = False
    uniform: float | None = None
    is_density: bool = False

    @property
    def label(self) -> str:
        return "nats (density)" if self.is_density else self.name

    def from_nats(self, nats: Number, num_dims: int, num_examples: float | Tensor = 1) -> Number:
        value: Number = nats / num_examples  # type: ignore[assignment]
        return value

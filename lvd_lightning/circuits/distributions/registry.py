"""The families that files may name: loading a circuit runs no code from its file, so new families are told in code."""

from __future__ import annotations

import dataclasses
import inspect
from typing import TypeVar

from lvd_lightning.circuits.distributions.base import Distribution
from lvd_lightning.circuits.distributions.binomial import Binomial
from lvd_lightning.circuits.distributions.discretized_gaussian import DiscretizedGaussian
from lvd_lightning.circuits.distributions.evidence import SoftEvidence
from lvd_lightning.circuits.distributions.gaussian import Gaussian
from lvd_lightning.circuits.distributions.indicator import Indicator
from lvd_lightning.circuits.distributions.logistic import DiscretizedLogistic
from lvd_lightning.circuits.distributions.ordered import OrderedCategorical
from lvd_lightning.circuits.distributions.tables import Bernoulli, Categorical

__all__ = ["check_registered", "find_distribution", "register_distribution"]

Family = TypeVar("Family", bound=type[Distribution])

_KNOWN: dict[str, type[Distribution]] = {
    found.__name__: found
    for found in (
        *(Bernoulli, Binomial, Categorical, DiscretizedGaussian, DiscretizedLogistic, Gaussian, Indicator),
        *(OrderedCategorical, SoftEvidence),
    )
}


def register_distribution(family: Family) -> Family:
    """Let files name a family, by the name of its class; a decorator for the class.

    Call it where the class is defined, and import that module before circuits with the family are saved or loaded. The
    class may be defined anew (in a notebook, say) under its name and module; then the last one counts.

    Raises:
        ValueError: no family that can be made, or one whose name another family has.

    Example:
        >>> from dataclasses import dataclass
        >>> import lvd_lightning.circuits as pc
        >>> @pc.register_distribution
        ... @dataclass(frozen=True)
        ... class Die(pc.Categorical):
        ...     num_categories: int = 6
        >>> Die()
        Die(num_categories=6)
    """
    if not (inspect.isclass(family) and issubclass(family, Distribution) and dataclasses.is_dataclass(family)):
        raise ValueError(f"register_distribution: got {family!r}, expected a dataclass derived from Distribution")
    if inspect.isabstract(family):
        lacking = ", ".join(sorted(family.__abstractmethods__))
        raise ValueError(f"register_distribution: {family.__name__} is abstract, it lacks {lacking}")
    known = _KNOWN.get(family.__name__, family)
    if (known.__module__, known.__qualname__) != (family.__module__, family.__qualname__):
        raise ValueError(
            f"register_distribution: there is a family {family.__name__} in {known.__module__} already; files tell "
            "families by their names: choose another"
        )
    _KNOWN[family.__name__] = family
    return family


def check_registered(distribution: Distribution) -> None:
    """Raise a ValueError if a file that named this family could not be loaded."""
    name = type(distribution).__name__
    if _KNOWN.get(name) is not type(distribution):
        raise ValueError(f"{name} is no family that files may name: call register_distribution({name}) first")


def find_distribution(name: str) -> type[Distribution]:
    """The family of this name.

    Raises:
        ValueError: none has been registered under it.
    """
    if name not in _KNOWN:
        raise ValueError(
            f"the distribution {str(name)[:40]!r} is unknown, expected one of {', '.join(sorted(_KNOWN))}; a family of "
            "your own is made known by register_distribution"
        )
    return _KNOWN[name]

"""Which input distributions circuits have: those of the data, or the family that a config names in their place."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.distributions import find_distribution
from lvd_lightning.models.structures import Leaf

__all__ = ["LeafChoice"]


class LeafChoice:
    """A family of input distributions for all variables, from a config; None leaves the data's own.

    given: {"class_path": ..., "init_args": {...}}, or the class path alone: that of a class anywhere, or the name of a
        registered one. Arguments that follow from the number of values need not be given. A density over whole numbers
        is integrated over their bins (Gaussian) or refused.

    Raises:
        ValueError: no such family, or settings that it has not.
    """

    def __init__(self, given: str | Mapping[str, Any] | None) -> None:
        self.family: type[pc.Distribution] | None = None
        self.settings: dict[str, Any] = {}
        if given is None:
            return
        named: dict[str, Any] = {"class_path": given} if isinstance(given, str) else {**given}
        unknown = [name for name in named if name not in ("class_path", "init_args")]
        if unknown or "class_path" not in named:
            raise ValueError(f"leaf: expected class_path and perhaps init_args, got {given!r}")
        self.family = _find(str(named["class_path"]))
        self.settings = dict(named.get("init_args") or {})
        known = [field.name for field in dataclasses.fields(self.family)]
        wrong = [name for name in self.settings if name not in known]
        if wrong:
            raise ValueError(
                f"leaf: {self.family.__name__} has no setting {wrong[0]!r}; its settings are: {', '.join(known)}"
            )

    def over(self, default: Leaf) -> Leaf:
        """The distributions of variables that have, in the data, the distributions `default`.

        Raises:
            ValueError: the family does not fit the values of a variable.
        """
        if self.family is None:
            return default
        if isinstance(default, pc.Distribution):
            return self._over_one(default)
        return [self._over_one(one) for one in default]

    def _over_one(self, default: pc.Distribution) -> pc.Distribution:
        assert self.family is not None
        name, number = self.family.__name__, default.num_outcomes
        if number is None:
            if self.family.is_whole:
                raise ValueError(f"leaf: {name} is over whole numbers, but the data are real numbers: try Gaussian")
            return self.family.for_values(None, **self.settings)
        try:
            found = self.family.for_values(number, **self.settings)
        except ValueError as error:
            raise ValueError(f"leaf: {error}") from error
        if not found.is_whole:
            raise ValueError(
                f"leaf: {name} is a density, but the data are the whole numbers 0..{number - 1}, whose likelihood is a "
                "probability: try Gaussian, which is integrated over the values, or DiscretizedLogistic"
            )
        if found.num_outcomes is not None and found.num_outcomes < number:
            raise ValueError(
                f"leaf: {found} has {found.num_outcomes} values, but the data have {number}: 0..{number - 1}"
            )
        return found


def _find(path: str) -> type[pc.Distribution]:
    """The class of a path, or the registered one of a name."""
    module, _, name = path.rpartition(".")
    if not module:
        try:
            return _checked(path, find_distribution(name))
        except ValueError as error:
            raise ValueError(f"leaf: {error}") from error
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"leaf: no class {path!r}: {error}") from error
    return _checked(path, found)


def _checked(path: str, found: Any) -> type[pc.Distribution]:
    is_family = inspect.isclass(found) and issubclass(found, pc.Distribution) and not inspect.isabstract(found)
    if not is_family or found.is_evidence or found.is_fixed:
        raise ValueError(f"leaf: {path} is no family of input distributions, such as lvd_lightning.circuits.Binomial")
    kind: type[pc.Distribution] = found
    return kind

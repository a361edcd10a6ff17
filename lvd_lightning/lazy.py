"""Packages whose names are imported when they are first asked for, with the libraries that they need."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

__all__ = ["lazy_names"]


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        homes: the module in it where each name stands.

    Example:
        >>> from lvd_lightning.lazy import lazy_names
        >>> find, names = lazy_names("lvd_lightning", {"derive_seed": "seeds"})
        >>> find("derive_seed")(0, "order"), names()
        (4054459839, ['derive_seed'])
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{homes[name]}"), name)

    return find, lambda: sorted(homes)

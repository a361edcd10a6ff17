"""Objects of the classes that a configuration names."""

from argparse import ArgumentError
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

from jsonargparse import ArgumentParser

__all__ = ["class_of", "make", "merge", "parsed", "subclass_parser"]

T = TypeVar("T")


def class_of(class_path: str, base: type[T]) -> type[T]:
    """The class at an import path.

    Raises:
        ValueError: there is nothing, or no subclass of `base`.
    """
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"class_path {class_path!r} cannot be imported: {error}") from error
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"class_path {class_path!r} is no {base.__name__}")
    return found


def make(kind: type, config: Mapping[str, Any]) -> Any:
    """Make an object of a class or subclass of `kind` from {class_path, init_args}."""
    parser = subclass_parser(kind)
    return parser.instantiate(parsed(parser, {"object": config})).object


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings key by key, all else replaced; another class brings its own arguments."""
    if not isinstance(base, Mapping) or not isinstance(over, Mapping):
        return over
    if "class_path" in over and over["class_path"] != base.get("class_path"):
        return dict(over)
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}


@cache
def subclass_parser(kind: type) -> ArgumentParser:
    """A parser of {"object": {class_path, init_args}} for subclasses of `kind`."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(kind, "object", fail_untyped=False, required=True)
    return parser


def parsed(parser: ArgumentParser, values: Mapping[str, Any], where: str = "") -> Any:
    """The values as the parser takes them; a ValueError that begins with `where` if it does not."""
    try:
        return parser.parse_object(deepcopy(dict(values)))  # it turns nested values into its own, in place
    except ArgumentError as error:
        raise ValueError(f"{where}{error}") from error

"""YAML of users: plain values alone, of a size that its file explains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["plain_yaml"]

#: Values that a file may stand for, its references written out: a few lines of references to references are billions.
MOST_VALUES = 1 << 20


def plain_yaml(path: Path) -> Any:
    """The values in a YAML file; no tag makes an object of Python.

    Raises:
        yaml.YAMLError: it is no YAML, or has such tags.
        ValueError: it is no text, nested too deeply, refers to itself, or its references stand for too many values.
    """
    try:
        found = yaml.safe_load(path.read_text())
        count = _count(found, {})
    except RecursionError as error:
        raise ValueError(f"{path}: is nested too deeply for a configuration") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is no text in UTF-8 ({error}), expected YAML") from error
    if count > MOST_VALUES:
        raise ValueError(f"{path}: its references stand for more than {MOST_VALUES:,} values, expected a configuration")
    return found


def _count(value: Any, counts: dict[int, int]) -> int:
    """How many values a value has in it; each collection is counted once, and one that is within itself without end."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in counts:
        counts[id(value)] = MOST_VALUES + 1  # until it is known, which it never is within itself
        items = value if isinstance(value, list) else [*value.keys(), *value.values()]
        counts[id(value)] = 1 + sum(_count(item, counts) for item in items)
    return counts[id(value)]

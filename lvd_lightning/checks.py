"""Checks of settings, in one phrasing: "name: got X, expected Y". None is a setting that was left away, and passes."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

__all__ = ["check_above", "check_at_least", "check_between", "check_choice", "check_counts", "check_share", "expect"]


def expect(holds: bool, name: str, value: Any, expected: str) -> None:
    """Raise a ValueError unless `holds`: what came for the setting `name`, and what was expected.

    Example:
        >>> expect(False, "lr", 2.0, "at most 1")
        Traceback (most recent call last):
        ValueError: lr: got 2.0, expected at most 1
    """
    if not holds:
        raise ValueError(f"{name}: got {value!r}, expected {expected}")


def check_counts(**settings: Any) -> None:
    """Raise a ValueError for the first setting that is no whole number of at least 1."""
    for name, value in settings.items():
        is_whole = isinstance(value, Integral) and not isinstance(value, bool)
        expect(value is None or (is_whole and value >= 1), name, value, "a whole number of at least 1")


def check_at_least(least: float, **settings: float | None) -> None:
    """Raise a ValueError for the first setting that is a number below `least` (or NaN)."""
    for name, value in settings.items():
        expect(value is None or value >= least, name, value, f"at least {least}")


def check_above(bound: float, **settings: float | None) -> None:
    """Raise a ValueError for the first setting that is not above `bound`."""
    for name, value in settings.items():
        expect(value is None or value > bound, name, value, f"more than {bound}")


def check_between(low: float, high: float, **settings: float | None) -> None:
    """Raise a ValueError for the first setting that is not in [low, high]."""
    for name, value in settings.items():
        expect(value is None or low <= value <= high, name, value, f"{low} to {high}")


def check_share(**settings: float | None) -> None:
    """Raise a ValueError for the first setting that is no share of a whole, in [0, 1)."""
    for name, value in settings.items():
        expect(value is None or 0 <= value < 1, name, value, "at least 0 and less than 1")


def check_choice(choices: Iterable[str], **settings: str | None) -> None:
    """Raise a ValueError for the first setting that is none of `choices`."""
    known = list(choices)
    for name, value in settings.items():
        expect(value is None or value in known, name, value, f"one of {', '.join(known)}")

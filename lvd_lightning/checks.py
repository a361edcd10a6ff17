"""Checks of settings: a ValueError names the setting, what came and what was expected."""

__all__ = ["check_at_least"]


def check_at_least(least: float, **settings: float | None) -> None:
    """Raise a ValueError for the first setting that is a number below `least` (or NaN)."""
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")

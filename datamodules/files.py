"""Paths that users give, and what to say when something is missing there."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["require", "resolve"]


def resolve(path: str) -> Path:
    """The path with `~` expanded, made absolute."""
    return Path(path).expanduser().absolute()


def require(files: Sequence[Path], expected: str) -> None:
    """Raise one FileNotFoundError that lists the missing files and what is expected.

    Args:
        files: the files that have to exist.
        expected: the layout and where to get the data, for the message.
    """
    missing = [file for file in files if not file.is_file()]
    if missing:
        names = ", ".join(str(file) for file in missing[:3]) + (f" and {len(missing) - 3} more" * (len(missing) > 3))
        raise FileNotFoundError(f"missing: {names}\n{expected}")

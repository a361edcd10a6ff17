"""How far a command is: a bar on a terminal, nothing elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

__all__ = ["tracked"]

Item = TypeVar("Item")


def tracked(items: Iterable[Item], what: str, total: int) -> Iterator[Item]:
    """The items, with a bar on standard error while they are gone through."""
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(items, what, total=total, console=Console(stderr=True), transient=True)

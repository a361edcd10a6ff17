"""Which head grew from which: a tree of heads for every circuit.

Shapes: G circuits, H heads.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lvd_lightning.files import unreadable, write_atomically

__all__ = ["HEADS_FILE", "Ancestry", "Head"]

#: What a stage whose circuits have several heads leaves beside them.
HEADS_FILE = "heads.csv"
_COLUMNS = ("circuit", "head", "grew_from", "epoch", "patches")


@dataclass(frozen=True)
class Head:
    """A head of a circuit.

    parent: the head that it is a copy of; None for those that the circuit began with.
    epoch: counted from 0, at whose start it was copied; 0 for the first ones.
    """

    parent: int | None
    epoch: int


@dataclass(frozen=True)
class Ancestry:
    """The heads of every circuit in their order; copies follow the heads that were there before them.

    Example:
        >>> ancestry = Ancestry.first([1, 2]).grown([[0], []], epoch=4).grown([[1, 0], []], epoch=8)
        >>> [head.parent for head in ancestry.heads[0]], [head.epoch for head in ancestry.heads[0]]
        ([None, 0, 1, 0], [0, 4, 8, 8])
        >>> ancestry.depths(0)  # how often each was copied
        [0, 1, 2, 1]
    """

    heads: tuple[tuple[Head, ...], ...]

    @classmethod
    def first(cls, num_heads: Sequence[int]) -> Ancestry:
        """That of circuits which did not grow yet."""
        return cls(tuple((Head(None, 0),) * count for count in num_heads))

    @property
    def num_heads(self) -> list[int]:
        return [len(heads) for heads in self.heads]

    def grown(self, copied: Sequence[Sequence[int]], epoch: int) -> Ancestry:
        """After a copy of each of `copied`, the heads that grow in every circuit; the order is that of the list."""
        return Ancestry(
            tuple((*heads, *(Head(h, epoch) for h in new)) for heads, new in zip(self.heads, copied, strict=True))
        )

    def depths(self, circuit: int) -> list[int]:
        """How many copies lie between each head of a circuit and the one that its line began with."""
        found: list[int] = []
        for head in self.heads[circuit]:
            found.append(0 if head.parent is None else found[head.parent] + 1)
        return found

    def ordered(self, circuit: int) -> list[int]:
        """The heads of a circuit, each followed by those that grew from it, the latest first: no two lines cross."""
        heads, found = self.heads[circuit], []
        below: dict[int | None, list[int]] = {}
        for number, head in enumerate(heads):
            below.setdefault(head.parent, []).append(number)
        waiting = list(reversed(below.get(None, [])))
        while waiting:
            number = waiting.pop()
            found.append(number)
            waiting += below.get(number, [])
        return found

    def plain(self) -> list[list[list[int]]]:
        """Plain values for a checkpoint: of every head its parent, -1 without one, and its epoch."""
        return [[[-1 if head.parent is None else head.parent, head.epoch] for head in heads] for heads in self.heads]

    @classmethod
    def of_plain(cls, values: Any) -> Ancestry:
        """The inverse of `plain`."""
        return cls(
            tuple(tuple(Head(None if parent < 0 else parent, epoch) for parent, epoch in heads) for heads in values)
        )

    def write(self, folder: Path, patches: Sequence[Sequence[int]]) -> None:
        """Write `heads.csv`; patches: how many training patches every head of every circuit has."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for g, heads in enumerate(self.heads):
            for h, head in enumerate(heads):
                parent = "" if head.parent is None else head.parent
                writer.writerow((g, h, parent, head.epoch, int(patches[g][h])))
        write_atomically(folder / HEADS_FILE, text.getvalue())

    @classmethod
    def read(cls, folder: Path) -> tuple[Ancestry, list[list[int]]] | None:
        """What `write` left in a folder, and the numbers of patches; None where there is no such file.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / HEADS_FILE
        if not path.is_file():
            return None
        heads: list[list[Head]] = []
        patches: list[list[int]] = []
        try:
            rows = list(csv.reader(io.StringIO(path.read_text())))
            if tuple(rows[0]) != _COLUMNS:
                raise ValueError(f"its columns are {', '.join(rows[0])}, expected {', '.join(_COLUMNS)}")
            for circuit, number, parent, epoch, count in rows[1:]:
                if int(circuit) == len(heads):
                    heads.append([])
                    patches.append([])
                place = (int(circuit), int(number))
                if place != (len(heads) - 1, len(heads[-1])) or not (parent == "" or 0 <= int(parent) < place[1]):
                    raise ValueError(f"circuit {circuit}, head {number}: is out of order, or grew from a later one")
                heads[-1].append(Head(None if parent == "" else int(parent), int(epoch)))
                patches[-1].append(int(count))
        except (ValueError, IndexError, csv.Error) as error:
            raise unreadable(path, error) from error
        return cls(tuple(map(tuple, heads))), patches

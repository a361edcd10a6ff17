"""How fast stages have been found to be: measured in finished runs, kept in a file, never guessed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lvd_lightning.files import write_atomically
from lvd_lightning.planning import StagePlan

__all__ = ["Rates"]

_KEYS = ("measured_on", "bandwidth_gb_per_second", "work_per_second")


@dataclass(frozen=True)
class Rates:
    """Work of one rank in a second, by the classes of stages, in each one's own measure (`StagePlan.work_is`).

    measured_on: in words. bandwidth: bytes in a second at which a rank takes part in an all-reduce; None: unknown.

    Example:
        >>> plan = StagePlan(epochs=1, steps_per_epoch=10, sent_per_step=1_000_000, work=3600e6)
        >>> rates = Rates("one core", 1e9, {"PriorStudent": 1e6})
        >>> f"{rates.seconds('PriorStudent', plan, 2):.2f}"  # 1,800 s of work, and 10 MB to send
        '1800.01'
        >>> rates.seconds("MAETeacher", plan, 2) is None  # nobody has measured it
        True
    """

    measured_on: str = "none, see --rates"
    bandwidth: float | None = None
    work_per_second: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, kind: str, plan: StagePlan | None, num_ranks: int) -> float | None:
        """What a stage of this class takes on so many ranks; None where its rate or its work is unknown.

        Work is divided over ranks; an all-reduce passes 2 (R - 1) / R times its bytes through every rank. Neither waits
        for the other, nor does a rank wait for a slower one.
        """
        if plan is None or plan.work is None:
            return None
        if plan.work == 0:
            return 0.0
        rate = self.work_per_second.get(kind)
        if rate is None or (plan.sent and self.bandwidth is None):
            return None
        return plan.work / (rate * num_ranks) + (self.sending_seconds(plan, num_ranks) or 0.0)

    def sending_seconds(self, plan: StagePlan, num_ranks: int) -> float | None:
        """What the messages of all steps take by themselves; None without a bandwidth."""
        if self.bandwidth is None:
            return None
        return 2 * (num_ranks - 1) / num_ranks * plan.sent / self.bandwidth

    @classmethod
    def read(cls, path: Path) -> Rates:
        """From a file of YAML.

        Raises:
            ValueError: there is none, or it is no table of rates.
        """
        if not path.is_file():
            raise ValueError(f"--rates {path}: there is no such file; --write_rates writes one from a finished run")
        try:
            found = yaml.safe_load(path.read_text())
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"--rates {path}: is no YAML ({error})") from error
        expected = f"--rates {path}: expected a mapping with {', '.join(_KEYS)}"
        if not isinstance(found, Mapping) or not isinstance(found.get("work_per_second"), Mapping):
            raise ValueError(f"{expected}, got {found!r}")
        unknown = [key for key in found if key not in _KEYS]
        if unknown:
            raise ValueError(f"{expected}, got {unknown[0]!r}")
        given = {"bandwidth_gb_per_second": found.get("bandwidth_gb_per_second"), **found["work_per_second"]}
        rates = {str(name): _number(value, f"--rates {path}: {name}") for name, value in given.items() if value}
        bandwidth = rates.pop("bandwidth_gb_per_second", None)
        return cls(str(found.get("measured_on", path)), None if bandwidth is None else 1e9 * bandwidth, rates)

    def write(self, path: Path) -> None:
        """Write a file for `read`."""
        bandwidth = None if self.bandwidth is None else self.bandwidth / 1e9
        content = dict(zip(_KEYS, (self.measured_on, bandwidth, dict(self.work_per_second)), strict=True))
        write_atomically(path, yaml.safe_dump(content, sort_keys=False))

    @classmethod
    def measured(
        cls, measured_on: str, stages: Iterable[tuple[str, StagePlan | None, float | None]], num_ranks: int
    ) -> Rates:
        """From the seconds of finished stages: their classes, plans and seconds; a later stage of a class counts.

        What waiting for messages took is part of these seconds.
        """
        found = {
            kind: plan.work / seconds / num_ranks
            for kind, plan, seconds in stages
            if plan is not None and plan.work and seconds
        }
        return cls(measured_on, None, found)


def _number(value: Any, name: str) -> float:
    """A number above 0; YAML takes 1e9 for text."""
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if isinstance(value, bool) or not (0 < found < math.inf):
        raise ValueError(f"{name}: got {value!r}, expected a number above 0")
    return found

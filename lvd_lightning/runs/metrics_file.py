"""metrics.csv: what a stage logs, a row per call, over all its interruptions."""

import csv
import io
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from lvd_lightning.files import unreadable, write_atomically

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile(Logger):
    """A logger that writes metrics.csv: columns epoch, step, seconds, then one per metric; one row per log call.

    Unlike Lightning's CSVLogger, which begins the file again, it goes on where an earlier process stopped. Call `keep`
    when training continues after some epoch, so that what was logged beyond it is not there twice.
    """

    _FIRST = ("epoch", "step", "seconds")

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        super().__init__()
        self.path = path
        self.clock = clock
        self._columns: list[str] | None = None

    @property
    @override
    def name(self) -> str:
        return self.path.parent.name

    @property
    @override
    def version(self) -> str:
        return ""

    @property
    @override
    def save_dir(self) -> str:
        return str(self.path.parent)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """The stage's config.yaml has them."""

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        row = {"step": step, "seconds": round(self.clock(), 3), **metrics}
        if self._columns is None:
            self._columns = _header(self.path)
        new = [name for name in (*self._FIRST, *metrics) if name not in self._columns]
        if new:
            self._write(read_metrics(self.path), [*self._columns, *new])
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerow(row)

    @rank_zero_only
    def keep(self, last_epoch: int, step: int | None = None) -> None:
        """Drop the rows of epochs after `last_epoch` (0-based; -1 drops all).

        step: of the next epoch the rows up to this optimizer step stay, where it is gone on with from there.
        """
        rows = [row for row in read_metrics(self.path) if row.get("epoch") and _is_kept(row, last_epoch, step)]
        self._write(rows, _header(self.path) or list(self._FIRST))

    def _write(self, rows: list[dict[str, str]], columns: list[str]) -> None:
        self._columns = columns
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns)
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv; a last line that a dying process left unfinished is not one of them."""
    if not path.is_file():
        return []
    try:
        text = path.read_text()
        complete = text[: text.rfind("\n") + 1]
        return [row for row in csv.DictReader(complete.splitlines()) if None not in row.values()]
    except (ValueError, csv.Error) as error:
        raise unreadable(path, error) from error


def _is_kept(row: Mapping[str, str], last_epoch: int, step: int | None) -> bool:
    epoch = float(row["epoch"])
    return epoch <= last_epoch or (step is not None and epoch == last_epoch + 1 and float(row["step"] or 0) <= step)


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])

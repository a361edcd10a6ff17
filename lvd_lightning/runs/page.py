"""The report as one page for a browser: table, curves, stages and pictures in a single file that loads nothing else."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lvd_lightning.files import write_atomically
from lvd_lightning.runs.metrics_file import read_metrics
from lvd_lightning.runs.run import Run

__all__ = ["PAGE", "write_page"]

PAGE = "index.html"
_NO_METRICS = ("epoch", "step", "seconds")


def write_page(
    run: Run,
    folder: Path,
    facts: str,
    unit: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    pictures: Mapping[str, str],
) -> Path:
    """Write `index.html` into the folder of the report.

    Args:
        run: its stages have figures and curves.
        folder: where the pictures are.
        facts: a line under the title.
        unit: the name that likelihoods end with; their curves are shown first.
        columns, rows: the table of models.
        pictures: titles by the names of files; those that are there are put into the page.

    Returns:
        The file.
    """
    finished = [stage for stage in run.stages if stage.is_finished]
    stages = [
        [
            stage.name,
            f"{figures.pop('seconds', 0.0):,.0f}",
            ", ".join(f"{key} {_number(figures[key])}" for key in figures),
        ]
        for stage in finished
        for figures in [stage.figures()]
    ]
    metrics = {stage.name: _series(stage.folder / "metrics.csv") for stage in finished}
    parts = {
        "title": html.escape(run.dir.name),
        "facts": html.escape(facts),
        "unit": html.escape(unit),
        "models": _table(columns, rows),
        "stages": _table(["stage", "seconds", "figures"], stages),
        "pictures": "\n".join(_picture(folder / file, title) for file, title in pictures.items()),
        "metrics": json.dumps({name: found for name, found in metrics.items() if found}).replace("<", "\\u003c"),
    }
    page = files("lvd_lightning.runs").joinpath("page.html").read_text(encoding="utf-8")
    for name, content in parts.items():
        page = page.replace(f"@{name}@", content)
    write_atomically(folder / PAGE, page)
    return folder / PAGE


def _series(path: Path) -> dict[str, list[tuple[float, float, int]]]:
    """(seconds, value, epoch) of every metric of a stage."""
    found: dict[str, list[tuple[float, float, int]]] = {}
    for row in read_metrics(path):
        for name, text in row.items():
            if name in _NO_METRICS or not text:
                continue
            value = float(text)
            if math.isfinite(value):
                found.setdefault(name, []).append((float(row["seconds"]), value, int(float(row.get("epoch") or 0))))
    return dict(sorted(found.items()))


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns can be sorted; nothing without rows."""
    if not rows:
        return ""
    head = "".join(f'<th class="sortable" scope="col">{html.escape(column)}</th>' for column in columns)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>\n" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>"


def _cell(text: str) -> str:
    kind = ' class="text"' if " " in text else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def _picture(path: Path, title: str) -> str:
    if not path.is_file():
        return ""
    content = base64.b64encode(path.read_bytes()).decode()
    words = html.escape(title)
    return f'<h2>{words}</h2>\n<img alt="{words}" src="data:image/png;base64,{content}">'


def _number(value: Any) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else str(value)

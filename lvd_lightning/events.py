"""What happened when: `events.jsonl` in a run directory, a line for every event, kept over kills and restarts.

It is written for people and their scripts: the program reads none of it. Each rank has a file of its own. A line is
written by one call at the end of the file; a line that a dying process left unfinished ends where the next one begins.
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lvd_lightning.files import parse_json

__all__ = ["events_path", "read_events", "record", "recording"]

_BEGUN = time.monotonic()
_state: dict[str, Any] = {}


def events_path(run_dir: Path, rank: int = 0) -> Path:
    """`events.jsonl` of the first rank, `events_rank1.jsonl` of the next."""
    return run_dir / ("events.jsonl" if rank == 0 else f"events_rank{rank}.jsonl")


@contextmanager
def recording(run_dir: Path, rank: int = 0) -> Iterator[None]:
    """Inside, `record` writes into the file of a run directory; elsewhere it does nothing."""
    before = dict(_state)
    _state.update(path=events_path(run_dir, rank), rank=rank, failed=False)
    try:
        yield
    finally:
        _state.clear()
        _state.update(before)


def record(event: str, **facts: Any) -> None:
    """Write one line: the event, when it was, which process saw it, and facts about it.

    An event that cannot be written is worth one warning: a run does not end because of it. What is no plain value is
    written as text, and a number that JSON has not, as null.

    Example:
        >>> import tempfile
        >>> from lvd_lightning.events import read_events, record, recording
        >>> with tempfile.TemporaryDirectory() as folder, recording(Path(folder)):
        ...     record("stage_begins", stage="teacher")
        ...     [(line["event"], line["stage"]) for line in read_events(Path(folder) / "events.jsonl")]
        [('stage_begins', 'teacher')]
    """
    path = _state.get("path")
    if path is None:
        return
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
        "uptime": round(time.monotonic() - _BEGUN, 3),
        "process": os.getpid(),
        "rank": _state["rank"],
        "event": event,
        **{name: _plain(value) for name, value in facts.items()},
    }
    try:
        _append(path, json.dumps(line, default=str).encode() + b"\n")
    except OSError as error:
        if not _state["failed"]:
            warnings.warn(f"{path}: events are not written ({error.strerror})", stacklevel=2)
        _state["failed"] = True


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a file, oldest first; lines that were left unfinished are passed over."""
    found = []
    for line in path.read_bytes().splitlines():
        try:
            value = parse_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def _append(path: Path, line: bytes) -> None:
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value

"""What an offline W&B run has recorded: its files are logs of records in blocks, as LevelDB's, of protocol buffers."""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Recorded", "read_back"]

_FILE_HEADER, _HEADER, _BLOCK = 7, 7, 1 << 15
_FULL, _LAST = 1, 4


@dataclass
class Recorded:
    """Of all processes that have worked on a run, in order.

    history: rows; config, summary: values by dotted names; axes: by metric, what it is drawn over; exits: exit codes.
    """

    ids: set[str] = field(default_factory=set)
    history: list[dict[str, Any]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, str] = field(default_factory=dict)
    artifacts: list[str] = field(default_factory=list)
    exits: list[int] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


def read_back(run_dir: Path) -> Recorded:
    """The offline folders of a run directory, oldest first."""
    from wandb.proto import wandb_internal_pb2

    found = Recorded()
    for folder in sorted(run_dir.glob("wandb/offline-run-*")):
        found.files += [path for path in folder.glob("files/**/*") if path.is_file()]
        for content in _records(next(folder.glob("*.wandb")).read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(content)
            _take(found, record)
    return found


def _take(found: Recorded, record: Any) -> None:
    kind = record.WhichOneof("record_type")
    if kind == "run":
        found.ids.add(record.run.run_id)
        found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    elif kind == "history":
        found.history.append({_name(item): json.loads(item.value_json) for item in record.history.item})
    elif kind == "summary":
        found.summary |= {_name(item): json.loads(item.value_json) for item in record.summary.update}
    elif kind == "metric":
        found.axes[record.metric.name or record.metric.glob_name] = record.metric.step_metric
    elif kind == "artifact":
        found.artifacts.append(record.artifact.name)
    elif kind == "exit":
        found.exits.append(record.exit.exit_code)


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


def _records(content: bytes) -> Iterator[bytes]:
    assert content[:4] == b":W&B"
    place, begun = _FILE_HEADER, b""
    while place + _HEADER <= len(content):
        if _BLOCK - place % _BLOCK < _HEADER:
            place += _BLOCK - place % _BLOCK  # what is left of a block and holds no header
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + _HEADER])
        place += _HEADER
        begun += content[place : place + length]
        place += length
        if kind in (_FULL, _LAST):
            yield begun
            begun = b""

"""What the files of a run hold, but for what a clock said: to compare runs."""

import csv
import json
from pathlib import Path
from typing import Any

import torch

from lvd_lightning.runs.machine import MACHINE

__all__ = ["content", "without_times"]

_CHECKPOINT = ("state_dict", "growing", "optimizer_states", "lr_schedulers", "epoch", "global_step")


def without_times(value: Any) -> Any:
    """Plain values to compare, without what a clock said, or the machine's load."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if "second" not in str(key) and MACHINE not in str(key)}
        return {key: without_times(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [without_times(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def content(path: Path) -> Any:
    """What a file holds, but times."""
    if path.suffix == ".ckpt":
        checkpoint = torch.load(path, weights_only=True)
        return without_times({key: checkpoint[key] for key in _CHECKPOINT if key in checkpoint})
    if path.suffix == ".csv":
        with path.open() as file:
            return without_times(list(csv.DictReader(file)))
    if path.suffix == ".json":
        return without_times(json.loads(path.read_text()))
    if path.suffix == ".jsonl":  # events
        return None
    return path.read_bytes()

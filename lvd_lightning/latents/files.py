"""Small files that are there as a whole or not at all, and keys that say what a file was computed from."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["key_of", "save_array", "save_tensors", "stored_key", "write_json"]


def key_of(*parts: Any) -> str:
    """A digest of plain values: two files with one key hold the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stored_key(path: Path) -> str | None:
    """The key in a JSON file that was written with one; None if there is no such file."""
    return str(json.loads(path.read_text())["key"]) if path.is_file() else None


def write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)


def save_array(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        np.save(file, array, allow_pickle=False)
    os.replace(partial, path)


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(path.name + ".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)

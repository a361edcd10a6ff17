"""Keys that say what a file was computed from."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lvd_lightning.files import read_json

__all__ = ["key_of", "stored_key"]


def key_of(*parts: Any) -> str:
    """A digest of plain values: two files with one key hold the same."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def stored_key(path: Path) -> str | None:
    """The key in a JSON file that was written with one; None if there is no such file."""
    return str(read_json(path)["key"]) if path.is_file() else None

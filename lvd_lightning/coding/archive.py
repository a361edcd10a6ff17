"""The file that `compress` writes: what is in it, of which circuit, and a checksum.

    4 bytes "LVDA", 1 byte version
    4 bytes length of the header, then the header: JSON, deflated
    for every group of pictures: 4 bytes length, then so many 32-bit words of a range coder
    32 bytes SHA-256 of all before

Numbers are little-endian.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from lvd_lightning.coding.ranges import Words
from lvd_lightning.files import parse_json

__all__ = ["Archive", "Entry", "pack", "unpack"]

MAGIC, VERSION = b"LVDA", 1
# Of one file: bytes of its header, pictures that are coded in turn, pixels of a side.
_MOST_HEADER, _MOST_GROUP, _MOST_SIDE = 1 << 26, 1 << 10, 1 << 20


@dataclass(frozen=True)
class Entry:
    """A picture: its name in the archive, with slashes; its size in pixels; whether its file has one channel."""

    name: str
    height: int
    width: int
    is_grey: bool = False


@dataclass(frozen=True)
class Archive:
    """What a file holds.

    circuit, tables: fingerprints of the parameters, and of the numbers that frequencies are made of.
    group: so many pictures of the circuit's size are coded in turn, variable by variable; the last may be fewer.
    is_tiled: whether pictures are cut into such of the circuit's size.
    """

    circuit: str
    tables: str
    group: int
    is_tiled: bool
    entries: Sequence[Entry]
    groups: Sequence[Words]


def pack(archive: Archive) -> tuple[bytes, int]:
    """The bytes of the file, and how many of them are words of the coder; the others are the header and its like."""
    described: dict[str, Any] = {name: getattr(archive, name) for name in ("circuit", "tables", "group", "is_tiled")}
    described["entries"] = [list(asdict(entry).values()) for entry in archive.entries]
    header = zlib.compress(json.dumps(described, separators=(",", ":")).encode(), 9)
    words = [found.astype("<u4").tobytes() for found in archive.groups]
    parts = [MAGIC, bytes([VERSION]), struct.pack("<I", len(header)), header]
    for found in words:
        parts += [struct.pack("<I", len(found) // 4), found]
    body = b"".join(parts)
    return body + hashlib.sha256(body).digest(), sum(map(len, words))


def unpack(contents: bytes, path: Path) -> Archive:
    """Read what `pack` made; `path` is for messages.

    Raises:
        ValueError: it is no such file, of another version, cut short or changed.
    """
    if contents[:4] != MAGIC:
        raise ValueError(f"{path}: is no file of `train.py compress`")
    if contents[4:5] != bytes([VERSION]):
        raise ValueError(
            f"{path}: is of version {contents[4] if len(contents) > 4 else 'none'}, this program reads {VERSION}"
        )
    body, checksum = contents[:-32], contents[-32:]
    if len(contents) < 41 or hashlib.sha256(body).digest() != checksum:
        raise ValueError(f"{path}: was cut short or changed (its checksum is that of other contents): get it again")
    try:
        return _unpacked(body, path)
    except (ValueError, TypeError, KeyError, AttributeError, struct.error, zlib.error) as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(
            f"{path}: is no file of `train.py compress`, though its checksum is right ({error})"
        ) from error


def _unpacked(body: bytes, path: Path) -> Archive:
    """Whoever writes such a file can write the checksum too: nothing in it is taken on trust."""
    (length,) = struct.unpack_from("<I", body, 5)
    inflating = zlib.decompressobj()
    header = inflating.decompress(body[9 : 9 + length], _MOST_HEADER)
    if inflating.unconsumed_tail:
        raise ValueError(f"its header unpacks to more than {_MOST_HEADER:,} bytes")
    found = parse_json(header)
    entries = [Entry(*entry) for entry in found.pop("entries")]
    for entry in entries:
        if not isinstance(entry.name, str) or not (_is_side(entry.height) and _is_side(entry.width)):
            raise ValueError(f"it holds the picture {str(entry)[:80]}")
        parts = PurePosixPath(entry.name).parts
        if not parts or ".." in parts or entry.name.startswith("/") or "\\" in entry.name or ":" in entry.name:
            raise ValueError(f"{path}: holds the name {entry.name!r}, which leads out of a folder; it is not unpacked")
    groups, place = [], 9 + length
    while place < len(body):
        (count,) = struct.unpack_from("<I", body, place)
        groups.append(np.frombuffer(body, "<u4", count, place + 4).astype(np.uint32))
        place += 4 + 4 * count
    if type(found.get("group")) is not int or not 1 <= found["group"] <= _MOST_GROUP or not entries:
        raise ValueError(f"it holds {len(entries)} pictures in groups of {str(found.get('group'))[:40]}")
    return Archive(**found, entries=entries, groups=groups)


def _is_side(value: Any) -> bool:
    """A number of pixels."""
    return type(value) is int and 1 <= value <= _MOST_SIDE

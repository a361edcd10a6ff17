"""Pictures as they were before `compress`.

Shapes: B pictures of the circuit's size that were coded in turn, P parts (positions), D variables of a part.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts
from lvd_lightning.coding.archive import Archive, unpack
from lvd_lightning.coding.frequencies import FrequencyTables
from lvd_lightning.coding.ranges import RangeReader, Words
from lvd_lightning.use.compressing import BATCH, circuit_fingerprint
from lvd_lightning.use.folders import new_folder
from lvd_lightning.use.pictures import joined
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.trained import Trained

__all__ = ["decompress"]


def decompress(trained: Trained, path: Path, out: Path, *, batch: int = BATCH) -> list[Path]:
    """Write the pictures of a file that `compress` wrote as PNG, under their names, into a new folder.

    Pixels are those that were compressed, bit by bit. The folder appears when it is complete.

    Args:
        trained: the circuit that the file was compressed with, on any device.
        path: the file.
        out: the folder; there is none, or it is empty.
        batch: pictures that are computed together, any number.

    Returns:
        The files that were written.

    Raises:
        ValueError: no such file, a file that was cut short, changed, or compressed with another circuit, or a folder
            that holds something.
    """
    check_counts(batch=batch)
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file; expected one that `train.py compress` wrote")
    archive = unpack(path.read_bytes(), path)
    if archive.circuit != circuit_fingerprint(trained):
        raise ValueError(
            f"{path}: was compressed with another circuit than that of {trained.folder}: give the run (or exported "
            "folder) that it was compressed with"
        )
    tables = FrequencyTables(trained.circuit, trained.device)
    if archive.tables != tables.fingerprint:
        raise ValueError(
            f"{path}: the circuit is the right one, but this version or machine computes other tables from it than "
            "the one that compressed: decompress there"
        )
    with new_folder(out) as folder:
        written = _write(trained, tables, archive, folder, batch)
    return [out / found.relative_to(folder) for found in written]


def _write(trained: Trained, tables: FrequencyTables, archive: Archive, folder: Path, batch: int) -> list[Path]:
    height, width = trained.size
    counts = [
        math.ceil(entry.height / height) * math.ceil(entry.width / width) if archive.is_tiled else 1
        for entry in archive.entries
    ]
    total, waiting, written = sum(counts), list[Tensor](), []
    if math.ceil(total / archive.group) != len(archive.groups):
        raise ValueError(f"its {total:,} pieces are not those of {len(archive.groups):,} groups of {archive.group:,}")
    entries = iter(zip(archive.entries, counts, strict=True))
    entry, count = next(entries)
    for number, words in enumerate(tracked(archive.groups, "groups", len(archive.groups))):
        parts_BPD = _decoded(tables, words, min(archive.group, total - number * archive.group), batch)
        waiting += trained.codes.to_rgb(trained.parts.join(parts_BPD))
        while len(waiting) >= count:
            tiles = torch.stack(waiting[:count])
            pixels = joined(tiles, (entry.height, entry.width)) if archive.is_tiled else tiles[0]
            target = folder / entry.name
            target.parent.mkdir(parents=True, exist_ok=True)
            write_png(target, pixels, entry.is_grey)
            written.append(target)
            waiting = waiting[count:]
            following = next(entries, None)
            if following is None:
                break
            entry, count = following
    return written


def _decoded(tables: FrequencyTables, words: Words, count: int, batch: int) -> Tensor:
    """The parts of a group of pictures, int64 (B, P, D)."""
    reader = RangeReader(words)
    sizes = [min(batch, count - start) for start in range(0, count, batch)]
    chunks = [tables.begin(size) for size in sizes]
    num_positions = 1 + max(position for position, _ in tables.steps)
    num_variables = 1 + max(variable for _, variable in tables.steps)
    out_BPD = torch.zeros(count, num_positions, num_variables, dtype=torch.int64)
    for position, variable in tables.steps:
        values_B = reader.take(torch.cat([coding.frequencies() for coding in chunks]))
        out_BPD[:, position, variable] = values_B
        for coding, values in zip(chunks, values_B.split(sizes), strict=True):
            coding.observe(values)
    return out_BPD

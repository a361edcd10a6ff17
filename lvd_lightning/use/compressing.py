"""Pictures compressed without loss by a circuit.

Shapes: B pictures of the circuit's size that are coded in turn, P parts (positions), D variables of a part.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from lvd_lightning.checks import check_choice, check_counts
from lvd_lightning.circuits.io import pack_structure
from lvd_lightning.coding.archive import Archive, Entry, pack
from lvd_lightning.coding.frequencies import FrequencyTables
from lvd_lightning.coding.ranges import RangeWriter, Words
from lvd_lightning.files import write_atomically
from lvd_lightning.use.folders import check_place
from lvd_lightning.use.pictures import Picture, PictureSet, fitted
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.trained import Trained

__all__ = ["BATCH", "Compressed", "circuit_fingerprint", "compress"]

#: Pictures whose frequencies are computed together.
BATCH = 64
#: Pictures of a group, and bytes that their coding may keep: fewer pictures where circuits are large.
_GROUP, _GROUP_BYTES = 256, 1 << 30


@dataclass(frozen=True)
class Compressed:
    """What came of it.

    num_bytes: of the file; header_bytes: those that are no words of the coder (names, sizes, checksum, lengths).
    num_dims: dimensions that were coded, those that fill up tiles among them.
    model_bits: -log2 p of all that was coded, by the circuit itself.
    """

    num_pictures: int
    num_bytes: int
    header_bytes: int
    num_dims: int
    model_bits: float
    seconds: float

    @property
    def bpd(self) -> float:
        """Bits per dimension of the coder's words."""
        return 8 * (self.num_bytes - self.header_bytes) / self.num_dims

    @property
    def model_bpd(self) -> float:
        """Bits per dimension that the circuit promises."""
        return self.model_bits / self.num_dims


def compress(
    trained: Trained, pictures: PictureSet, path: Path, *, fit: str | None = None, batch: int = BATCH
) -> Compressed:
    """Write pictures into one file, from which `decompress` makes the same pixels again.

    Every value is coded by its exact conditional probability given all values before it, see
    `coding/frequencies.py`; these are the same to the last bit on every device, with any number of threads and any
    `batch`. The file holds names, sizes, and fingerprints of the circuit and of the coder's tables.

    Args:
        trained: see `open_trained`.
        pictures: whole, opaque pictures of the circuit's size and colours.
        path: the file to write.
        fit: None, or "tile" for pictures of any size; what fills up the last tiles is coded as well.
        batch: pictures that are computed together.

    Raises:
        ValueError: a picture that does not fit or would not come back as it is, or a circuit that cannot code.
    """
    check_counts(batch=batch)
    check_choice(("tile",), fit=fit)
    check_place(path, of_file=True)
    if not trained.codes.is_lossless:
        raise ValueError(
            f"{trained.folder}: models {trained.codes.region} pictures in {trained.codes.color}, which cannot be "
            "compressed without loss: train with color ycocg_r (or rgb) and region whole"
        )
    start = time.perf_counter()
    tables = FrequencyTables(trained.circuit, trained.device)
    group = max(1, min(_GROUP, _GROUP_BYTES // (8 * tables.numbers_per_example)))
    entries: list[Entry] = []
    groups: list[Words] = []
    nats, count = 0.0, 0
    for tiles in _in_groups(trained, pictures, fit, group, entries):
        codes = trained.codes.encode(tiles)
        with torch.no_grad():
            nats += float(trained.circuit.log_prob(codes.to(trained.device)).double().sum())
        groups.append(_coded(tables, trained.circuit.split(codes).long(), batch))
        count += len(tiles)
    archive = Archive(circuit_fingerprint(trained), tables.fingerprint, group, fit == "tile", _renamed(entries), groups)
    contents, words = pack(archive)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, contents)
    return Compressed(
        num_pictures=len(entries),
        num_bytes=len(contents),
        header_bytes=len(contents) - words,
        num_dims=count * trained.circuit.num_dims,
        model_bits=-nats / math.log(2),
        seconds=time.perf_counter() - start,
    )


def circuit_fingerprint(trained: Trained) -> str:
    """SHA-256 of the parameters of a circuit, its structure and the code of its pictures; the same on any device."""
    found = hashlib.sha256(json.dumps(trained.codes.plain()).encode())
    for circuit in (trained.circuit.prior, trained.circuit.conditional):
        text, tensors = pack_structure(circuit.structures)
        found.update(text.encode())
        for name in sorted(tensors):
            found.update(tensors[name].numpy().data)
        for table in circuit.stored():
            found.update(table.detach().cpu().contiguous().numpy().data)
    return found.hexdigest()


def _in_groups(
    trained: Trained, pictures: PictureSet, fit: str | None, group: int, entries: list[Entry]
) -> Iterator[Tensor]:
    """Pictures of the circuit's size, uint8 (at most `group`, 3, H, W), and what they are of, in `entries`."""
    waiting: list[Tensor] = []
    for picture in tracked(pictures, "pictures", len(pictures)):
        tiles = fitted(picture, trained.size, fit)
        _check_comes_back(trained, picture, tiles)
        height, width = picture.pixels.shape[1:]
        entries.append(Entry(picture.name, int(height), int(width), picture.is_grey))
        waiting += tiles
        while len(waiting) >= group:
            yield torch.stack(waiting[:group])
            waiting = waiting[group:]
    if waiting:
        yield torch.stack(waiting)


def _check_comes_back(trained: Trained, picture: Picture, tiles: Tensor) -> None:
    if not picture.is_opaque:
        raise ValueError(f"{picture.name}: has transparent pixels, which would be lost: make it opaque")
    if not bool(trained.codes.is_exact(tiles).all()):
        raise ValueError(
            f"{picture.name}: has colours that are none of the circuit's {trained.codes.num_levels} levels of grey; "
            "compress it by a circuit of such pictures"
        )


def _coded(tables: FrequencyTables, x_BPD: Tensor, batch: int) -> Words:
    """A group's words: for every variable in turn the values of all its pictures."""
    writer = RangeWriter()
    chunks = [(part, tables.begin(len(part))) for part in x_BPD.split(batch)]
    for position, variable in tables.steps:
        frequencies = torch.cat([coding.frequencies() for _, coding in chunks])
        writer.add(x_BPD[:, position, variable], frequencies)
        for part, coding in chunks:
            coding.observe(part[:, position, variable])
    return writer.words()


def _renamed(entries: list[Entry]) -> list[Entry]:
    """The names under which pictures come back: those of PNG files."""
    plain = [PurePosixPath(entry.name).with_suffix(".png").as_posix() for entry in entries]
    twice = {name for name in plain if plain.count(name) > 1} if len(set(plain)) < len(plain) else set()
    names = [f"{entry.name}.png" if name in twice else name for entry, name in zip(entries, plain, strict=True)]
    return [Entry(name, entry.height, entry.width, entry.is_grey) for name, entry in zip(names, entries, strict=True)]

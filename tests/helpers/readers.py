"""Readers of every kind of file that may come from somebody else, each with a small whole file; ways to spoil one."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open

import lvd_lightning.circuits as pc
from datamodules.arrays import Arrays
from datamodules.mnist import read_idx
from datamodules.pickles import read_pixels
from datamodules.text_files import read_texts
from helpers.trained_runs import random_circuit
from lvd_lightning.circuits.io import STRUCTURE, signed
from lvd_lightning.coding.archive import Archive, Entry, pack, unpack
from lvd_lightning.events import read_events
from lvd_lightning.files import read_array, read_json, read_tensors, write_tensors
from lvd_lightning.growing.ancestry import Ancestry
from lvd_lightning.latents.features import FeatureStore
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.parts import ImagePatches
from lvd_lightning.runs.checkpoint import EpochCheckpoint
from lvd_lightning.runs.metrics_file import read_metrics
from lvd_lightning.runs.resuming import where_to_resume
from lvd_lightning.runs.run_directory import read_config
from lvd_lightning.teachers import VQVAE, load_teacher, save_teacher
from lvd_lightning.use.codes import ImageCodes
from lvd_lightning.use.pictures import PictureSet
from lvd_lightning.use.trained import CONFIG, FORMAT, from_pretrained

__all__ = ["READERS", "Reader", "spoiled"]

SIDE = 8


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    name: of the file, with the suffix by which it is told.
    write: puts a whole one, and what belongs to it, into a folder.
    read: reads it; a ValueError or an OSError is what a damaged one may raise, and nothing else.
    """

    name: str
    write: Callable[[Path], None]
    read: Callable[[Path], object]


def _image(kind: str) -> bytes:
    content = BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


def _pictures(path: Path) -> None:
    with PictureSet([path]) as pictures:
        for _ in pictures:
            pass


def _packed(path: Path, members: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def _images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, SIDE, SIDE, 3), dtype=np.uint8)


def _arrays(path: Path) -> None:
    data = Arrays(str(path), image_size=SIDE, patch_size=4)
    data.setup()
    data.batch("train", torch.arange(2))


def _idx() -> bytes:
    return struct.pack(">4I", 0x803, 2, 28, 28) + bytes(2 * 28 * 28)


def _features(folder: Path) -> None:
    np.save(folder / "features.npy", np.ones((3, 2, 4), dtype=np.float16))
    (folder / "features.json").write_text(json.dumps({"shape": [3, 2, 4], "key": "k", "seconds": 1.0}))


def _circuit() -> pc.Circuit:
    return pc.Circuit(pc.hclt([-1, 0, 0], 2, pc.Categorical(3)))


def _structure(folder: Path) -> None:
    """What a circuit's file says of its structure, beside the file."""
    pc.save(_circuit(), folder / "tree")
    with safe_open(str(folder / "tree.safetensors"), framework="pt") as file:
        (folder / "structure.json").write_text(file.metadata()[STRUCTURE])


def _load_signed(path: Path) -> None:
    """Whoever changes the structure can change the checksum as well."""
    structure = read_json(path)
    if not isinstance(structure, dict):
        raise ValueError("no structure")
    structure.pop("checksum", None)
    tensors = read_tensors(path.with_name("tree.safetensors"))
    with TemporaryDirectory() as folder:
        write_tensors(Path(folder, "a.safetensors"), tensors, {STRUCTURE: signed(structure, tensors)})
        pc.load(Path(folder, "a.safetensors"))


def _teacher(folder: Path) -> None:
    sizes: dict[str, Any] = {"channels": 4, "num_residual_blocks": 1, "num_features": 4, "codebook_size": 4}
    save_teacher(
        VQVAE(image_size=(8, 8), patch_size=4, prior_hidden_size=4, prior_num_layers=1, prior_num_heads=1, **sizes),
        folder,
    )


def _checkpoint(path: Path) -> None:
    torch.save({"epoch": 1, "global_step": 4, "state_dict": {"weight": torch.ones(50)}}, path)


def _resume(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        where_to_resume(EpochCheckpoint(path.parent, "val/bpd"))


def _compressed() -> bytes:
    words = [np.arange(9, dtype=np.uint32)]
    return pack(Archive("circuit", "tables", 2, False, [Entry("a/b.png", 8, 8), Entry("c.png", 8, 8)], words))[0]


def _unpack_signed(path: Path) -> None:
    """Whoever changes the file can change its checksum as well."""
    content = path.read_bytes()[:-32]
    unpack(content + hashlib.sha256(content).digest(), path)


def _file(name: str, content: Callable[[], bytes], read: Callable[[Path], object]) -> Reader:
    return Reader(name, lambda folder: (folder / name).write_bytes(content()) and None, read)


def _exported(folder: Path) -> None:
    codes, parts = ImageCodes("rgb"), ImagePatches((3, 4, 4), 2, [256] * 3)
    random_circuit(parts, pc.Categorical(256)).save(folder)
    (folder / CONFIG).write_text(json.dumps({"format": FORMAT, "codes": codes.plain()}))


def _language(folder: Path) -> None:
    tables = random_tables(3, 2, 4, True, torch.Generator().manual_seed(0), torch.float32)
    HiddenMarkovModel.from_tables(tables, 3, None).save(folder)


def _heads(folder: Path) -> None:
    Ancestry.first([1, 2]).grown([[0], []], epoch=4).write(folder, [[3, 4], [5, 6]])


_YAML = b"name: photos\nshared: &a {patch_size: 4, list: [1, 2.5, no]}\nstages: {teacher: {model: *a}}\n"
_PICKLE = pickle.dumps({b"data": np.zeros((2, 3 * SIDE * SIDE), dtype=np.uint8), b"labels": [0, 1]}, protocol=2)

READERS: dict[str, Reader] = {
    **{kind: _file(f"a.{kind}", lambda kind=kind: _image(kind), _pictures) for kind in ("png", "jpeg", "gif", "webp")},
    **{kind: _file(f"a.{kind}", lambda kind=kind: _image(kind), _pictures) for kind in ("bmp", "tiff")},
    "zip of images": Reader("a.zip", lambda f: _packed(f / "a.zip", {"1.png": _image("png")}), _pictures),
    "pickle": _file("data_batch_1", lambda: _PICKLE, lambda path: read_pixels(path, SIDE)),
    "npy": Reader("a.npy", lambda folder: np.save(folder / "a.npy", _images()), _arrays),
    "npz": Reader("a.npz", lambda folder: np.savez_compressed(folder / "a.npz", _images()), _arrays),
    "array": Reader("a.npy", lambda folder: np.save(folder / "a.npy", _images()), read_array),
    "idx": _file("train-images", _idx, read_idx),
    "gzipped idx": _file("train-images.gz", lambda: gzip.compress(_idx()), read_idx),
    "text": _file("a.txt", lambda: "the king größer\r\nsaid\n".encode() * 3, read_texts),
    "zip of texts": Reader("a.zip", lambda f: _packed(f / "a.zip", {"1.txt": b"the king\n" * 9}), read_texts),
    "yaml": _file("config.yaml", lambda: _YAML, read_config),
    "json": _file("done.json", lambda: b'{"seconds": 1.5, "names": ["a", null]}', read_json),
    "tensors": Reader(
        "a.safetensors", lambda folder: write_tensors(folder / "a.safetensors", {"x": torch.ones(3, 4)}), read_tensors
    ),
    "features": Reader(
        "features.npy", _features, lambda path: FeatureStore(path).gather(torch.tensor([1]), torch.tensor([1]))
    ),
    "side-car": Reader("features.json", _features, lambda path: FeatureStore(path.with_suffix(".npy"))),
    "circuit": Reader("tree.safetensors", lambda folder: pc.save(_circuit(), folder / "tree") and None, pc.load),
    "circuit and signed": Reader("structure.json", _structure, _load_signed),
    "teacher": Reader("teacher.json", _teacher, lambda path: load_teacher(path.parent)),
    "weights": Reader("teacher.safetensors", _teacher, lambda path: load_teacher(path.parent)),
    "checkpoint": Reader("last.ckpt", lambda folder: _checkpoint(folder / "last.ckpt"), _resume),
    "exported": Reader(CONFIG, _exported, lambda path: from_pretrained(path.parent)),
    "assembled": Reader("assembled.json", _exported, lambda path: AssembledCircuit.load(path.parent)),
    "language": Reader("language.json", _language, lambda path: HiddenMarkovModel.load(path.parent)),
    "heads": Reader("heads.csv", _heads, lambda path: Ancestry.read(path.parent)),
    "compressed": _file("a.lvd", _compressed, lambda path: unpack(path.read_bytes(), path)),
    "compressed and signed": _file("a.lvd", _compressed, _unpack_signed),
    "metrics": _file("metrics.csv", lambda: b"epoch,step,seconds\n0,1,2.0\n", read_metrics),
    "events": _file("events.jsonl", lambda: b'{"event": "start"}\n', read_events),
}


def spoiled(content: bytes, rng: random.Random) -> bytes:
    """The content of a file with one to four faults: cut, flipped, overwritten by large numbers, repeated, moved."""
    found = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(found) + 1)
        length = min(rng.choice((1, 2, 4, 8, 64)), len(found) - place)
        kind = rng.randrange(6)
        if kind == 0:
            del found[place:]
        elif kind == 1 and length:
            found[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[place : place + length] = rng.choice((b"\xff", b"\x00", b"\x7f")) * length
        elif kind == 3:
            found[place:place] = rng.randbytes(rng.choice((1, 4, 16)))
        elif kind == 4:
            start = rng.randrange(len(found) + 1)
            found[place:place] = found[start : start + rng.choice((8, 64, 512))]
        else:
            found[place : place + length] = str(rng.choice((-1, 0, 2**31, 10**18))).encode()[:length]
    return bytes(found)

"""Files from somebody else: damaged, of another kind or made to harm, they are a clear error and nothing more."""

import gzip
import os
import pickle
import random
import stat
import struct
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.readers import READERS, spoiled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from datamodules.arrays import Arrays
from datamodules.mnist import read_idx
from datamodules.pickles import load_pickle
from lvd_lightning.archives import open_archive, read_member
from lvd_lightning.cli import main
from lvd_lightning.files import read_json
from lvd_lightning.runs.checkpoint import EpochCheckpoint
from lvd_lightning.runs.resuming import where_to_resume
from lvd_lightning.teachers import load_teacher
from lvd_lightning.use.pictures import PictureSet

CLEAR = (ValueError, OSError)
#: Beginnings of files of many kinds, and of none.
OTHERS = [
    b"",
    b"\0" * 64,
    b"\x80\x04.",
    b"PK\x05\x06" + b"\0" * 18,
    b"\x89PNG\r\n\x1a\n",
    b"\x93NUMPY\x01\x00",
    b"[" * 9999,
    b"epoch,step,seconds\n" + b"x" * 200_000 + b",1,2\n",
]


def ends_clearly(name: str, folder: Path, content: bytes) -> None:
    """Read a file of this content: it is read, or refused in words, and nothing is written beside it."""
    reader = READERS[name]
    path = folder / reader.name
    path.write_bytes(content)
    before = sorted(folder.parent.rglob("*"))
    with suppress(*CLEAR):
        reader.read(path)
    assert {*folder.parent.rglob("*")} <= {*before}  # of damaged checkpoints the stage's own are removed


@pytest.mark.parametrize("name", READERS)
def test_a_whole_file_is_read(name: str, tmp_path: Path) -> None:
    READERS[name].write(tmp_path)
    READERS[name].read(tmp_path / READERS[name].name)


@pytest.mark.parametrize("name", READERS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_a_damaged_file_is_a_clear_error(name: str, tmp_path: Path, seed: int) -> None:
    folder = tmp_path / "files"
    folder.mkdir(exist_ok=True)
    READERS[name].write(folder)
    content = (folder / READERS[name].name).read_bytes()
    ends_clearly(name, folder, spoiled(content, random.Random(seed)))


@pytest.mark.parametrize("name", READERS)
def test_a_file_of_another_kind_is_a_clear_error(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    READERS[name].write(folder)
    for content in OTHERS:
        ends_clearly(name, folder, content)


class Runs:
    """A pickle that executes."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_nothing_that_is_pickled_runs(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = pickle.dumps({"data": Runs(marker), "epoch": 1})
    folder = tmp_path / "files"
    folder.mkdir()
    for name in READERS:
        ends_clearly(name, folder, content)
    torch.save({"epoch": 1, "state_dict": Runs(marker)}, folder / "last.ckpt")
    with pytest.raises(ValueError, match=r"last\.ckpt: holds more than tensors and plain values"):
        where_to_resume(EpochCheckpoint(folder, "val/bpd"))
    np.save(folder / "a.npy", np.array([Runs(marker)], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy"):
        Arrays(str(folder / "a.npy"), image_size=8, patch_size=4).setup()
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.mkdir [RAN]\n",
        "&a [*a]\n",
        "name: " + "[" * 5000 + "\n",
        "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
        + "".join(f"{n}: &{n} [{', '.join([f'*{m}'] * 10)}]\n" for m, n in zip("abcdefg", "bcdefgh", strict=True)),
    ],
    ids=["tag", "circle", "deep", "laughs"],
)
def test_a_config_makes_no_objects_and_no_billions(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "evil.yaml"
    path.write_text(text.replace("RAN", str(tmp_path / "ran")))
    assert main(["fit", f"--config={path}", f"--run_dir={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert {found.name for found in tmp_path.iterdir()} == {"evil.yaml"}


def test_what_explodes_is_not_unpacked(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    with open_archive(bomb) as archive, pytest.raises(ValueError, match="unpacks from 3.* to 314,572,800 bytes"):
        read_member(archive, bomb, "a.png")
    with PictureSet([bomb]) as pictures, pytest.raises(ValueError, match="unpacks from"):
        pictures[0]
    file = tmp_path / "images.gz"
    file.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 2**32 - 1, 28, 28) + bytes(1 << 20)))
    with pytest.raises(ValueError, match="says that it holds 4,294,967,295 images, expected at most 2,739,137"):
        read_idx(file)
    file.write_bytes(gzip.compress(struct.pack(">4I", 0x803, 2, 28, 28) + bytes(1 << 24)))
    with pytest.raises(ValueError, match="holds more than its 2 images"):
        read_idx(file)
    picture = tmp_path / "large.png"
    size = struct.pack(">2I5B", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    with PictureSet([picture]) as pictures, pytest.raises(ValueError, match="cannot be read as a picture"):
        pictures[0]


def test_a_tiff_whose_places_are_fractions_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.tiff"
    Image.new("RGB", (8, 8)).save(path)
    content = path.read_bytes()
    place = content.index(struct.pack("<HH", 273, 4))  # where strips begin, a whole number
    path.write_bytes(content[:place] + struct.pack("<HHIf", 273, 11, 1, 8.5) + content[place + 12 :])
    with PictureSet([path]) as pictures, pytest.raises(ValueError, match=r"a\.tiff: cannot be read as a picture"):
        pictures[0]


def test_numbers_that_would_take_all_memory_are_refused(tmp_path: Path) -> None:
    memo = tmp_path / "memo.pickle"
    memo.write_bytes(b"\x80\x02Nr" + struct.pack("<I", 2**31 - 1) + b".")
    with pytest.raises(ValueError, match="asks for place 2147483647 of the memo in 9 bytes"):
        load_pickle(memo)
    READERS["teacher"].write(tmp_path)
    path = tmp_path / "teacher.json"
    path.write_text(path.read_text().replace('"channels": 4', '"channels": 1000000000'))
    with pytest.raises(ValueError, match=r"1000000000 in teacher\.json, but teacher\.safetensors has"):
        load_teacher(tmp_path)
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (999999999999, 8, 8, 3), }"
    (tmp_path / "a.npy").write_bytes(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)
    for name in ("npy", "array"):
        with pytest.raises(ValueError, match=r"a\.npy"):
            READERS[name].read(tmp_path / "a.npy")
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        read_json(tmp_path / "deep.json")


def test_links_and_names_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(READERS["png"].name.encode())
    packed = tmp_path / "a.zip"
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    picture = tmp_path / "whole.png"
    Image.new("RGB", (8, 8)).save(picture)
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr(link, "../secret.png")
        archive.writestr("../../../escaped.png", picture.read_bytes())
        archive.writestr("/absolute.png", picture.read_bytes())
    with PictureSet([packed]) as pictures:
        assert sorted(pictures.names) == ["absolute.png", "escaped.png"]

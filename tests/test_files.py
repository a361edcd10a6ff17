"""Files that are there as a whole or not at all."""

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.full_disk import full_disk
from safetensors.torch import load_file

from lvd_lightning.files import (
    read_array,
    read_json,
    read_tensors,
    write_array,
    write_atomically,
    write_json,
    write_tensors,
)

WRITERS: dict[str, Callable[[Path], None]] = {
    "text": lambda path: write_atomically(path, "x" * 100_000),
    "bytes": lambda path: write_atomically(path, b"x" * 100_000),
    "function": lambda path: write_atomically(path, lambda target: target.write_bytes(b"x" * 100_000)),
    "json": lambda path: write_json(path, list(range(100_000))),
    "array": lambda path: write_array(path, np.zeros(100_000)),
    "tensors": lambda path: write_tensors(path, {"x": torch.zeros(100_000)}),
}


def test_written_whole(tmp_path: Path) -> None:
    write_atomically(tmp_path / "text.txt", "größer\n")
    write_atomically(tmp_path / "bytes.bin", b"\x00\r\n")
    write_json(tmp_path / "plain.json", {"a": [1, None]})
    write_array(tmp_path / "array.npy", np.arange(3))
    write_tensors(tmp_path / "tensors.safetensors", {"a": torch.eye(3).T}, metadata={"key": "value"})
    assert (tmp_path / "text.txt").read_bytes() == "größer\n".encode()
    assert (tmp_path / "bytes.bin").read_bytes() == b"\x00\r\n"
    assert json.loads((tmp_path / "plain.json").read_text()) == {"a": [1, None]}
    assert np.load(tmp_path / "array.npy").tolist() == [0, 1, 2]
    assert torch.equal(load_file(tmp_path / "tensors.safetensors")["a"], torch.eye(3))
    assert len(list(tmp_path.iterdir())) == 5


def test_a_writer_is_given_a_path_with_the_suffix(tmp_path: Path) -> None:
    seen: list[Path] = []

    def write(target: Path) -> None:
        seen.append(target)
        assert not (tmp_path / "picture.png").exists()
        target.write_bytes(b"1")

    write_atomically(tmp_path / "picture.png", write)
    assert (seen[0].suffix, seen[0].parent) == (".png", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "some.file"
    path.write_text("before")
    with pytest.raises(OSError, match=r"some\.file") as raised, full_disk():
        WRITERS[name](path)
    assert ".partial" not in str(raised.value)
    assert raised.value.errno == (errno.EIO if name in ("array", "tensors") else errno.EFBIG)
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["some.file"]


def test_an_interrupted_writer_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "some.file"
    path.write_text("before")

    def write(target: Path) -> None:
        target.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "before"
    assert [found.name for found in tmp_path.iterdir()] == ["some.file"]


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"\xff\xfe{", b"first half"])
@pytest.mark.parametrize("read", [read_json, read_array, read_tensors])
def test_a_damaged_file_is_named_with_what_to_do(
    tmp_path: Path, read: Callable[[Path], object], content: bytes
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{path}: cannot be read \(.+\): remove the folder {tmp_path} and run its"):
        read(path)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "plain.json", {"a": [1, None]})
    write_array(tmp_path / "array.npy", np.arange(3))
    write_tensors(tmp_path / "tensors.safetensors", {"a": torch.eye(3)})
    assert read_json(tmp_path / "plain.json") == {"a": [1, None]}
    assert read_array(tmp_path / "array.npy").tolist() == [0, 1, 2]
    assert read_tensors(tmp_path / "tensors.safetensors")["a"].equal(torch.eye(3))

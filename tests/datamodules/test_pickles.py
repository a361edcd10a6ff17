"""Pickles that hold arrays are read; pickles that run code are refused."""

import collections
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.pickles import load_pickle, read_pixels


@pytest.fixture
def batch() -> dict[str, Any]:
    data = np.random.RandomState(0).randint(256, size=(4, 3 * 8 * 8)).astype(np.uint8)
    return {"data": data, "labels": [3, 1, 4, 1], "mean": data.mean(0), "best": np.int64(7), "raw": b"\x00\xff"}


def old_numpy_names(contents: bytes) -> bytes:
    """The pickle as numpy 1 would have written it (protocols without lengths of strings)."""
    return contents.replace(b"numpy._core", b"numpy.core")


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_and_plain_values_are_read(tmp_path: Path, batch: dict[str, Any], protocol: int) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(batch, protocol))
    loaded = load_pickle(path)
    assert list(loaded) == list(batch)
    for key, value in batch.items():
        assert np.array_equal(loaded[key], value)
    assert np.array_equal(read_pixels(path, 8), batch["data"].reshape(4, 3, 8, 8))
    assert read_pixels(path, 8).flags.writeable


def test_names_of_either_numpy_are_known(tmp_path: Path, batch: dict[str, Any]) -> None:
    contents = pickle.dumps(batch, 2)
    assert old_numpy_names(contents) != contents or np.lib.NumpyVersion(np.__version__) < "2.0.0"
    path = tmp_path / "batch"
    path.write_bytes(old_numpy_names(contents))
    assert np.array_equal(load_pickle(path)["data"], batch["data"])


def test_python_2_pickles_are_read(tmp_path: Path) -> None:
    # What Python 2 with numpy 1 writes: strings of bytes (U opcode), for keys, for the dtype and for the values.
    def string(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    values = bytes(range(12)) + bytes(range(240, 252)) + bytes(24)
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + string(b"b") + b"tR"
        b"(I1\n(I4\nI12\nt"
        b"cnumpy\ndtype\n(" + string(b"u1") + b"I0\nI1\ntR(I3\n" + string(b"|") + b"NNNI-1\nI-1\nI0\ntb"
        b"I00\n" + string(values) + b"tb"
    )
    path = tmp_path / "data_batch_1"
    path.write_bytes(b"\x80\x02}(" + string(b"data") + array + string(b"labels") + b"](K\x06K\x09eu.")
    assert read_pixels(path, 2).tobytes() == values
    assert load_pickle(path)[b"labels"] == [6, 9]


class Command:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_pickle_that_runs_a_command_is_refused_unrun(tmp_path: Path, protocol: int) -> None:
    path, trace = tmp_path / "data_batch_1", tmp_path / "trace"
    contents = pickle.dumps({"data": Command(f"touch {trace}")}, protocol)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=r"data_batch_1: refused to load (posix|nt)\.system"):
        read_pixels(path, 8)
    assert not trace.exists()
    # The same file is dangerous to the ordinary unpickler.
    pickle.loads(contents)
    assert trace.exists()


@pytest.mark.parametrize(
    "name", ["builtins\neval", "__builtin__\neval", "numpy\nload", "numpy.core.multiarray\nfromfile", "sys\nmodules"]
)
def test_other_globals_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"c" + name.encode() + b"\n.")
    with pytest.raises(ValueError, match="batch: refused to load " + name.replace("\n", r"\.")):
        load_pickle(path)
    path.write_bytes(pickle.dumps(collections.OrderedDict(a=1)))
    with pytest.raises(ValueError, match="refused to load collections.OrderedDict"):
        load_pickle(path)


def test_a_refused_module_is_not_even_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "surprise_module.py").write_text("boom = 1\n")
    path = tmp_path / "batch"
    path.write_bytes(b"csurprise_module\nboom\n.")
    with pytest.raises(ValueError, match="refused"):
        load_pickle(path)
    assert "surprise_module" not in sys.modules


def test_codecs_other_than_latin1_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "batch"
    path.write_bytes(b"c_codecs\nencode\n(Vabc\nVrot13\ntR.")
    with pytest.raises(ValueError, match="batch: .*rot13"):
        load_pickle(path)


def test_damaged_files_are_named(tmp_path: Path, batch: dict[str, Any]) -> None:
    path = tmp_path / "batch"
    contents = pickle.dumps(batch, 4)
    for damaged in (b"", contents[:50], contents[:-100], b"not a pickle", bytes(100), contents[:40] + b"\xff" * 40):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="batch: truncated or not a pickle"):
            load_pickle(path)


@pytest.mark.parametrize(
    ("contents", "reason"),
    [
        ([1, 2], "got a list"),
        ({"labels": [1]}, "'data' is NoneType"),
        ({"data": np.zeros((2, 192))}, "'data' is float64"),
        ({"data": np.zeros((2, 3, 8, 8), dtype=np.uint8)}, r"\(2, 3, 8, 8\)"),
        ({"data": np.zeros((2, 48), dtype=np.uint8)}, "48 values, expected 192 for image_size 8"),
    ],
)
def test_other_contents_are_named(tmp_path: Path, contents: Any, reason: str) -> None:
    path = tmp_path / "batch"
    path.write_bytes(pickle.dumps(contents))
    with pytest.raises(ValueError, match=f"batch: .*{reason}"):
        read_pixels(path, 8)

"""Texts of one's own: splits by blocks, windows, tokens on disk, files that are no text."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from helpers.encoders import write_tokenizer

from datamodules import Text
from datamodules.splits import SPLITS
from lvd_lightning.parts import Tokens

LINES = [f"line {number} says w{number % 7} and w{number % 5}." for number in range(200)]
SMALL: dict[str, Any] = {"length": 8, "block_lines": 4, "val_fraction": 0.1, "test_fraction": 0.1, "min_count": 1}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Text]:
    """A data module of the lines, set up."""

    def make(path: Path | None = None, **settings: Any) -> Text:
        if path is None:
            path = tmp_path / "lines.txt"
            path.write_text("\n".join(LINES) + "\n")
        data = Text(str(path), **{"cache": str(tmp_path / "cache"), **SMALL, **settings})
        data.setup()
        return data

    return make


def words_of(data: Text, split: Any) -> list[str]:
    return data.vocabulary.decode(data.stream(split))


def test_blocks_of_lines_are_divided(make: Callable[..., Text]) -> None:
    data = make()
    assert [len(data.stream(split)) for split in SPLITS] == [160 * 8, 20 * 8, 20 * 8]
    # The training lines are those of whole blocks of four: no other number of a line is a word of the vocabulary.
    numbers = {int(word) for word in data.vocabulary.words if word.isdecimal()}
    assert len(numbers) == 160
    assert all({first, first + 1, first + 2, first + 3} <= numbers for first in numbers if first % 4 == 0)
    again = make(seed=5)
    assert all(np.array_equal(data.stream(split), again.stream(split)) for split in SPLITS)


def test_the_vocabulary_is_that_of_training_lines(make: Callable[..., Text]) -> None:
    data = make()
    assert set(words_of(data, "train")) == set(data.vocabulary.words) - {"<unk>"}
    assert "<unk>" in words_of(data, "val")
    cut = make(max_words=10)
    assert len(cut.vocabulary) == 10
    assert cut.parts.arguments == Tokens(8, 10).arguments
    assert cut.unit.uniform == 10
    common = make(min_count=2)
    counts = {word: words_of(data, "train").count(word) for word in data.vocabulary.words}
    assert set(common.vocabulary.words) == {w for w, count in counts.items() if count > 1} | {"<unk>"}


def test_windows_do_not_leave_their_passage(make: Callable[..., Text]) -> None:
    # A line has 8 tokens and a block 32; the numbers of lines that follow on each other differ by one.
    data = make(length=20)
    for split in SPLITS:
        for number, start in enumerate(data.window_starts(split)):
            window = data.batch(split, torch.tensor([number]))[0]
            assert window.dtype == torch.int64
            assert window.tolist() == data.stream(split)[start : start + 20].tolist()
            if split == "train":  # whose words are all known
                said = [int(word) for word in data.vocabulary.decode(window) if word.isdecimal()]
                assert len(said) > 1
                assert said == list(range(said[0], said[0] + len(said)))
    assert (make().window_starts("train") % 8 == 0).all()


def test_strides_are_for_training_windows(make: Callable[..., Text]) -> None:
    data, dense = make(), make(stride=2)
    assert dense.num_examples("train") > 3 * data.num_examples("train")
    assert dense.num_examples("val") == data.num_examples("val")
    assert (np.diff(dense.window_starts("train"))[:5] == 2).all()


def test_loaders_give_every_window_with_its_number(make: Callable[..., Text]) -> None:
    data = make(batch_size=16, val_batch_size=4)
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        batches = list(loader)
        index = torch.cat([index for _, index in batches])
        assert sorted(index.tolist()) == list(range(data.num_examples(split)))  # type: ignore[arg-type]
        for x, index in batches:
            assert torch.equal(x, data.batch(split, index))  # type: ignore[arg-type]
    few = make(max_examples=3)
    assert few.num_examples("train") == 3


def test_texts_are_tokenized_once(make: Callable[..., Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make()
    assert isinstance(data.stream("train"), np.memmap)
    monkeypatch.setattr(Text, "tokenize", lambda *_: pytest.fail("again"))
    again = make(batch_size=3, stride=4)
    assert np.array_equal(data.stream("train"), again.stream("train"))
    assert again.vocabulary.words == data.vocabulary.words
    monkeypatch.undo()
    assert not np.array_equal(make(max_words=9).stream("train"), data.stream("train"))
    (folder, *_) = (tmp_path / "cache").iterdir()
    copy = pickle.loads(pickle.dumps(data._windows["train"]))
    assert torch.equal(copy.read(torch.arange(4)), data.batch("train", torch.arange(4)))
    assert isinstance(copy.stream, np.memmap)
    assert folder.is_dir()


def test_a_cache_that_cannot_be_written_is_named(make: Callable[..., Text], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cache: .*file/.* cannot be written .*give another folder as cache"):
        make(cache=str(tmp_path / "file"))


def test_the_identity_is_that_of_the_windows(make: Callable[..., Text], tmp_path: Path) -> None:
    data = make()
    elsewhere = tmp_path / "elsewhere.md"
    elsewhere.write_text("\r\n".join(LINES))
    assert make(elsewhere).identity == data.identity
    assert set(data.identity) == set(SPLITS)
    other = tmp_path / "other.txt"
    other.write_text("\n".join([*LINES[1:], LINES[0]]))
    assert all(make(other).identity[split] != data.identity[split] for split in ("train",))
    assert make(stride=4).identity["val"] == data.identity["val"]
    assert make(stride=4).identity["train"] != data.identity["train"]


def test_folders_and_archives_are_read_alike(make: Callable[..., Text], tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("\n".join(LINES[:101]))
    (folder / "deep" / "b.txt").write_text("\n\n" + "\n\n".join(LINES[101:]))
    (folder / "notes.pdf").write_bytes(b"\0")
    with ZipFile(tmp_path / "texts.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(tmp_path))
    with pytest.warns(UserWarning, match="2 texts are used; left out: 1 .pdf files"):
        data = make(folder)
    assert data.left_out == {".pdf files": 1}
    assert sum(len(data.stream(split)) for split in SPLITS) == 200 * 8
    with pytest.warns(UserWarning, match="left out"):
        assert make(tmp_path / "texts.zip").identity == data.identity


def test_pieces_of_a_tokenizer_are_tokens(make: Callable[..., Text], tmp_path: Path) -> None:
    count = write_tokenizer(tmp_path / "pieces", ["line", "says", "and", ".", "w", *(f"##{n}" for n in range(10))])
    data = make(tokenizer=str(tmp_path / "pieces"), min_count=None)
    assert data.parts.vocabulary == count
    text = " ".join(words_of(data, "train"))
    assert "says w ##1 and w ##1 . [SEP]" in text
    with pytest.raises(ValueError, match="max_words: got 9 with a tokenizer"):
        make(tokenizer="pieces", min_count=None, max_words=9)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty, expected text"),
        (b" \n \n", "is empty"),
        (b"some text\n\x00\x01", "is a binary file .a zero byte in line 2."),
        ("in Genf\ncafé".encode("latin-1"), "is not UTF-8 .byte 0xe9 in line 2.: save it as UTF-8"),
        ("text".encode("utf-16"), "is UTF-16, expected UTF-8"),
    ],
)
def test_files_that_are_no_text_are_named(make: Callable[..., Text], tmp_path: Path, content: bytes, told: str) -> None:
    good, bad = tmp_path / "in" / "good.txt", tmp_path / "in" / "bad.txt"
    good.parent.mkdir()
    good.write_text("\n".join(LINES))
    bad.write_bytes(content)
    for path in (bad, bad.parent):
        with pytest.raises(ValueError, match=f"{bad}: {told}"):
            make(path)
    with ZipFile(tmp_path / "texts.zip", "w") as archive:
        archive.write(bad, "bad.txt")
    with pytest.raises(ValueError, match=f"texts.zip: bad.txt: {told}"):
        make(tmp_path / "texts.zip")


def test_missing_files_and_empty_folders_are_named(make: Callable[..., Text], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none.txt\nexpected a text file, a folder"):
        make(tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: holds no texts; expected files that end in .md"):
        make(tmp_path / "empty")
    (tmp_path / "no.zip").write_text("text")
    with pytest.raises(ValueError, match=r"no.zip: expected a folder or an intact .zip archive of texts"):
        make(tmp_path / "no.zip")


def test_too_little_text_is_told(make: Callable[..., Text]) -> None:
    with pytest.raises(ValueError, match="there are 2 blocks of 100 lines, and the split 'val' has none"):
        make(block_lines=100)
    with pytest.raises(ValueError, match="the split 'val' has 160 tokens and no window of 33"):
        make(length=33)

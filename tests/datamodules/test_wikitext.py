"""WikiText: three files as they are published, one vocabulary of all of them."""

from pathlib import Path

import pytest
import torch

from datamodules import WikiText

TEXTS = {
    "train": " \n = Lobster = \n \n The lobster is a <unk> animal . \n The animal is blue . \n",
    "valid": " \n = Crab = \n \n A crab is a small animal . \n",
    "test": " \n = Shrimp = \n \n It is small . \n",
}


def write(folder: Path) -> WikiText:
    for name, text in TEXTS.items():
        (folder / f"wiki.{name}.tokens").write_text(text)
    return WikiText(str(folder), length=5, cache=str(folder / "cache"))


def test_the_three_files_are_the_splits(tmp_path: Path) -> None:
    data = write(tmp_path)
    data.setup()
    for split, name in (("train", "train"), ("val", "valid"), ("test", "test")):
        expected = TEXTS[name].replace("\n", "<eos> ").split()
        assert data.vocabulary.decode(data.stream(split)) == expected  # type: ignore[arg-type]
        assert data.num_examples(split) == len(expected) // 5  # type: ignore[arg-type]
    words = {word for text in TEXTS.values() for word in text.split()} | {"<eos>"}
    assert set(data.vocabulary.words) == words
    assert (data.vocabulary.words[0], data.parts.vocabulary) == ("<eos>", len(words))
    window = data.batch("train", torch.tensor([1]))[0]
    assert data.vocabulary.decode(window) == ["<eos>", "The", "lobster", "is", "a"]


def test_missing_files_are_listed(tmp_path: Path) -> None:
    data = write(tmp_path)
    (tmp_path / "wiki.valid.tokens").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: .*wiki.valid.tokens\nWikiText: expected a folder with"):
        data.setup()


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    data = write(tmp_path)
    (tmp_path / "wiki.test.tokens").write_bytes(b"\xff text")
    with pytest.raises(ValueError, match=r"wiki.test.tokens: is not UTF-8 \(byte 0xff in line 1\)"):
        data.setup()

"""Words and their numbers: order, cut, unknown words, pieces of a tokenizer."""

from pathlib import Path

import pytest
from helpers.encoders import SIGNS, write_tokenizer

from datamodules.vocabulary import PieceVocabulary, Vocabulary

COUNTS = {"b": 3, "a": 3, "d": 1, "c": 7}


def test_frequent_words_come_first_and_rare_ones_are_cut() -> None:
    assert Vocabulary.from_counts(COUNTS).words == ["<unk>", "<eos>", "c", "a", "b", "d"]
    assert Vocabulary.from_counts(COUNTS, min_count=2).words == ["<unk>", "<eos>", "c", "a", "b"]
    assert Vocabulary.from_counts(COUNTS, max_words=4).words == ["<unk>", "<eos>", "c", "a"]


def test_unknown_words_are_named_or_mapped() -> None:
    vocabulary = Vocabulary.from_counts(COUNTS)
    with pytest.raises(ValueError, match="not in the vocabulary of 6 words: 'x', 'y'; take other words, or map them"):
        vocabulary.encode(["a", "x", "y", "x"])
    assert vocabulary.encode(["a", "x"], unknown="map") == [3, 0]
    without = Vocabulary(["a", "b"])
    assert (without.unknown, without.end) == (None, None)
    with pytest.raises(ValueError, match="words: 'x'; take other words$"):
        without.encode(["x"], unknown="map")
    many = [f"w{number}" for number in range(9)]
    with pytest.raises(ValueError, match="'w4' and 4 more"):
        vocabulary.encode(many)


def test_text_falls_into_words_and_marks() -> None:
    text = "The King's sons, <mask> <unk>; 12 «Éa»"
    words = ["The", "King's", "sons", ",", "<mask>", "<unk>", ";", "12", "«", "Éa", "»"]
    assert Vocabulary(["a", "b"]).tokens(text) == words
    assert Vocabulary(["a", "b"], lowercase=True).tokens(text) == [word.lower() for word in words]
    assert Vocabulary(["a", "b"], punctuation=False).tokens(text) == text.split()
    assert Vocabulary(["a", "b"]).text(["he", "said", ",", "go", "!"]) == "he said, go!"


def test_numbers_beyond_the_vocabulary_are_refused() -> None:
    for number in (-1, 2):
        with pytest.raises(ValueError, match=r"ids: got -?\d, expected numbers of words, 0..1"):
            Vocabulary(["a", "b"]).decode([number])


@pytest.mark.parametrize("words", [["a"], ["a", "b", "a"]])
def test_words_are_two_or_more_and_different(words: list[str]) -> None:
    with pytest.raises(ValueError, match="words: "):
        Vocabulary(words)


def test_pieces_of_a_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path, ["king", "##dom", "the", "."])
    vocabulary = PieceVocabulary(tmp_path)
    assert vocabulary.words == [*SIGNS, "king", "##dom", "the", "."]
    assert vocabulary.tokens("the kingdom <mask>.") == ["the", "king", "##dom", "<mask>", "."]
    assert vocabulary.encode(["the", "king", "##dom"]) == [7, 5, 6]
    assert vocabulary.encode(["queen"], unknown="map") == [1]
    assert vocabulary.end == 3
    assert vocabulary.text(["the", "king"]) == "the king"


def test_a_folder_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"tokenizer: {tmp_path} holds none"):
        PieceVocabulary(tmp_path)

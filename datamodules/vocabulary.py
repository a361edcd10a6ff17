"""The words of a text and their numbers.

Shapes: V words of the vocabulary, N tokens.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from lvd_lightning.checks import check_choice, check_counts, expect

__all__ = ["END", "MASK", "UNKNOWN", "PieceVocabulary", "Vocabulary"]

UNKNOWN, END, MASK = "<unk>", "<eos>", "<mask>"

# Words with their apostrophes, numbers, marks one by one; signs in angle brackets stay whole.
_WORDS = re.compile(r"<(?:unk|eos|mask)>|\w+(?:['’]\w+)*|[^\w\s]")
_NAMED = 5  # unknown words that a message names


class Vocabulary:
    """Words, numbered 0..V-1.

    words: the word of every number.
    pieces: whether words are a tokenizer's pieces of words.

    Args:
        words: all different, `<unk>` and `<eos>` among them if the text has such signs.
        lowercase: whether text is taken in lower case.
        punctuation: whether marks are words of their own; else words are what stands between spaces.

    Raises:
        ValueError: fewer than two words, or one that comes twice.

    Example:
        >>> from datamodules.vocabulary import Vocabulary
        >>> vocabulary = Vocabulary(["<unk>", "<eos>", "the", "king"], lowercase=True)
        >>> vocabulary.tokens("The king's <mask>.")
        ['the', "king's", '<mask>', '.']
        >>> vocabulary.encode(["the", "king"]), vocabulary.decode([3, 1])
        ([2, 3], ['king', '<eos>'])
        >>> vocabulary.encode(["the", "queen"])
        Traceback (most recent call last):
        ValueError: not in the vocabulary of 4 words: 'queen'; take other words, or map them to <unk>
        >>> vocabulary.encode(["the", "queen"], unknown="map")
        [2, 0]
    """

    pieces = False

    def __init__(self, words: Sequence[str], lowercase: bool = False, punctuation: bool = True) -> None:
        self.words = list(words)
        self.lowercase = lowercase
        self.punctuation = punctuation
        self._number = {word: number for number, word in enumerate(self.words)}
        expect(len(self.words) >= 2, "words", self.words, "two words or more")
        if len(self._number) < len(self.words):
            twice = next(word for number, word in enumerate(self.words) if self._number[word] != number)
            raise ValueError(f"words: {twice!r} comes twice; every word of a vocabulary has one number")

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], max_words: int | None = None, min_count: int = 1, **settings: Any
    ) -> "Vocabulary":
        """`<unk>`, `<eos>`, then the words that come at least `min_count` times, the most frequent first.

        Words of one count are in alphabetical order.

        Args:
            counts: how often each word comes.
            max_words: words of the vocabulary at most, the two signs among them.
            min_count: rarer words are left to `<unk>`.
            **settings: as in `Vocabulary`.
        """
        check_counts(max_words=max_words, min_count=min_count)
        kept = [word for word, count in counts.items() if count >= min_count and word not in (UNKNOWN, END)]
        kept.sort(key=lambda word: (-counts[word], word))
        return cls([UNKNOWN, END, *kept][:max_words], **settings)

    def __len__(self) -> int:
        return len(self.words)

    @property
    def unknown(self) -> int | None:
        """The number that stands for all other words, if there is one."""
        return self._number.get(UNKNOWN)

    @property
    def end(self) -> int | None:
        """The number of the sign at the end of a line, if there is one."""
        return self._number.get(END)

    def tokens(self, text: str) -> list[str]:
        """The words of a text, known ones or not; `<mask>`, `<unk>` and `<eos>` stay whole."""
        text = text.lower() if self.lowercase else text
        return _WORDS.findall(text) if self.punctuation else text.split()

    def encode(self, words: Iterable[str], unknown: str = "refuse") -> list[int]:
        """The numbers of words.

        unknown: "refuse" words that are not in the vocabulary, or "map" them to `<unk>`.

        Raises:
            ValueError: there are unknown words, which the message names, or there is no `<unk>` to map them to.
        """
        check_choice(("refuse", "map"), unknown=unknown)
        words = list(words)
        if unknown == "map" and self.unknown is not None:
            other = self.unknown
            return [self._number.get(word, other) for word in words]
        missing = list(dict.fromkeys(word for word in words if word not in self._number))
        if missing:
            named = ", ".join(map(repr, missing[:_NAMED]))
            more = f" and {len(missing) - _NAMED} more" * (len(missing) > _NAMED)
            remedy = "" if self.unknown is None else ", or map them to <unk>"
            raise ValueError(f"not in the vocabulary of {len(self)} words: {named}{more}; take other words{remedy}")
        return [self._number[word] for word in words]

    def decode(self, ids: Iterable[int]) -> list[str]:
        """The words of numbers.

        Raises:
            ValueError: a number that is none of a word.
        """
        ids = [int(number) for number in ids]
        for number in ids:
            expect(0 <= number < len(self), "ids", number, f"numbers of words, 0..{len(self) - 1}")
        return [self.words[number] for number in ids]

    def text(self, words: Iterable[str]) -> str:
        """Words as a person reads them: marks stand close to the word before."""
        found = " ".join(words)
        return re.sub(r" ([,.;:!?)])", r"\1", found) if self.punctuation else found


class PieceVocabulary(Vocabulary):
    """The pieces of words that a tokenizer of transformers knows.

    Args:
        folder: with the tokenizer's files; nothing is downloaded.

    Raises:
        ValueError: there is no tokenizer in the folder.
    """

    pieces = True

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"tokenizer: {folder} holds none that transformers can read ({error}): give a folder with "
                "tokenizer.json, or with the files that its kind of tokenizer has"
            ) from error
        super().__init__(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        self._tokenizer = tokenizer

    @property
    @override
    def unknown(self) -> int | None:
        found: int | None = self._tokenizer.unk_token_id
        return found

    @property
    @override
    def end(self) -> int | None:
        found = self._tokenizer.eos_token_id
        return self._tokenizer.sep_token_id if found is None else found

    @override
    def tokens(self, text: str) -> list[str]:
        found: list[str] = []
        for part in re.split(f"({MASK})", text):
            found += [MASK] if part == MASK else self._tokenizer.tokenize(part)
        return found

    @override
    def text(self, words: Iterable[str]) -> str:
        found: str = self._tokenizer.convert_tokens_to_string(list(words))
        return found

"""Any text of one's own; by default four books of the King James Bible, which the repository carries."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from datamodules.files import resolve
from datamodules.language import LanguageDataModule
from datamodules.splits import SPLITS, Split, check_fractions, divide
from datamodules.text_files import TextFile, read_texts
from datamodules.token_streams import Tokenized
from datamodules.vocabulary import PieceVocabulary, Vocabulary
from lvd_lightning.checks import check_counts

__all__ = ["EXCERPT", "Text"]

# The books of Samuel and Kings of the King James Bible, one verse a line, without references: 480 kB, 93,000 words.
# The translation of 1611 is in the public domain.
EXCERPT = Path(__file__).with_name("king_james.txt")


class Text(LanguageDataModule):
    """Windows of a text: a UTF-8 file, the text files of a folder or of a .zip archive.

    Lines that hold something are divided among the splits by blocks of `block_lines` lines, by one fixed permutation of
    the blocks, which no seed changes. Every line ends in `<eos>`. The vocabulary is that of the training split; other
    words are `<unk>`. No window reaches over the end of a file, or from one block into another that did not follow on
    it.

    Args:
        path: the file, folder or archive; by default the books of Samuel and Kings of the King James Bible (public
            domain, one verse a line), which come with this data module.
        tokenizer: a folder with a tokenizer that transformers can read; tokens are its pieces of words then.
        max_words: words of the vocabulary at most, the most frequent ones, `<unk>` and `<eos>` among them.
        min_count: words that come less often in the training split are `<unk>`.
        lowercase: whether text is taken in lower case.
        punctuation: whether marks are words of their own; else words are what stands between spaces.
        block_lines: lines of a block.
        val_fraction: how much of the blocks is for validation.
        test_fraction: how much of the blocks is for the test.
        **common: the settings of every `LanguageDataModule`: length, stride, batch_size, cache, ...

    Raises:
        FileNotFoundError: at `setup`, there is nothing at the path.
        ValueError: a setting is out of range; at `setup`, a file is empty, binary or not UTF-8 (the message names it),
            or there is too little text for three splits.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from datamodules import Text
        >>> with TemporaryDirectory() as folder:
        ...     data = Text(cache=folder)
        ...     data.setup()
        ...     window = data.batch("train", torch.tensor([0]))[0]
        >>> window.shape, data.parts.num_parts, data.unit.name
        (torch.Size([32]), 32, 'ppl')
        >>> data.vocabulary.text(data.vocabulary.decode(window[:10]))
        'now there was a certain man of <unk>, of'
    """

    def __init__(
        self,
        path: str | None = None,
        tokenizer: str | None = None,
        max_words: int | None = None,
        min_count: int | None = None,
        lowercase: bool | None = None,
        punctuation: bool | None = None,
        block_lines: int = 20,
        val_fraction: float = 0.05,
        test_fraction: float = 0.05,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        check_fractions(val_fraction, test_fraction)
        check_counts(max_words=max_words, min_count=min_count, block_lines=block_lines)
        own = {"max_words": max_words, "min_count": min_count, "lowercase": lowercase, "punctuation": punctuation}
        given = [name for name, value in own.items() if value is not None]
        if tokenizer is not None and given:
            raise ValueError(
                f"{given[0]}: got {own[given[0]]!r} with a tokenizer, whose pieces are the vocabulary: leave it away"
            )
        self.path = path
        self.tokenizer = tokenizer
        self.max_words = max_words or 8000
        self.min_count = min_count or 2
        self.lowercase = lowercase is None or lowercase
        self.punctuation = punctuation is None or punctuation
        self.block_lines = block_lines
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self._pieces: PieceVocabulary | None = None

    @property
    @override
    def token_settings(self) -> Mapping[str, Any]:
        blocks = {"block_lines": self.block_lines, "val": self.val_fraction, "test": self.test_fraction}
        if self.tokenizer is not None:
            return blocks | {"pieces": self._tokenizer().words}
        own = {"max_words": self.max_words, "min_count": self.min_count, "lowercase": self.lowercase}
        return blocks | own | {"punctuation": self.punctuation}

    @override
    def read(self) -> list[TextFile]:
        path = EXCERPT if self.path is None else resolve(self.path)
        files, self.left_out = read_texts(path)
        if self.left_out:
            told = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            rank_zero_warn(f"{path}: {len(files)} texts are used; left out: {told}")
        return files

    @override
    def known_vocabulary(self, words: list[str]) -> Vocabulary:
        if self.tokenizer is not None:
            return self._tokenizer()
        return Vocabulary(words, lowercase=self.lowercase, punctuation=self.punctuation)

    @override
    def tokenize(self, files: list[TextFile]) -> Tokenized:
        blocks = [block for file in files for block in self._blocks(file)]
        split_of = self._splits_of_blocks(len(blocks))
        if self.tokenizer is None:
            counts: Counter[str] = Counter()
            reader = Vocabulary(["", " "], lowercase=self.lowercase, punctuation=self.punctuation)
            for (_, lines), split in zip(blocks, split_of):
                if split == "train":
                    counts.update(word for line in lines for word in reader.tokens(line))
            vocabulary: Vocabulary = Vocabulary.from_counts(
                counts, self.max_words, self.min_count, lowercase=self.lowercase, punctuation=self.punctuation
            )
        else:
            vocabulary = self._tokenizer()
        end = [] if vocabulary.end is None else [vocabulary.end]
        ids: dict[Split, list[np.ndarray]] = {split: [] for split in SPLITS}
        ends: dict[Split, list[int]] = {split: [] for split in SPLITS}
        length = dict.fromkeys(SPLITS, 0)
        for number, ((begins, lines), split) in enumerate(zip(blocks, split_of)):
            if (begins or split_of[number - 1] != split) and length[split]:
                ends[split].append(length[split])
            found = [one for line in lines for one in (*vocabulary.encode(vocabulary.tokens(line), "map"), *end)]
            ids[split].append(np.array(found, dtype=np.int32))
            length[split] += len(found)
        return Tokenized(
            vocabulary,
            {split: np.concatenate(ids[split]) for split in SPLITS},
            {split: np.array([*ends[split], length[split]], dtype=np.int64) for split in SPLITS},
        )

    def _blocks(self, file: TextFile) -> Iterator[tuple[bool, list[str]]]:
        """Blocks of a file's lines that hold something, and whether each is the file's first."""
        lines = [line for line in file.lines if line.strip()]
        for start in range(0, len(lines), self.block_lines):
            yield start == 0, lines[start : start + self.block_lines]

    def _splits_of_blocks(self, count: int) -> list[Split]:
        rows = divide(count, self.val_fraction, self.test_fraction)
        found: list[Split] = ["train"] * count
        for split in SPLITS:
            if not len(rows[split]):
                raise ValueError(
                    f"Text: there are {count} blocks of {self.block_lines} lines, and the split {split!r} has none of "
                    "them: give more text, choose fewer block_lines, or a larger fraction for that split"
                )
            for row in rows[split]:
                found[row] = split
        return found

    def _tokenizer(self) -> PieceVocabulary:
        assert self.tokenizer is not None
        if self._pieces is None:
            self._pieces = PieceVocabulary(resolve(self.tokenizer))
        return self._pieces

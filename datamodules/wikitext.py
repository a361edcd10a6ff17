"""WikiText, by words, as it is published."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from datamodules.files import require, resolve
from datamodules.language import LanguageDataModule
from datamodules.splits import SPLITS, Split
from datamodules.text_files import TextFile, read_texts
from datamodules.token_streams import Tokenized, starts_of_windows
from datamodules.vocabulary import END, Vocabulary
from lvd_lightning.parts import Tokens

__all__ = ["WikiText"]

#: Tokens of the three files, and words of the vocabulary, by the name of the folder.
PUBLISHED = {
    "wikitext-2": (2_088_628, 217_646, 245_569, 33_278),
    "wikitext-103": (103_227_021, 217_646, 245_569, 267_735),
}
FILES: dict[Split, str] = {"train": "wiki.train.tokens", "val": "wiki.valid.tokens", "test": "wiki.test.tokens"}
EXPECTED = (
    "WikiText: expected a folder with wiki.train.tokens, wiki.valid.tokens and wiki.test.tokens, as the archive "
    "wikitext-2-v1.zip (or wikitext-103-v1.zip) holds them."
)


class WikiText(LanguageDataModule):
    """Windows of WikiText-2 or WikiText-103: the files of the word level, whose rare words are `<unk>` already.

    Words are what stands between spaces, and every line ends in `<eos>`, empty ones too. The vocabulary is that of the
    three files together, as the data set is published: 33,278 words of WikiText-2, 267,735 of WikiText-103. The most
    frequent words come first.

    Args:
        path: the folder of the three files.
        **common: the settings of every `LanguageDataModule`: length, stride, batch_size, cache, ...

    Raises:
        FileNotFoundError: at `setup`, a file is missing.
        ValueError: a setting is out of range; at `setup`, a file is empty, binary or not UTF-8 (the message names it).

    References:
        Merity et al., Pointer Sentinel Mixture Models, 2017, arXiv:1609.07843.

    Example:
        >>> from pathlib import Path
        >>> from tempfile import TemporaryDirectory
        >>> import torch
        >>> from datamodules import WikiText
        >>> with TemporaryDirectory() as folder:
        ...     for name in ("train", "valid", "test"):
        ...         text = " = A Title = \\n \\n The <unk> is a lobster .\\n"
        ...         _ = (Path(folder) / f"wiki.{name}.tokens").write_text(text)
        ...     data = WikiText(folder, length=4, cache=folder)
        ...     data.setup()
        ...     windows = data.batch("train", torch.arange(3))
        >>> [" ".join(data.vocabulary.decode(window)) for window in windows]
        ['= A Title =', '<eos> <eos> The <unk>', 'is a lobster .']
    """

    def __init__(self, path: str = "data/wikitext-2", **common: Any) -> None:
        super().__init__(**common)
        self.path = path

    @override
    def published(self) -> tuple[dict[str, int], Tokens] | None:
        found = PUBLISHED.get(Path(self.path).name)
        if found is None:
            return None
        *tokens, words = found
        counts = {}
        for split, count in zip(SPLITS, tokens):
            stride = self.stride if split == "train" else self.length
            windows = len(starts_of_windows(np.array([count]), self.length, stride))
            counts[str(split)] = windows if self.max_examples is None else min(windows, self.max_examples)
        return counts, Tokens(self.length, words)

    @property
    @override
    def token_settings(self) -> Mapping[str, Any]:
        return {}

    @override
    def read(self) -> list[TextFile]:
        folder = resolve(self.path)
        require([folder / name for name in FILES.values()], EXPECTED)
        return [read_texts(folder / name)[0][0] for name in FILES.values()]

    @override
    def known_vocabulary(self, words: list[str]) -> Vocabulary:
        return Vocabulary(words, punctuation=False)

    @override
    def tokenize(self, files: list[TextFile]) -> Tokenized:
        words = {split: [*_words(file)] for split, file in zip(FILES, files)}
        counts: Counter[str] = Counter()
        for found in words.values():
            counts.update(found)
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        vocabulary = self.known_vocabulary(ordered)
        streams = {split: np.array(vocabulary.encode(found), dtype=np.int32) for split, found in words.items()}
        ends = {split: np.array([len(stream)], dtype=np.int64) for split, stream in streams.items()}
        return Tokenized(vocabulary, streams, ends)


def _words(file: TextFile) -> list[str]:
    return [word for line in file.lines for word in (*line.split(), END)]

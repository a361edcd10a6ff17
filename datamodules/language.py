"""The frame of every data module of text: token streams on disk, windows of them, perplexity, loaders.

Shapes: T tokens of a window, V words, N tokens of a stream, n windows.
"""

import json
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from typing_extensions import override

from datamodules.identity import digest
from datamodules.loaders import GlobalLoaders
from datamodules.splits import SPLITS, Split, subset
from datamodules.text_files import TextFile
from datamodules.token_streams import Starts, Stream, Tokenized, TokenStreams, Windows, cache_folder, starts_of_windows
from datamodules.vocabulary import Vocabulary
from lvd_lightning.checks import check_at_least, check_choice, check_counts
from lvd_lightning.parts import Tokens
from lvd_lightning.units import Perplexity, Unit

__all__ = ["LanguageDataModule"]


class LanguageDataModule(GlobalLoaders):
    """Windows of T tokens of a text in the splits train, val and test.

    Loaders yield (x, index): windows int64 (b, T), and their int64 numbers (b,) in the split. Which windows a split
    holds never depends on `seed`; the order of training is a function of (seed, epoch) alone. Tokens are kept on disk
    as int32 and mapped into memory: a text is tokenized once, as long as it and the settings stay the same.

    A subclass reads files in `read` and makes tokens of them in `tokenize`.

    Args:
        length: tokens of a window, T.
        stride: from the beginning of a training window to that of the next one; `length` by default: windows do not
            overlap then. Those for validation and test never do.
        batch_size: windows per training step, all ranks together.
        num_workers: processes that read batches; 0 reads in the main process.
        seed: the seed of the training order.
        val_batch_size: windows per validation or test step, all ranks together; `batch_size` by default.
        max_examples: at most so many windows per split, for small runs.
        cache: the folder that tokens are kept in, by default `lvd_lightning/tokens` in the user's cache.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> from datamodules import LanguageDataModule, Text
        >>> with TemporaryDirectory() as folder:
        ...     data: LanguageDataModule = Text(length=16, stride=8, cache=folder)
        ...     data.setup()
        >>> data.window_starts("train")[:3].tolist(), data.window_starts("val")[:3].tolist()
        ([0, 8, 16], [0, 16, 32])
        >>> data.vocabulary.decode(data.stream("train")[:3])
        ['now', 'there', 'was']
    """

    def __init__(
        self,
        *,
        length: int = 32,
        stride: int | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        max_examples: int | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        check_counts(length=length, stride=stride, batch_size=batch_size)
        check_counts(val_batch_size=val_batch_size, max_examples=max_examples)
        check_at_least(0, num_workers=num_workers, seed=seed)
        self.length = length
        self.stride = stride or length
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_batch_size = val_batch_size or batch_size
        self.max_examples = max_examples
        self.cache = cache
        self.left_out: dict[str, int] = {}  # files that were not used, by reason
        self._vocabulary: Vocabulary | None = None
        self._windows: dict[Split, Windows] = {}
        self._identity: dict[str, str] = {}

    @abstractmethod
    def read(self) -> list[TextFile]:
        """The files, in a fixed order; raises an error that names one that is missing or no text."""

    @abstractmethod
    def tokenize(self, files: list[TextFile]) -> Tokenized:
        """The tokens of every split."""

    @property
    @abstractmethod
    def token_settings(self) -> Mapping[str, Any]:
        """The settings, plain values, that tokens and splits follow from, beside the files."""

    @abstractmethod
    def known_vocabulary(self, words: list[str]) -> Vocabulary:
        """The vocabulary of words that were kept."""

    def published(self) -> tuple[dict[str, int], Tokens] | None:
        """The number of windows of every split, and their parts, known before anything is read; None if they are not.

        For plans: what is read counts.
        """
        return None

    @override
    def prepare_data(self) -> None:
        """Tokenize the text, so that other processes of this machine find it done."""
        self.setup()

    @override
    def setup(self, stage: str | None = None) -> None:
        """Read the text, once, and tokenize it unless that was done before.

        Raises:
            FileNotFoundError: the text is not where the settings say; the message tells what belongs there.
            ValueError: a file is empty, binary or not UTF-8, or a split has no windows.
        """
        if self._windows:
            return
        files = self.read()
        settings = json.dumps({"kind": type(self).__name__, "form": 1, **self.token_settings}, sort_keys=True)
        key = digest(settings.encode(), *(file.digest.encode() for file in files))
        folder = cache_folder(self.cache) / key
        if TokenStreams.are_in(folder):
            streams = TokenStreams(folder)
        else:
            streams = TokenStreams.write(folder, self.tokenize(files))
        self._vocabulary = self.known_vocabulary(streams.words)
        windows: dict[Split, Windows] = {}
        for split in SPLITS:
            stride = self.stride if split == "train" else self.length
            starts = starts_of_windows(streams.ends(split), self.length, stride)
            if not len(starts):
                raise ValueError(
                    f"{type(self).__name__}: the split {split!r} has {len(streams.stream(split))} tokens and no window "
                    f"of {self.length}: give more text, or choose a smaller length"
                )
            starts = starts[np.sort(subset(len(starts), self.max_examples))]
            windows[split] = Windows(streams, split, starts, self.length)
        self._windows = windows

    @property
    def vocabulary(self) -> Vocabulary:
        """The words and their numbers; reads the text if that was not done yet."""
        self.setup()
        assert self._vocabulary is not None
        return self._vocabulary

    @property
    def parts(self) -> Tokens:
        """The tokens of a window; reads the text if that was not done yet."""
        return Tokens(self.length, len(self.vocabulary))

    @property
    def num_dims(self) -> int:
        """Tokens of a window, T."""
        return self.length

    @property
    def unit(self) -> Unit:
        """Perplexity per token of a window, whose first tokens have no context."""
        return Perplexity(float(len(self.vocabulary)))

    @property
    def protocol(self) -> str:
        """What stands in brackets beside every figure."""
        return f"windows of {self.length}"

    @property
    def facts(self) -> dict[str, Any]:
        """The protocol for scripts."""
        return {"window": self.length, "vocabulary": len(self.vocabulary)}

    def stream(self, split: Split) -> Stream:
        """The tokens of a split, int32 (N,), mapped from disk."""
        return self.dataset(split).stream

    def window_starts(self, split: Split) -> Starts:
        """Where in the stream the windows of a split begin, int64 (n,)."""
        return self.dataset(split).starts

    @property
    def identity(self) -> dict[str, str]:
        """A digest of every split: another one says that its windows, or the words, are others.

        It does not depend on where the text lies.
        """
        if not self._identity:
            words = "\n".join(self.vocabulary.words).encode("utf-8", "surrogateescape")
            for split in SPLITS:
                starts, stream = self.window_starts(split), self.stream(split)
                shape = f"{self.length} {len(starts)}".encode()
                self._identity[split] = digest(words, shape, starts.tobytes(), np.ascontiguousarray(stream).tobytes())
        return dict(self._identity)

    def num_examples(self, split: Split) -> int:
        """The number of windows in a split."""
        return len(self.dataset(split))

    def batch(self, split: Split, indices: Tensor) -> Tensor:
        """Read windows by their int64 numbers (n,), as int64 (n, T) on the CPU."""
        return self.dataset(split).read(indices.cpu())

    @override
    def dataset(self, split: Split) -> Windows:
        check_choice(SPLITS, split=split)
        if not self._windows:
            raise RuntimeError(f"{type(self).__name__} holds no text yet: call setup() first")
        return self._windows[split]

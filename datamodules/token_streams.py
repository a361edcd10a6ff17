"""The tokens of a text's splits on disk, mapped into memory, and windows of them.

Shapes: N tokens of a stream, S passages, n windows, T tokens of a window.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.loaders import Batch
from datamodules.splits import SPLITS, Split
from datamodules.vocabulary import Vocabulary
from lvd_lightning.files import read_array, read_json, write_array, write_json

__all__ = ["Stream", "TokenStreams", "Tokenized", "Windows", "cache_folder", "starts_of_windows"]

Stream = npt.NDArray[np.int32]
Starts = npt.NDArray[np.int64]

_FACTS = "tokens.json"  # written last


class Tokenized(NamedTuple):
    """A text as numbers.

    vocabulary: what they are numbers of.
    streams: int32 (N,) by split.
    ends: where each passage of a stream ends, int64 (S,) by split, the last one N; what follows on a passage's end is
        not what follows in the text.
    """

    vocabulary: Vocabulary
    streams: Mapping[Split, Stream]
    ends: Mapping[Split, Starts]


class TokenStreams:
    """The streams of a folder, mapped into memory when they are asked for.

    Args:
        folder: where `write` left them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.words: list[str] = read_json(folder / _FACTS)["words"]

    @staticmethod
    def are_in(folder: Path) -> bool:
        """Whether streams were written there to the end."""
        return (folder / _FACTS).is_file()

    @classmethod
    def write(cls, folder: Path, tokenized: Tokenized) -> "TokenStreams":
        """Write streams into a folder; several processes may do so at once, with the same streams.

        Raises:
            ValueError: nothing can be written there.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for split in SPLITS:
                write_array(folder / f"{split}.npy", tokenized.streams[split])
                write_array(folder / f"{split}_ends.npy", tokenized.ends[split])
            write_json(folder / _FACTS, {"words": tokenized.vocabulary.words})
        except OSError as error:
            raise ValueError(f"cache: {folder} cannot be written ({error}): give another folder as cache") from error
        return cls(folder)

    def stream(self, split: Split) -> Stream:
        """The tokens of a split, int32 (N,)."""
        return read_array(self.folder / f"{split}.npy", mmap_mode="r")

    def ends(self, split: Split) -> Starts:
        """Where the passages of a split end, int64 (S,)."""
        return read_array(self.folder / f"{split}_ends.npy")


def cache_folder(given: str | None) -> Path:
    """Where streams are kept: the folder that a user gives, or one in the user's cache."""
    if given is not None:
        return Path(given).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "lvd_lightning" / "tokens"


def starts_of_windows(ends: Starts, length: int, stride: int) -> Starts:
    """Where windows begin that lie in one passage each, int64 (n,), ascending.

    Args:
        ends: of the passages, ascending.
        length: tokens of a window.
        stride: from the beginning of a window to that of the next one.

    Example:
        >>> import numpy as np
        >>> from datamodules.token_streams import starts_of_windows
        >>> starts_of_windows(np.array([10, 13, 20]), length=4, stride=3).tolist()  # none fits into the second one
        [0, 3, 6, 13, 16]
    """
    found = [np.zeros(0, dtype=np.int64)]
    for begin, end in zip([0, *ends[:-1].tolist()], ends.tolist()):
        found.append(np.arange(begin, end - length + 1, stride, dtype=np.int64))
    return np.concatenate(found)


class Windows(Dataset[Batch]):
    """Windows of a stream as a dataset of (window, number) pairs that reads whole batches at once.

    Args:
        streams: where the stream is.
        split: which one.
        starts: where windows begin, int64 (n,).
        length: tokens of a window, T.
    """

    def __init__(self, streams: TokenStreams, split: Split, starts: Starts, length: int) -> None:
        self._streams, self._split, self.starts, self._length = streams, split, starts, length
        self.stream = streams.stream(split)

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, numbers: Tensor) -> Tensor:
        """Windows, int64 (n, T), by their int64 numbers (n,)."""
        places = self.starts[numbers.numpy()][:, None] + np.arange(self._length)
        return torch.from_numpy(self.stream[places].astype(np.int64))

    def __getitem__(self, index: int) -> Batch:
        return self.read(torch.tensor([index]))[0], torch.tensor(index)

    def __getitems__(self, indices: list[int]) -> Batch:
        """The windows (n, T) and their numbers (n,)."""
        numbers = torch.tensor(indices, dtype=torch.int64)
        return self.read(numbers), numbers

    def __reduce__(self) -> tuple[type["Windows"], tuple[Any, ...]]:
        # A worker process maps the file again; pickling a map would send all of its contents.
        return Windows, (self._streams, self._split, self.starts, self._length)

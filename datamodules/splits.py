"""How examples are divided into train, val and test: by name or by number, never by a run's seed."""

import hashlib
import unicodedata
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

__all__ = [
    "SPLITS",
    "Rows",
    "Split",
    "carve",
    "check_fractions",
    "divide",
    "position_of_name",
    "split_of_name",
    "subset",
]

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Rows = npt.NDArray[np.int64]


def check_fractions(val_fraction: float, test_fraction: float) -> None:
    """Raise a ValueError unless all three splits get a part."""
    if not (val_fraction > 0 and test_fraction > 0 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction, test_fraction: got {val_fraction} and {test_fraction}, "
            "expected positive numbers that leave something for training"
        )


def position_of_name(name: str) -> float:
    """A number in [0, 1) that is a function of the name, spread evenly."""
    composed = unicodedata.normalize("NFC", name)  # file systems differ in how they write an accent
    digest = hashlib.sha256(composed.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_of_name(name: str, val_fraction: float, test_fraction: float) -> Split:
    """The split of an example by a hash of its name: the same on every machine, whatever other examples there are.

    The test set does not depend on `val_fraction`.
    """
    position = position_of_name(name)
    if position < test_fraction:
        return "test"
    return "val" if position < test_fraction + val_fraction else "train"


def carve(count: int, num_carved: int) -> tuple[Rows, Rows]:
    """Divide the rows 0..count-1 into (rest, carved), each ascending, by one fixed permutation."""
    order = _permutation(count)
    return np.sort(order[num_carved:]), np.sort(order[:num_carved])


def divide(count: int, val_fraction: float, test_fraction: float) -> dict[Split, Rows]:
    """Divide the rows 0..count-1 by one fixed permutation; the test set does not depend on `val_fraction`."""
    order = _permutation(count)
    num_test, num_val = round(count * test_fraction), round(count * val_fraction)
    test, val, train = np.split(order, [num_test, num_test + num_val])
    return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}


def subset(count: int, max_examples: int | None) -> Rows:
    """All rows 0..count-1, or `max_examples` of them by one fixed permutation, smaller subsets within larger ones."""
    if max_examples is None or max_examples >= count:
        return np.arange(count, dtype=np.int64)
    return _permutation(count)[:max_examples]


def _permutation(count: int) -> Rows:
    # RandomState because its stream is frozen, while that of numpy's newer generators may change between versions.
    return np.random.RandomState(0).permutation(count).astype(np.int64, copy=False)

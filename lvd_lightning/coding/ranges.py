"""Range coding of values by whole-number frequencies, by the library `constriction`.

Shapes: B values coded together, V values that each may have.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["RangeReader", "RangeWriter"]

Words = npt.NDArray[np.uint32]


class RangeWriter:
    """Collects values; what a frequency of 0 belongs to costs 24 bits and can be coded all the same.

    Frequencies are whole numbers whose sums single precision holds exactly, so that the library's own arithmetic finds
    the same intervals everywhere.

    Example:
        >>> import torch
        >>> frequencies = torch.tensor([[3.0, 1.0, 0.0], [0.0, 8.0, 8.0]], dtype=torch.float64)
        >>> writer = RangeWriter()
        >>> writer.add(torch.tensor([0, 2]), frequencies)
        >>> RangeReader(writer.words()).take(frequencies)
        tensor([0, 2])
    """

    def __init__(self) -> None:
        import constriction

        self._coder = constriction.stream.queue.RangeEncoder()
        self._family = _family()

    def add(self, values: Tensor, frequencies: Tensor) -> None:
        """values: int64 (B,); frequencies: float64 (B, V) on the CPU."""
        self._coder.encode(values.to(torch.int32).numpy(), self._family, _positive(frequencies))

    def words(self) -> Words:
        """What was collected."""
        found: Words = self._coder.get_compressed()
        return found


class RangeReader:
    """Gives back what a `RangeWriter` was told, when asked with the same frequencies in the same order."""

    def __init__(self, words: Words) -> None:
        import constriction

        self._coder = constriction.stream.queue.RangeDecoder(words)
        self._family = _family()

    def take(self, frequencies: Tensor) -> Tensor:
        """The next values, int64 (B,)."""
        return torch.from_numpy(self._coder.decode(self._family, _positive(frequencies))).long()

    @property
    def is_at_end(self) -> bool:
        """Whether it may be that nothing is left."""
        return bool(self._coder.maybe_exhausted())


def _positive(frequencies: Tensor) -> npt.NDArray[np.float32]:
    """Rows of a positive sum: one without any frequency is uniform."""
    some = torch.where(frequencies.sum(1, keepdim=True) > 0, frequencies, 1.0)
    return some.to(torch.float32).contiguous().numpy()


def _family() -> Any:
    import constriction

    return constriction.stream.model.Categorical(perfect=False)

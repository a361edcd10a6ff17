"""A loader that goes on within an epoch: with the batch after the last one that was trained on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch.utils.data import DataLoader

__all__ = ["ResumableLoader", "SkipsBatches"]


class SkipsBatches(Protocol):
    """A sampler whose next iteration leaves out its first `skip` batches, and sets `skip` to 0 then."""

    skip: int


class ResumableLoader(DataLoader[Any]):
    """What Lightning asks for to resume within an epoch: `state_dict` and `load_state_dict`.

    order: the sampler that gives batches.
    trainer: says how many batches of the epoch it has trained on; the loader itself has read ahead.
    arguments: of the DataLoader.
    """

    def __init__(self, *arguments: Any, order: SkipsBatches, trainer: Any, **named: Any) -> None:
        self._order, self._trainer = order, trainer
        super().__init__(*arguments, **named)

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch are done."""
        return {"batches": int(self._trainer.fit_loop.epoch_loop.batch_progress.current.ready)}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Begin the next iteration after so many batches."""
        self._order.skip = int(state["batches"])

"""The seconds that a stage takes, over all its interruptions."""

import time
from typing import Any

from lightning.pytorch import Callback
from typing_extensions import override

__all__ = ["Stopwatch"]


class Stopwatch(Callback):
    """Seconds spent on a stage, summed over interruptions.

    The time up to an epoch-end checkpoint travels in the checkpoint, so an epoch that was lost and is done again counts
    once: the figure says how long the result took, not how long the machine was up.
    """

    def __init__(self) -> None:
        self._earlier = 0.0
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return self._earlier + time.monotonic() - self._start

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._earlier = float(state_dict["seconds"])

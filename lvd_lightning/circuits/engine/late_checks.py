"""Was every value in the support of its variable? Asked without waiting for the device.

On the CPU the answer is there at once. On an accelerator it is written to a flag on the device, which is copied to the
host behind the work that was queued before; the error is raised by a later call, once the copy has arrived.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["LateCheck", "is_late"]


def is_late(device: torch.device) -> bool:
    """Whether checks of values on this device are answered later."""
    return device.type == "cuda"


class LateCheck:
    """Flags on the device, one for each of the `names` of what can be wrong, that stay up until somebody reads them.

    A CUDA graph that was captured over `add` raises the same flags whenever it is replayed. Copies start with none.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.flags: Tensor | None = None
        self.copy: Tensor | None = None
        self.arrival: torch.cuda.Event | None = None
        self.is_pending = False

    def add(self, first: int, outside: Sequence[Tensor]) -> None:
        """Take note of bool tensors () that are True where something is wrong, for the names from `first` on.

        Nothing is read. One copy at a time is under way: it would never arrive if every call started it anew.
        """
        found = torch.stack(list(outside))
        if self.flags is None or self.flags.device != found.device:
            with torch.inference_mode(False):
                self.flags = torch.zeros(len(self.names), dtype=torch.bool, device=found.device)
                self.copy = torch.zeros(len(self.names), dtype=torch.bool, pin_memory=found.is_cuda)
            self.is_pending = False
        self.flags[first : first + len(found)].logical_or_(found)
        if not self.is_pending and not _is_capturing(found):
            assert self.copy is not None
            self.copy.copy_(self.flags, non_blocking=True)
            if found.is_cuda:
                self.arrival = torch.cuda.Event()
                self.arrival.record(torch.cuda.current_stream(found.device))
            self.is_pending = True

    def ask(self, wait: bool = False) -> None:
        """Raise a ValueError if a flag is up, of those that have arrived; with `wait`, of all.

        Raises:
            ValueError: an earlier call got a value outside the support of its variable.
        """
        if self.flags is None or _is_capturing(self.flags):
            return
        if wait:
            bad = self.flags.tolist()
        elif self.is_pending and (self.arrival is None or self.arrival.query()):
            assert self.copy is not None
            bad = self.copy.tolist()
        else:
            return
        self.is_pending = False
        if any(bad):
            self.flags.zero_()
            found = "; ".join(name for name, is_bad in zip(self.names, bad, strict=True) if is_bad)
            raise ValueError(
                f"{found} (in an earlier batch: a GPU is asked behind the computation, where a value outside its "
                "support counts as the nearest valid one, so that results since then are of no use)"
            )

    def __deepcopy__(self, memo: dict[int, object]) -> LateCheck:
        return LateCheck(self.names)

    def __reduce__(self) -> tuple[type[LateCheck], tuple[list[str]]]:
        return LateCheck, (self.names,)


def _is_capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()

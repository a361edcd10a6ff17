"""The processes that share the work of the latents stage; one, if nothing is distributed."""

from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

__all__ = ["Processes"]


class Processes:
    """Rank and size of the job, and waiting for each other for as long as it takes.

    It has a group of its own: one rank may compute for longer than the default group waits. Every rank has to make it,
    and to call its methods, in the same order. A rank that dies closes its connections, which ends the others' waiting.
    """

    def __init__(self) -> None:
        self._group = None
        self.rank, self.size = 0, 1
        if dist.is_available() and dist.is_initialized():
            self.rank, self.size = dist.get_rank(), dist.get_world_size()
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))

    def wait(self) -> None:
        """Until every rank is here."""
        if self._group is not None:
            dist.barrier(group=self._group)

    def on_first(self, function: Callable[[], None]) -> None:
        """Call the function on rank 0 alone, and go on when it is done: what it wrote can then be read."""
        if self.rank == 0:
            function()
        self.wait()

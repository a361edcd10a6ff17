"""The processes of one job: started before the first stage, kept through all of them."""

import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from torch import Tensor

__all__ = ["Ranks"]

T = TypeVar("T")


class Ranks:
    """Starts the processes that `devices` asks for and lets them agree.

    All stages of a run share one process group, so that stages without a Trainer can use it too, and no rank can
    decide by itself that a stage is finished.

    devices: accelerator, devices and num_nodes as the Trainer takes them.

    Raises:
        ValueError: when a launcher such as torchrun has started another number of processes than `devices` says.
    """

    def __init__(self, devices: Mapping[str, Any]) -> None:
        fabric = Fabric(**devices)
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != fabric.world_size and (started > 1 or "LOCAL_RANK" in os.environ):
            raise ValueError(
                f"{started} processes were started, but trainer.devices and trainer.num_nodes come to "
                f"{fabric.world_size}: set --trainer.devices to the processes per node"
            )
        if fabric.world_size > 1:
            fabric = Fabric(**devices, strategy="ddp")
            fabric.launch()
        self.rank = fabric.global_rank
        self.local_rank = fabric.local_rank
        self.world_size = fabric.world_size
        self.device = fabric.device
        # Waiting for rank 0 may take hours, which the timeout of the ordinary group rightly takes for a dead peer;
        # over gloo a dead peer shows at once, by its closed connection.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30)) if self.world_size > 1 else None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        """The result of `function()`, called on rank 0 alone and given to all ranks.

        When it raises, rank 0 raises and the others exit without a word: rank 0 says what happened.
        """
        if self.world_size == 1:
            return function()
        message: list[Any] = [None]
        error: BaseException | None = None
        if self.is_first:
            try:
                message = [(function(), True)]
            except BaseException as raised:
                error, message = raised, [(None, False)]
        dist.broadcast_object_list(message, src=0, group=self._group)
        if error is not None:
            raise error
        result, succeeded = message[0]
        if not succeeded:
            raise SystemExit(2)
        return result

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.world_size > 1:
            dist.barrier(group=self._group)

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of a CPU tensor."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self._group)
        return values

    def share(self, indices: Tensor) -> Tensor:
        """This rank's part of some indices; the parts of all ranks are disjoint and complete."""
        return indices[self.rank :: self.world_size]

    def close(self) -> None:
        """End the process group: without this, gloo runs exit with 1 now and then."""
        if dist.is_available() and dist.is_initialized():
            self.wait()
            dist.destroy_process_group()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

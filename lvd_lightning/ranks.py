"""The processes (ranks) of one job: started before the first stage, kept through all of them, and made to agree.

Without a process group there is one rank, and nothing is sent. Everything but `rank_and_size` has to be
called by all ranks in the same order.

`wait` and `on_first` use one gloo group beside the default one, made once per process group: waiting
for rank 0 may take hours, which the timeout of the ordinary group rightly takes for a dead peer; over gloo a dead peer
shows at once, by its closed connection.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lvd_lightning.stopping import Stopped, requested, stop_watching, watch_ranks
from lvd_lightning.traffic import sending

__all__ = [
    "TIMEOUT_MINUTES",
    "Ranks",
    "any_rank",
    "check_agreement",
    "from_each",
    "from_first",
    "gathered",
    "highest",
    "leave",
    "on_first",
    "rank_and_size",
    "receive_from",
    "send_to_first",
    "stop_together",
    "sum_in_place",
    "summed",
    "wait",
]

T = TypeVar("T")

#: After which ranks that wait for each other give up.
TIMEOUT_MINUTES = 10.0
#: Tensors from this size on are summed where they are; smaller ones travel together, at most so much at once.
_BUCKET_BYTES = 1 << 20

_patient: tuple[Any, Any] | None = None  # the default group, and the gloo group that was made beside it


class Ranks:
    """Starts the processes that `devices` asks for; what the functions of this module do, it has as methods.

    All stages of a run share one process group, so that stages without a Trainer can use it too, and no rank can
    decide by itself that a stage is finished.

    devices: accelerator, devices and num_nodes as the Trainer takes them.
    timeout_minutes: after which a rank gives up waiting for a message of another, which hangs or is gone; where the
        first rank works alone the others wait for as long as it takes.

    Raises:
        ValueError: the machine has no such devices, or a launcher such as torchrun has started another number of
            processes than `devices` says.
    """

    def __init__(self, devices: Mapping[str, Any], timeout_minutes: float = TIMEOUT_MINUTES) -> None:
        from lightning.fabric import Fabric  # only a run needs it; the functions below serve circuits too
        from lightning.fabric.strategies import DDPStrategy
        from lightning.fabric.utilities.exceptions import MisconfigurationException

        try:
            fabric = Fabric(**devices)
        except (ImportError, MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
            told = ", ".join(f"trainer.{name} {value!r}" for name, value in devices.items())
            raise ValueError(
                f"{told}: this machine cannot give them ({error}): set trainer.accelerator and trainer.devices to what "
                "it has, or to auto"
            ) from error
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != fabric.world_size and (started > 1 or "LOCAL_RANK" in os.environ):
            raise ValueError(
                f"{started} processes were started, but trainer.devices and trainer.num_nodes come to "
                f"{fabric.world_size}: set --trainer.devices to the processes per node"
            )
        if fabric.world_size > 1:
            timeout = timedelta(minutes=timeout_minutes)
            fabric = Fabric(**devices, strategy=DDPStrategy(timeout=timeout))
            fabric.launch()
            watch_ranks(dist.distributed_c10d._get_default_store(), timeout.total_seconds())
        self.rank = fabric.global_rank
        self.local_rank = fabric.local_rank
        self.world_size = fabric.world_size
        self.device = fabric.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def on_first(self, function: Callable[[], T]) -> T:
        return on_first(function)

    def wait(self) -> None:
        wait()

    def sum(self, values: Tensor) -> Tensor:
        return summed(values)

    def share(self, indices: Tensor) -> Tensor:
        """This rank's part of some indices; the parts of all ranks are disjoint and complete."""
        return indices[self.rank :: self.world_size]

    def close(self) -> None:
        """End the process group: without this, gloo runs exit with 1 now and then."""
        leave()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) if nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait() -> None:
    """Until all ranks are here, however long it takes."""
    if rank_and_size()[1] > 1:
        dist.barrier(group=_patient_group())


def leave() -> None:
    """End the process group and the one beside it, when all ranks are here.

    Nothing may keep a group after that: the threads of one that lives until the interpreter ends may abort it.
    """
    global _patient
    if dist.is_available() and dist.is_initialized():
        wait()
        stop_watching()
        _patient = None
        dist.destroy_process_group()


def on_first(function: Callable[[], T]) -> T:
    """The result of `function()`, called on rank 0 alone and given to all ranks, which go on together.

    When it raises, rank 0 raises and the others exit without a word: rank 0 says what happened.
    """
    rank, size = rank_and_size()
    if size == 1:
        return function()
    message: list[Any] = [None]
    error: BaseException | None = None
    if rank == 0:
        try:
            message = [(function(), True)]
        except Stopped as raised:
            error, message = raised, [(raised.signal, None)]
        except BaseException as raised:
            error, message = raised, [(None, False)]
    dist.broadcast_object_list(message, src=0, group=_patient_group())
    if error is not None:
        raise error
    result, succeeded = message[0]
    if succeeded is None:
        raise Stopped(result)
    if not succeeded:
        raise SystemExit(2)
    wait()
    return result


def summed(tensor: Tensor) -> Tensor:
    """The sum over all ranks, the same on each, on the tensor's device."""
    if rank_and_size()[1] == 1:
        return tensor
    total = tensor.to(_sending_device(), copy=True)
    with sending(total.nbytes):
        dist.all_reduce(total)
    return total.to(tensor.device)


def sum_in_place(tensors: Iterable[Tensor]) -> None:
    """Put the sum over all ranks into each of some tensors, which have the same shapes on all.

    Large ones are summed in place, without a copy; small ones in buckets, so that there are few messages.
    """
    if rank_and_size()[1] == 1:
        return
    buckets = list(_buckets(list(tensors)))
    flat = [_flat(bucket) for bucket in buckets]
    with sending(sum(tensor.nbytes for tensor in flat), len(flat)):
        for work in [dist.all_reduce(tensor, async_op=True) for tensor in flat]:
            work.wait()
    for bucket, found in zip(buckets, flat, strict=True):
        if len(bucket) == 1 and found.data_ptr() == bucket[0].data_ptr():
            continue
        sizes = [tensor.numel() for tensor in bucket]
        for tensor, part in zip(bucket, found.reshape(-1).split(sizes), strict=True):
            tensor.copy_(part.view(tensor.shape))


def any_rank(facts: list[bool]) -> list[bool]:
    """Whether each of some facts holds on at least one rank."""
    if rank_and_size()[1] == 1:
        return facts
    found = torch.tensor(facts, dtype=torch.int32, device=_sending_device())
    with sending(found.nbytes):
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return [bool(value) for value in found.tolist()]


def stop_together() -> int | None:
    """The signal that asked any rank to stop, the same on all, which call together; None if none has."""
    return highest([requested() or 0])[0] or None


def highest(numbers: list[int]) -> list[int]:
    """The largest of each number over ranks; by way of the CPU, so that no device is waited for."""
    if rank_and_size()[1] == 1:
        return numbers
    found = torch.tensor(numbers)
    dist.all_reduce(found, op=dist.ReduceOp.MAX, group=_patient_group())
    return [int(number) for number in found]


def gathered(tensor: Tensor) -> Tensor:
    """The tensors of all ranks, of one shape, one after another along the first dimension."""
    size = rank_and_size()[1]
    if size == 1:
        return tensor
    found = [torch.empty_like(tensor) for _ in range(size)]
    with sending(tensor.nbytes):
        dist.all_gather(found, tensor)
    return torch.cat(found)


def from_first(tensor: Tensor) -> Tensor:
    """The first rank's tensor; those of all have to be of one shape and type."""
    if rank_and_size()[1] == 1:
        return tensor
    found = tensor.to(_sending_device(), copy=True).contiguous()
    with sending(found.nbytes):
        dist.broadcast(found, src=0)
    return found.to(tensor.device)


def from_each(given: T) -> Iterator[T]:
    """What each of the other ranks gives, one after another, so that little is held at once; objects of the CPU."""
    rank, size = rank_and_size()
    for other in range(size if size > 1 else 0):
        message = [given if other == rank else None]
        dist.broadcast_object_list(message, src=other, group=_patient_group())
        if other != rank:
            assert message[0] is not None
            yield message[0]


def send_to_first(tensors: Iterable[Tensor]) -> None:
    """Give tensors on the CPU to the first rank, which takes them by `receive_from`."""
    for tensor in tensors:
        dist.send(tensor.contiguous(), dst=0, group=_patient_group())


def receive_from(rank: int, tensors: Iterable[Tensor]) -> None:
    """On the first rank: fill tensors on the CPU with what another one sends, of the same shapes and types."""
    for tensor in tensors:
        dist.recv(tensor, src=rank, group=_patient_group())


def check_agreement(what: str, text: str, tensors: Iterable[Tensor] | Mapping[str, Tensor] = ()) -> None:
    """Raise a RuntimeError on every rank unless all have the same text and tensors, to the last bit.

    The error says which rank has something else than the first, and in which of the tensors.

    what: for the message, such as "the structure after pruning".
    tensors: with or without names.
    """
    size = rank_and_size()[1]
    if size == 1:
        return
    named = tensors if isinstance(tensors, Mapping) else {f"tensor {n}": tensor for n, tensor in enumerate(tensors)}
    digests = {"the text": hashlib.sha256(text.encode()).digest()}
    digests |= {name: hashlib.sha256(_bytes(tensor)).digest() for name, tensor in named.items()}
    whole = hashlib.sha256(b"".join(digests.values())).digest()
    number = int.from_bytes(whole[:7], "little")
    bounds = torch.tensor([number, -number], device=_sending_device())
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) == -int(bounds[1]):
        return
    found: list[dict[str, bytes]] = [{} for _ in range(size)]
    dist.all_gather_object(found, digests, group=_patient_group())
    other = next(rank for rank in range(size) if found[rank] != found[0])
    parts = [name for name in {**found[0], **found[other]} if found[0].get(name) != found[other].get(name)]
    raise RuntimeError(
        f"the processes disagree on {what}: rank {other} has something else than rank 0 in {len(parts)} of "
        f"{len(found[0])} parts, first in {parts[0]}: their data or programs are not the same"
    )


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one type that travel in one message; the same on every rank, whose tensors have the same shapes."""
    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        small: list[Tensor] = []
        for tensor in (tensor for tensor in tensors if tensor.dtype == kind):
            if tensor.nbytes >= _BUCKET_BYTES:
                yield [tensor]
                continue
            if small and sum(other.nbytes for other in small) + tensor.nbytes > _BUCKET_BYTES:
                yield small
                small = []
            small.append(tensor)
        if small:
            yield small


def _flat(bucket: list[Tensor]) -> Tensor:
    """What is sent for a bucket: one tensor itself where it lies in one piece, else a copy."""
    return bucket[0].contiguous() if len(bucket) == 1 else torch.cat([tensor.reshape(-1) for tensor in bucket])


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _patient_group() -> Any:
    """The gloo group with a timeout of days, made when it is first used."""
    global _patient
    if _patient is None or _patient[0] is not dist.group.WORLD:
        _patient = dist.group.WORLD, dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return _patient[1]


def _sending_device() -> torch.device:
    """Where tensors have to be to be sent over the default group."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

"""What the processes of a job sum, share and check, so that all of them edit circuits alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["check_agreement", "from_first", "rank_and_size", "summed"]


def rank_and_size() -> tuple[int, int]:
    """This process's number and how many there are; (0, 1) if nothing is distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, the same on each. All have to call."""
    if rank_and_size()[1] == 1:
        return tensor
    total = tensor.to(_device(), copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def from_first(tensor: Tensor) -> Tensor:
    """The first process's tensor; all have to call, with tensors of one shape and type."""
    if rank_and_size()[1] == 1:
        return tensor
    found = tensor.to(_device(), copy=True).contiguous()
    dist.broadcast(found, src=0)
    return found.to(tensor.device)


def check_agreement(what: str, text: str, tensors: Iterable[Tensor] = ()) -> None:
    """Raise a RuntimeError on every process unless all have the same text and tensors. All have to call.

    what: for the message, such as "the structure after pruning".
    """
    if rank_and_size()[1] == 1:
        return
    digest = hashlib.sha256(text.encode())
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    number = int.from_bytes(digest.digest()[:7], "little")
    bounds = torch.tensor([number, -number], device=_device())
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX)
    if int(bounds[0]) != -int(bounds[1]):
        raise RuntimeError(f"the processes disagree on {what}: their data or programs are not the same")


def _device() -> torch.device:
    """Where the processes' tensors have to be to be sent."""
    if "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")

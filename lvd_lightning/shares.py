"""How the work is divided over ranks, so that the answer does not depend on how many there are.

Of a batch, rank r of R has the examples r, r + R, r + 2 R, ... (see `datamodules.sampler`): what is random in a step is
drawn for the whole batch on every rank, in one order, and each takes its rows. Of a split, a rank has whole chunks of
fixed size, so that every number is computed in the same company, whatever rank computes it: products of matrices round
differently where they have another number of rows.

Without a process group all is this process's, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lvd_lightning.ranks import gathered, rank_and_size, summed

__all__ = ["batch_total", "drawn_for_batch", "gathered_rows", "own_chunks", "part_order", "whole_batch"]


def own_chunks(count: int, chunk: int) -> range:
    """This rank's rows of `count`: whole chunks of `chunk` rows, which begin at multiples of it.

    Example:
        >>> own_chunks(10, 4)  # of one process
        range(0, 10)
    """
    rank, size = rank_and_size()
    chunks = -(-count // chunk)
    first, last = (number * chunks // size * chunk for number in (rank, rank + 1))
    return range(min(first, count), min(last, count))


def batch_total(count: int) -> int:
    """The number of examples of a batch on all ranks; `count` are this rank's."""
    return int(summed(torch.tensor(count)))


def drawn_for_batch(draw: Callable[[int], Tensor], count: int) -> Tensor:
    """This rank's rows of what is drawn for a whole batch.

    draw: called with the batch's number of examples, gives a tensor with as many rows; with generators in one state on
        all ranks.
    count: examples of the batch on this rank.
    """
    rank, size = rank_and_size()
    return draw(batch_total(count))[rank::size] if size > 1 else draw(count)


def whole_batch(own: Tensor) -> Tensor:
    """The rows of a batch on all ranks, in their order; own: those of this rank, (b, ...)."""
    size = rank_and_size()[1]
    if size == 1:
        return own
    total = batch_total(len(own))
    most = -(-total // size)
    # gloo sends no whole numbers of two bytes.
    kind = torch.int32 if own.dtype == torch.int16 else own.dtype
    padded = own.new_zeros(most, *own.shape[1:], dtype=kind)
    padded[: len(own)] = own
    found = gathered(padded).unflatten(0, (size, most))
    return found.transpose(0, 1).flatten(0, 1)[:total].to(own.dtype)


def part_order(count: int, positions: int, device: torch.device | str = "cpu") -> Tensor:
    """The places of the parts of this rank's `count` examples among those of the whole batch, int64 (count positions,).

    Example:
        >>> part_order(2, 3).tolist()  # of one process
        [0, 1, 2, 3, 4, 5]
    """
    rank, size = rank_and_size()
    example_B1 = torch.arange(rank, rank + count * size, size, device=device)[:, None]
    return (example_B1 * positions + torch.arange(positions, device=device)).flatten()


def gathered_rows(own: Tensor) -> Tensor:
    """The rows of all ranks, those of the first rank first; ranks may have different numbers of them."""
    rank, size = rank_and_size()
    if size == 1:
        return own
    counts = torch.zeros(size, dtype=torch.int64)
    counts[rank] = len(own)
    sizes = summed(counts).tolist()
    padded = own.new_zeros(max(sizes), *own.shape[1:])
    padded[: len(own)] = own
    found = gathered(padded).unflatten(0, (size, max(sizes)))
    return torch.cat([rows[:number] for rows, number in zip(found, sizes, strict=True)])

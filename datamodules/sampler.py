"""Batches that are the same whatever the number of processes that share them."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from lvd_lightning.checks import expect
from lvd_lightning.seeds import generator_for

__all__ = ["GlobalBatchSampler"]


class GlobalBatchSampler(Sampler[list[int]]):
    """Cuts an epoch into global batches and every batch into one share per rank.

    The order is a function of (seed, epoch) alone. Over the ranks every example comes exactly once, without padding,
    and every rank gets equally many batches, which are those of one process; the shares of one batch differ by at most
    one example. Of a last batch with fewer examples than ranks some shares are empty.

    skip: batches that the next iteration leaves out, to go on within an epoch; 0 again after it has begun.

    Args:
        num_examples: the number of examples in the split.
        batch_size: the size of a batch, all ranks together.
        seed: the seed of the order, not negative.
        shuffle: whether every epoch has an order of its own; else the examples come as they are stored.
        rank: which share to give.
        world_size: the number of shares.

    Raises:
        ValueError: fewer examples in all or in every batch than ranks.

    Example:
        >>> from datamodules import GlobalBatchSampler
        >>> list(GlobalBatchSampler(7, batch_size=4, shuffle=False, rank=1, world_size=2))  # not 0, 2, 4, 6
        [[1, 3], [5]]
    """

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        expect(0 <= rank < world_size, "rank", rank, f"0 to {world_size - 1} for a world_size of {world_size}")
        if batch_size < world_size:
            raise ValueError(
                f"batch_size: {batch_size} examples do not go round {world_size} ranks; it counts all ranks together"
            )
        if num_examples < world_size:
            raise ValueError(f"num_examples: {num_examples} examples do not go round {world_size} ranks; use fewer")
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.skip = 0

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning calls `set_epoch` on a batch sampler's `sampler`, not on the batch sampler."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.num_examples // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = self._order()
        first, self.skip = self.skip * self.batch_size, 0
        for start in range(first, self.num_examples, self.batch_size):
            yield order[start : start + self.batch_size][self.rank :: self.world_size].tolist()

    def _order(self) -> torch.Tensor:
        if not self.shuffle:
            return torch.arange(self.num_examples)
        return torch.randperm(self.num_examples, generator=generator_for(self.seed, "order", self.epoch))

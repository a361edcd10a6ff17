"""Loaders of global batches, for every data module."""

from abc import abstractmethod
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from datamodules.sampler import GlobalBatchSampler
from datamodules.splits import Split
from lvd_lightning.ranks import rank_and_size
from lvd_lightning.resumable_loader import ResumableLoader

__all__ = ["Batch", "GlobalLoaders"]

Batch = tuple[Tensor, Tensor]
T = TypeVar("T")


class GlobalLoaders(LightningDataModule):
    """A data module whose loaders divide every batch over the ranks; a subclass says what their examples are."""

    batch_size: int
    val_batch_size: int
    num_workers: int
    seed: int
    #: Whether every rank gets whole batches: for stages that divide something else than data.
    whole_batches: bool = False

    @abstractmethod
    def dataset(self, split: Split) -> Dataset[Batch]:
        """The examples of a split; see `global_batches`."""

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader("train", self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader("val", self.val_batch_size, shuffle=False)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        return self._loader("test", self.val_batch_size, shuffle=False)

    def _loader(self, split: Split, batch_size: int, shuffle: bool) -> DataLoader[Batch]:
        share = (0, 1) if self.whole_batches else rank_and_size()
        settings = (batch_size, self.seed, shuffle, self.num_workers, self.trainer)
        return global_batches(self.dataset(split), *settings, share=share)


def global_batches(
    examples: Dataset[Batch],
    batch_size: int,
    seed: int,
    shuffle: bool,
    num_workers: int,
    trainer: Any = None,
    share: tuple[int, int] | None = None,
) -> DataLoader[Batch]:
    """This rank's share of every batch of a split; see `GlobalBatchSampler`.

    Args:
        examples: with a length, and `__getitems__`, which gives a whole batch (x, index) for a list of numbers.
        batch_size: examples per step, all ranks together.
        seed: of the order.
        shuffle: whether every epoch has an order of its own.
        num_workers: processes that read batches.
        trainer: the Trainer whose epoch counts, if there is one.
        share: which share of every batch, and of how many; by default the rank's.
    """
    rank, size = share or rank_and_size()
    count = len(examples)  # type: ignore[arg-type]
    sampler = GlobalBatchSampler(count, batch_size, seed=seed, shuffle=shuffle, rank=rank, world_size=size)
    settings: dict[str, Any] = {
        "batch_sampler": sampler,
        "collate_fn": _as_read,
        "num_workers": num_workers,
        "persistent_workers": num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    if trainer is None or not shuffle:  # what is not shuffled is not trained on
        return DataLoader(examples, **settings)
    # A resumed Trainer fetches the first batches before it calls `set_epoch`.
    sampler.set_epoch(trainer.current_epoch)
    return ResumableLoader(examples, order=sampler, trainer=trainer, **settings)


def _as_read(batch: T) -> T:
    """The dataset reads whole batches: nothing is left to collate."""
    return batch

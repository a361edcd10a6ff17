"""Global batches over any number of ranks."""

import pytest

from datamodules import GlobalBatchSampler

SIZES = [(100, 32, 1), (100, 32, 3), (97, 32, 4), (96, 32, 4), (5, 8, 5), (7, 4, 4), (33, 32, 2), (32, 32, 2)]


def shares(num: int, size: int, world: int, epoch: int = 0, shuffle: bool = True) -> list[list[list[int]]]:
    """What every rank gets: one list of batches per rank."""
    samplers = [GlobalBatchSampler(num, size, seed=3, shuffle=shuffle, rank=r, world_size=world) for r in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    for sampler in samplers:
        assert len(list(sampler)) == len(sampler)
    return [list(sampler) for sampler in samplers]


@pytest.mark.parametrize(("num", "size", "world"), SIZES)
def test_every_example_comes_once_and_shares_are_even(num: int, size: int, world: int) -> None:
    by_rank = shares(num, size, world)
    assert len({len(batches) for batches in by_rank}) == 1
    assert sorted(index for batches in by_rank for batch in batches for index in batch) == list(range(num))
    for parts in zip(*by_rank, strict=True):
        lengths = [len(part) for part in parts]
        assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize(("num", "size", "world"), SIZES)
def test_the_shares_of_a_batch_make_the_batch_of_one_rank(num: int, size: int, world: int) -> None:
    alone = shares(num, size, 1)[0]
    together = [
        sorted(index for part in parts for index in part) for parts in zip(*shares(num, size, world), strict=True)
    ]
    assert together == [sorted(batch) for batch in alone]


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    first, again, next_epoch = shares(50, 8, 2), shares(50, 8, 2), shares(50, 8, 2, epoch=1)
    assert first == again
    assert first != next_epoch
    other_seed = GlobalBatchSampler(50, 8, seed=4, world_size=2)
    assert list(other_seed) != first[0]
    # (seed, epoch) pairs are not added up: seed 4 in epoch 0 is not seed 3 in epoch 1.
    assert list(other_seed) != next_epoch[0]


def test_without_shuffling_the_order_is_that_of_storage() -> None:
    assert shares(6, 4, 2, epoch=5, shuffle=False) == [[[0, 2], [4]], [[1, 3], [5]]]


def test_errors() -> None:
    with pytest.raises(ValueError, match="rank: got 2"):
        GlobalBatchSampler(10, 4, rank=2, world_size=2)
    with pytest.raises(ValueError, match="batch_size: 2"):
        GlobalBatchSampler(10, 2, world_size=3)
    with pytest.raises(ValueError, match="num_examples: 2"):
        GlobalBatchSampler(2, 4, world_size=3)

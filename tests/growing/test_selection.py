"""The worst heads grow until they hold more than the share; room and examples set limits."""

import pytest
import torch

from lvd_lightning.growing import select_heads


def select(mean: list[float], count: list[int], target: int = 99, **settings: float) -> list[int]:
    return select_heads(torch.tensor([mean]), torch.tensor([count]), [len(mean)], target=target, **settings)[0]


def test_the_worst_until_they_hold_more_than_the_share() -> None:
    assert select([-1.0, -5.0, -3.0, -2.0], [10, 30, 30, 30]) == [1, 2]
    assert select([-1.0, -5.0, -3.0, -2.0], [10, 50, 20, 20]) == [1]
    # Exactly the share is not more than it.
    assert select([-1.0, -5.0, -3.0, -2.0], [10, 40, 25, 25]) == [1, 2]
    assert select([-1.0, -5.0, -3.0, -2.0], [10, 40, 25, 25], share=0.39) == [1]
    assert select([-1.0, -5.0], [10, 10], share=0.5) == [1, 0]


def test_room_is_for_the_worst() -> None:
    assert select([-1.0, -2.0, -3.0, -4.0], [25, 25, 25, 25], target=5) == [3]
    assert select([-1.0, -2.0, -3.0, -4.0], [25, 25, 25, 25], target=4) == []
    assert select([-1.0, -2.0, -3.0, -4.0], [25, 25, 25, 25], target=2) == []


def test_heads_with_few_examples_do_not_grow() -> None:
    assert select([-1.0, -2.0, -9.0], [50, 40, 10], min_examples=20) == [1]
    assert select([-1.0, -2.0, -9.0], [5, 4, 1], min_examples=20) == []
    # One without examples has no mean, and is not among the worst.
    assert select([float("nan"), -2.0, -1.0], [0, 40, 10], min_examples=0) == [1]
    assert select([float("nan")], [0], min_examples=0) == []


def test_every_circuit_for_itself() -> None:
    mean = torch.tensor([[-1.0, -2.0, 0.0], [-7.0, -8.0, -9.0], [-1.0, 0.0, 0.0]])
    count = torch.tensor([[5, 5, 0], [10, 10, 10], [9, 0, 0]])
    assert select_heads(mean, count, [2, 3, 1], target=4) == [[1], [2], [0]]


def test_a_wrong_share_is_named() -> None:
    with pytest.raises(ValueError, match="share: got 1.0"):
        select([-1.0], [1], share=1.0)

"""Learning rates of the teachers."""

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from lvd_lightning.stages.schedules import warmup_cosine


def factor(num_steps: int, warmup: float, final: float = 0.0) -> Callable[[int], float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    found: Callable[[int], float] = warmup_cosine(optimizer, num_steps, warmup, "teacher", final).lr_lambdas[0]
    return found


@pytest.mark.parametrize("final", [0.0, 0.25, 1.0])
def test_the_rate_rises_then_falls(final: float) -> None:
    factors = [factor(100, 0.1, final)(step) for step in range(101)]
    assert 0 < factors[0] < factors[9] < factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert factors[100] == pytest.approx(final)
    assert factor(10, 0.0)(0) == 1.0


def test_a_stage_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match="set max_epochs or max_steps of stage teacher's trainer"):
        factor(float("inf"), 0.1)  # type: ignore[arg-type]

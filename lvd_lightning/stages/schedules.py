"""Learning rates of the teachers over their steps."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

__all__ = ["warmup_cosine"]


def warmup_cosine(optimizer: Optimizer, num_steps: float, warmup: float, stage: str, final: float = 0.0) -> LambdaLR:
    """Linear up over the first share of the steps, then a half cosine down.

    Args:
        num_steps: of the whole stage.
        warmup: the share of them in which the rate rises.
        stage: the stage's name, for the error.
        final: what the rate ends at, as a share of the largest.

    Raises:
        ValueError: the stage has no end.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
        >>> schedule = warmup_cosine(optimizer, num_steps=10, warmup=0.2, stage="teacher", final=0.1)
        >>> [round(2.0 * schedule.lr_lambdas[0](step), 3) for step in (0, 1, 2, 6, 10)]
        [0.667, 1.333, 2.0, 1.1, 0.2]
    """
    if math.isinf(num_steps):
        raise ValueError(f"the schedule needs an end: set max_epochs or max_steps of stage {stage}'s trainer")
    num_warmup = round(warmup * num_steps)

    def factor(step: int) -> float:
        if step < num_warmup:
            return (step + 1) / (num_warmup + 1)
        share = min(1.0, (step - num_warmup) / max(1, num_steps - num_warmup))
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * share))

    return LambdaLR(optimizer, factor)

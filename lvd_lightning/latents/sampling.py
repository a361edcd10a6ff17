"""Random subsets."""

import torch
from torch import Tensor

__all__ = ["sample_distinct"]


def sample_distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` distinct numbers below `size` in ascending order, int64, without a table of all when few are wanted."""
    if count >= size:
        return torch.arange(size)
    if 4 * count > size:
        return torch.randperm(size, generator=generator)[:count].sort().values
    drawn = torch.randint(size, (2 * count,), generator=generator).unique()
    while len(drawn) < count:
        drawn = torch.cat([drawn, torch.randint(size, (count,), generator=generator)]).unique()
    return drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort().values

"""What tests of normalizing flows share."""

from typing import TypeVar

import torch
from torch import nn

__all__ = ["disturbed"]

Module = TypeVar("Module", bound=nn.Module)


def disturbed(module: Module, by: float = 0.3) -> Module:
    """With parameters that are not those of the beginning."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data += by * torch.randn(parameter.shape, generator=generator)
    return module

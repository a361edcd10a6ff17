"""Distributed training for modules that sum their own statistics over ranks."""

import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lvd_lightning.ranks import from_first

__all__ = ["EMStrategy"]


class EMStrategy(DDPStrategy):
    """DDP without the wrapper: EM optimizers all-reduce flows themselves, where DDP would average them as gradients.

    All ranks start from the parameters and buffers of rank 0. Nothing has to be wrapped again when a circuit grows.
    """

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        with torch.no_grad():
            for tensor in [*self.model.parameters(), *self.model.buffers()]:
                if tensor.numel():
                    tensor.data.copy_(from_first(tensor.data))

"""Distributed training for modules that sum their own statistics over ranks."""

import torch
from lightning.pytorch.strategies import DDPStrategy
from typing_extensions import override

from lvd_lightning.ranks import from_first

__all__ = ["EMStrategy"]


class EMStrategy(DDPStrategy):
    """DDP without the wrapper: EM optimizers all-reduce flows themselves, where DDP would average them as gradients.

    All ranks start from the parameters and buffers of rank 0, but for those that a module names in `own_tensors`, which
    are each rank's own. Nothing has to be wrapped again when a circuit grows.
    """

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        own = {
            f"{name}.{tensor}" if name else tensor
            for name, module in self.model.named_modules()
            for tensor in getattr(module, "own_tensors", ())
        }
        with torch.no_grad():
            for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
                if tensor.numel() and name not in own:
                    tensor.data.copy_(from_first(tensor.data))

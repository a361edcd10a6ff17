"""Ranks that have diverged are found out after the epoch in which it happened."""

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lvd_lightning.ranks import check_agreement

__all__ = ["RankAgreement"]


class RankAgreement(Callback):
    """After every epoch all ranks have to have the same parameters, to the last bit.

    They take every decision on their own, from sums that are the same on all. A rank that has decided otherwise (a
    broken device, other versions of a library, a fault in a module) would go on with another circuit without a word.
    A RuntimeError says at which stage and epoch it was, and in which tensor of which rank. One process is not checked.
    Tensors that a module names in `own_tensors` are each rank's own.

    stage: its name, for the message.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size > 1:
            what = f"the parameters of stage {self.stage} after epoch {trainer.current_epoch + 1}"
            own = {
                f"{name}.{tensor}"
                for name, module in pl_module.named_modules()
                for tensor in getattr(module, "own_tensors", ())
            }
            shared = {name: tensor for name, tensor in pl_module.state_dict().items() if name not in own}
            check_agreement(what, "", shared)

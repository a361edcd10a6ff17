"""A callback that stands for Ctrl-C."""

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["Interrupt"]


class Interrupt(Callback):
    """Interrupts training as soon as it begins."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        raise KeyboardInterrupt

"""What a stage of an experiment has to provide."""

from typing import ClassVar

from lightning.pytorch import LightningModule
from typing_extensions import override

from lvd_lightning.circuits import Circuit
from lvd_lightning.context import StageContext

__all__ = ["StageModule"]


class StageModule(LightningModule):
    """A LightningModule that is one stage of an experiment.

    The pipeline calls `begin_stage`, `Trainer.fit`, loads the best checkpoint, then calls `finish_stage`. After an
    interruption it does the same with the last epoch-end checkpoint given to `fit`; a module needs no code of its own
    for that, if its random numbers come from `StageContext.generator("...", epoch)`.

    A module that defines `train_dataloader` brings its own data (patches, codes, cached likelihoods); otherwise the
    loaders are those of the datamodule and yield `(images uint8 [b, 3, H, W], index int64 [b])`.

    monitor, monitor_mode: the logged validation metric that says which epoch is best.
    em: whether the module is trained by EM, whose optimizers all-reduce sums themselves, so that the distributed
        strategy has to leave its gradients alone.
    """

    monitor: str = "val/bpd"
    monitor_mode: str = "min"
    em: ClassVar[bool] = False

    @override
    def on_train_end(self) -> None:
        """On a GPU values are checked behind the computation: ask about the last batches as well."""
        for module in self.modules():
            if isinstance(module, Circuit):
                module.check_inputs()

    def begin_stage(self, context: StageContext) -> None:
        """Read what earlier stages handed on and build what depends on data.

        Called on every rank before the Trainer sees the module, on the first start and on every resume alike: it has
        to be a function of (files, seed).
        """

    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Write into `context.dir` what later stages read, and return figures for the report (val_bpd, ...).

        Called with the parameters of the best epoch, on rank 0 alone while the other ranks wait: no collectives here.
        Write to a temporary name, then `os.replace`: an interruption may come at any moment.
        """
        return {}

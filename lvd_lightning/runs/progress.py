"""How far a stage is: a line per epoch, or the progress bar of a terminal."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, RichProgressBar
from typing_extensions import override

__all__ = ["EpochLines", "Noted", "ProgressBar"]


@dataclass(frozen=True)
class Noted:
    """What stands beside which figures: the data's protocol beside likelihoods.

    unit: the name that likelihoods end with; protocol: see `Data`.
    """

    unit: str
    protocol: str = ""

    def beside(self, name: str) -> str:
        """The protocol in brackets if the figure of this name is a likelihood and there is one; else empty."""
        return f" ({self.protocol})" if self.protocol and name.endswith(self.unit) else ""


class EpochLines(Checkpoint):
    """Prints one line per epoch, for output that is a file.

    It is a Checkpoint callback because these run after the module's own `on_train_epoch_end`, whose metrics would
    otherwise be missing from the line.

    noted: what stands beside likelihoods, see `Noted`.
    """

    def __init__(self, stage: str, clock: Callable[[], float], noted: Noted) -> None:
        self.stage = stage
        self.clock = clock
        self.noted = noted

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        logged = trainer.callback_metrics  # on every rank: where nobody has asked for a metric yet, this sums over them
        if not trainer.is_global_zero:
            return
        # Where Lightning also keeps a "_step" and an "_epoch" form of a metric, its plain name says it all.
        metrics = {
            name: float(value)
            for name, value in logged.items()
            if value.numel() == 1 and not name.endswith(("_step", "_epoch"))
        }
        shown = [f"{name} {value:.4f}{self.noted.beside(name)}" for name, value in metrics.items()]
        of = "" if trainer.max_epochs in (None, -1) else f"/{trainer.max_epochs}"
        text = f"{self.stage}: epoch {trainer.current_epoch + 1}{of}"
        print("  ".join([text, *shown, f"{self.clock():.1f} s"]), flush=True)


class ProgressBar(RichProgressBar):
    """The progress bar of a terminal, with the data's protocol beside every likelihood."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self.noted = noted

    @override
    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics = {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}
        return {f"{name}{self.noted.beside(name)}": value for name, value in metrics.items()}

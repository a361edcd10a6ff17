"""Pictures of what a circuit draws while it is trained."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from callbacks.pictures import PictureCallback
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs.pictures import sample_picture
from lvd_lightning.seeds import generator_for

__all__ = ["LogSamples"]


class LogSamples(PictureCallback):
    """Draws 64 samples of a stage's circuit over images after the validation of every n-th epoch.

    Writes `pictures/samples_epoch_<epoch>.png` into the Trainer's default_root_dir, the stage's folder, and logs the
    picture as "samples" if there is a WandbLogger. The random numbers are the same every time, so pictures differ by
    what was learned. Modules without an AssembledCircuit called `assembled` are left alone, so that the callback can
    stand in the Trainer that all stages share. Override `should_draw` to draw at other epochs.

    Args:
        every_n_epochs: draw at the epochs n - 1, 2 n - 1, ... (counted from 0).
        seed: of the random numbers.

    Example:
        >>> from callbacks import LogSamples
        >>> draw = LogSamples(every_n_epochs=3)
        >>> [epoch for epoch in range(10) if draw.should_draw(epoch)]
        [2, 5, 8]
    """

    def __init__(self, every_n_epochs: int = 1, seed: int = 0) -> None:
        super().__init__(every_n_epochs, seed)

    def check_module(self, module: LightningModule) -> None:
        """Raise a ValueError for a stage whose circuits no process has all of."""
        if module.hparams.get("sharding") == "circuits":
            raise ValueError(
                "LogSamples: under sharding: circuits no process has all circuits, and nothing can be drawn: set "
                "sharding: data, or leave this callback to other stages"
            )

    @override
    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        circuit = getattr(pl_module, "assembled", None)
        wanted = not trainer.sanity_checking and self.should_draw(trainer.current_epoch)
        if trainer.is_global_zero and wanted and isinstance(circuit, AssembledCircuit):
            self.draw(self.folder(trainer) / f"samples_epoch_{trainer.current_epoch:03d}.png", circuit, trainer)

    def draw(self, path: Path, circuit: AssembledCircuit, trainer: Trainer) -> None:
        """Write the picture of an epoch, and log it."""
        generator = generator_for(self.seed, "samples", device=circuit.prior.device)
        sample_picture(path, circuit, trainer.datamodule, generator)  # type: ignore[attr-defined]
        self.log_pictures(trainer, {"samples": path})

"""What a stage of an experiment has to provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from lightning.pytorch import LightningModule
from torch import nn
from typing_extensions import override

from lvd_lightning.circuits import Circuit
from lvd_lightning.context import Data, StageContext
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import rank_and_size
from lvd_lightning.shares import batch_total
from lvd_lightning.units import Unit

__all__ = ["PlainStage", "Stage", "StageModule", "image_patches"]


class Stage:
    """One stage of an experiment: what it needs of the stages before it, and what it leaves to those after it.

    Artefacts are told by kinds, never by the names of stages, which an experiment chooses: "features" of a teacher,
    "latents" (the value of every patch), "conditionals", a "prior", a "model" whose likelihood is reported. A stage
    finds them by `StageContext.artefact`, and leaves its own in its folder. One that only trains models to compare with
    leaves none: it writes `baseline.json`, figures by name, and the report is written before it and completed after it.

    needs: kinds that it cannot do without; an instance may need fewer or more than its class.
    leaves: kinds that later stages, the evaluation and the report find in its folder.
    harmless: arguments that change how fast it runs or what it keeps on disk, but not its result.
    model_title: what reports call the model that it leaves; empty for the stage's own name.
    model_noun: what kind of model that is, for tables.
    learns_from_samples: whether its model was trained by what it draws, so that the report sets its samples, and those
        of the model before it, beside the test images.

    Example:
        >>> from lvd_lightning.stages import FinetuneStudent, Stage
        >>> issubclass(FinetuneStudent, Stage), FinetuneStudent.model_title
        (True, 'finetuned')
    """

    needs: tuple[str, ...] = ()
    leaves: ClassVar[tuple[str, ...]] = ()
    harmless: ClassVar[tuple[str, ...]] = ()
    model_title: ClassVar[str] = ""
    model_noun: ClassVar[str] = "circuit"
    learns_from_samples: ClassVar[bool] = False

    def check_data(self, data: Data) -> None:
        """Raise a ValueError if the stage cannot work on data of this kind.

        Called before any stage runs, with a datamodule that has not read anything yet.
        """

    def plan(self, request: PlanRequest) -> StagePlan | None:
        """What the stage will take on so many ranks, told without training; None: nobody has said.

        Called with stand-in data, in the order of the stages; see `PlanRequest` and `train.py plan`.
        """
        return None

    @classmethod
    def load_model(cls, folder: Path) -> nn.Module:
        """The model that the stage left in its folder, with `log_prob`; for stages that leave one."""
        return AssembledCircuit.load(folder)


class PlainStage(Stage, ABC):
    """A stage that does its whole work in one function, without a Trainer.

    Example:
        >>> from pathlib import Path
        >>> from lvd_lightning.context import StageContext
        >>> from lvd_lightning.stages import PlainStage
        >>> class Lengths(PlainStage):
        ...     def run(self, context):
        ...         return {"examples": float(len(context.data))}
        >>> Lengths().run(StageContext(Path("runs/mine"), "lengths", seed=0, data=["a", "b"]))
        {'examples': 2.0}
    """

    @abstractmethod
    def run(self, context: StageContext) -> dict[str, float]:
        """Write into `context.dir` what later stages read, and return figures for the report.

        Called on every rank. What it has done may be used again after an interruption, if it says what it was made of.
        """


class StageModule(Stage, LightningModule):
    """A LightningModule that is one stage of an experiment.

    The pipeline calls `begin_stage`, `Trainer.fit`, loads the best checkpoint, then calls `finish_stage`. After an
    interruption it does the same with the last epoch-end checkpoint given to `fit`; a module needs no code of its own
    for that, if its random numbers come from `StageContext.generator("...", epoch)`.

    A module that defines `train_dataloader` brings its own data (patches, codes, cached likelihoods); otherwise the
    loaders are those of the datamodule and yield `(examples [b, ...], index int64 [b])`. On several ranks b may be 0 in
    the last batch of an epoch: see `docs/scaling.md`, and `share_of_batch` for losses that are means.

    monitor, monitor_mode: the logged validation metric that says which epoch is best; None: the validation
        likelihood in the data's unit, `val/<unit>`. See `follow`.
    em: whether the module is trained by EM, whose optimizers all-reduce sums themselves, or takes its steps itself in
        other ways, so that the distributed strategy has to leave its gradients alone.
    full_precision: whether it is trained in float32 or float64 alone, as all stages are that EM trains.
    accumulates: for those that EM trains, whether flows of several batches are added up for one step.
    batches_per_step: so many; the Trainer's accumulate_grad_batches, which Lightning refuses where it does not step.

    Example:
        >>> import torch
        >>> from lvd_lightning.stages import StageModule
        >>> class Mean(StageModule):
        ...     monitor = "val/loss"
        ...     def begin_stage(self, context):
        ...         self.mean = torch.nn.Parameter(torch.zeros(()))
        ...     def training_step(self, batch):
        ...         return (batch[0].float() - self.mean).square().mean()
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.1)
        >>> Mean().monitor_mode, Mean.leaves
        ('min', ())
    """

    monitor: str | None = None
    monitor_mode: str = "min"
    em: ClassVar[bool] = False
    full_precision: ClassVar[bool] = False
    accumulates: ClassVar[bool] = False
    batches_per_step: int = 1

    @override
    def on_train_end(self) -> None:
        """On a GPU values are checked behind the computation: ask about the last batches as well."""
        for module in self.modules():
            if isinstance(module, Circuit):
                module.check_inputs()

    def share_of_batch(self, count: int) -> float:
        """What the mean loss of this rank's `count` examples counts for in a step whose gradients ranks average.

        With it the gradient is that of the mean over the whole batch, also where shares are uneven; 1 for one process.
        """
        size = rank_and_size()[1]
        return 1.0 if size == 1 else count * size / batch_total(count)

    def follow(self, unit: Unit, name: str = "") -> None:
        """Let the validation likelihood in this unit say which epoch is best, under `val/<name><unit>`."""
        self.unit = unit
        self.monitor, self.monitor_mode = f"val/{name}{unit.name}", unit.mode

    def begin_stage(self, context: StageContext) -> None:
        """Read what earlier stages handed on and build what depends on data.

        Called on every rank before the Trainer sees the module, on the first start and on every resume alike: it has
        to be a function of (files, seed).
        """

    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Write into `context.dir` what later stages read, and return figures for the report (val_<unit>, ...).

        Called with the parameters of the best epoch, on rank 0 alone while the other ranks wait: no collectives here.
        Write with `lvd_lightning.files`: an interruption may come at any moment.
        """
        return {}


def image_patches(data: Data, stage: str) -> ImagePatches:
    """The patches of images; a ValueError for data of another kind, which the stage called `stage` cannot learn."""
    parts = data.parts
    if not isinstance(parts, ImagePatches):
        raise ValueError(
            f"{stage} learns images, but the data's parts are {type(parts).__name__}: take another teacher"
        )
    return parts

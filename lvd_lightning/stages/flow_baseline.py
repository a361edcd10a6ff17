"""Stage "baseline" of a distilled flow: the same flow without its teacher, by as many steps."""

from __future__ import annotations

import time
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.context import StageContext
from lvd_lightning.files import read_json, write_json
from lvd_lightning.stages.flow_stage import Flow, FlowStage, reached
from lvd_lightning.stages.flow_teacher import negative_log_likelihood
from lvd_lightning.teachers.io import ARGUMENTS_FILE

__all__ = ["FlowBaseline"]

NAME = "undistilled"


class FlowBaseline(FlowStage):
    """Trains a flow of the size of the student by maximum likelihood alone: what its teacher is worth.

    It begins with permutations, or orders of columns, and weights of its own, and sees the same batches as the student.
    Give it the epochs and settings of the student.

    Logs `train/undistilled_<unit>` and `val/undistilled_<unit>`. Its figures are in `baseline.json` as `undistilled`,
    the flow itself in the folder `undistilled`.

    Args:
        lr, final_lr, warmup, optimizer, clip_norm, ema_decay, temperature, num_pictures, bound_examples: see
            `FlowTeacher`.

    Example:
        >>> from lvd_lightning.stages import FlowBaseline
        >>> FlowBaseline().needs, FlowBaseline.leaves
        (('model',), ())
    """

    needs = ("model",)
    prefix: ClassVar[str] = "undistilled_"

    def __init__(
        self,
        lr: float = 5e-4,
        final_lr: float = 0.0,
        warmup: float = 0.05,
        optimizer: Literal["adam", "adamax"] = "adam",
        clip_norm: float = 1.0,
        ema_decay: float = 0.999,
        temperature: float = 0.7,
        num_pictures: int = 32,
        bound_examples: int = 16,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.check_settings()

    @override
    def begin_stage(self, context: StageContext) -> None:
        self.seconds = 0.0
        super().begin_stage(context)

    @override
    def make_flow(self, context: StageContext, generator: torch.Generator) -> Flow:
        folder = context.required("model")
        if not (folder / ARGUMENTS_FILE).is_file():
            raise ValueError(
                f"stage {context.stage!r}: the model in {folder} is no flow: put a FlowStudent before this stage"
            )
        student = teachers.load_teacher(folder)
        assert isinstance(student, Flow)
        arguments = {name: value for name, value in student.init_args.items() if name != "orders"}
        made = type(student)(**arguments, generator=generator)
        made.start_from(self.first_examples(context), generator)
        return made

    @override
    def loss(self, examples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return negative_log_likelihood(self.model, examples, generator)

    @override
    def on_train_epoch_start(self) -> None:
        self._epoch_start = time.monotonic()

    @override
    def on_train_epoch_end(self) -> None:
        self.seconds += time.monotonic() - self._epoch_start
        if self.trainer.is_global_zero:
            # The checkpoint of the best epoch may hold those of an earlier one.
            write_json(self._context.dir / "spent.json", {NAME: self.seconds})

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["baseline"] = {"seconds": self.seconds}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds = float(checkpoint["baseline"]["seconds"])

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Evaluate the best epoch on all of validation and, once, on test."""
        unit, figures = context.data.unit.name, self.figures(context)
        teachers.save_teacher(self.averaged, context.dir / NAME)
        spent = read_json(context.dir / "spent.json")
        own = {"seconds": spent[NAME], unit: reached(self.averaged, context.data, "test", self.device), **figures}
        write_json(
            context.dir / "baseline.json", {NAME: {**own, "num_parameters": int(own["num_parameters"])}}, indent=2
        )
        return figures

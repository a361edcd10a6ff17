"""What the stages that train a flow share: the optimiser, averaged parameters, a guard, pictures, figures.

Shapes: B examples, D dimensions of an example.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import (
    check_above,
    check_at_least,
    check_between,
    check_choice,
    check_share,
)
from lvd_lightning.context import Data, StageContext, VisibleData
from lvd_lightning.faults import first_fault
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.parts import Columns, ImagePatches
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.seeds import derive_seed
from lvd_lightning.stages.mae_teacher import save_picture
from lvd_lightning.stages.plans.networks import network_plan, teacher_left
from lvd_lightning.stages.schedules import warmup_cosine
from lvd_lightning.stages.stage import StageModule
from lvd_lightning.teachers.batch_noise import batch_noise

__all__ = ["Flow", "FlowStage", "check_flow_data", "picture_rows", "reached"]

Flow = teachers.ImageFlow | teachers.TableFlow
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": torch.optim.Adam, "adamax": torch.optim.Adamax}
#: Training examples that a flow's first layers are standardised on.
START_EXAMPLES = 256
#: Draws of dequantisation noise of the importance-weighted bound.
BOUND_DRAWS = 100
_COLUMNS = 8


class FlowStage(StageModule):
    """A stage that trains a flow, whose subclass says by which loss.

    Adam, or Adamax, with a learning rate that rises linearly and falls on a cosine, per step. Gradients are cut to a
    norm. What is validated, sampled and left is a moving average of the parameters. A gradient that is not finite is a
    ValueError that names the layer where it began, before any parameter is touched; it is noticed on all ranks alike.

    Every random number is a function of the seed, the epoch and the batch, so an interrupted run ends like an
    uninterrupted one.
    """

    full_precision: ClassVar[bool] = True
    #: Before the unit's name in logged metrics.
    prefix: ClassVar[str] = ""

    def check_settings(self) -> None:
        """Raise a ValueError for settings out of range; after `save_hyperparameters`."""
        settings = self.hparams
        check_above(0, lr=settings["lr"], clip_norm=settings["clip_norm"], temperature=settings["temperature"])
        check_between(0, settings["lr"], final_lr=settings["final_lr"])
        check_share(warmup=settings["warmup"], ema_decay=settings["ema_decay"])
        check_choice(OPTIMIZERS, optimizer=settings["optimizer"])
        check_at_least(0, num_pictures=settings["num_pictures"], bound_examples=settings["bound_examples"])

    @override
    def check_data(self, data: Data) -> None:
        check_flow_data(data, type(self).__name__)

    @abstractmethod
    def make_flow(self, context: StageContext, generator: torch.Generator) -> Flow:
        """The flow before training; what is drawn globally is seeded, `generator` is for the rest."""

    @abstractmethod
    def loss(self, examples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """What is minimised, a number, and the log-likelihoods of the examples in nats, with shape (B,)."""

    @override
    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        self.follow(context.data.unit, self.prefix)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, context.stage, "parameters"))
            self.model = self.make_flow(context, context.generator("rotations"))
        self.average = AveragedModel(self.model, multi_avg_fn=self._blend)
        self.average.requires_grad_(False)
        self.train_likelihood, self.val_likelihood = self._likelihood(), self._likelihood()

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        self.begin_stage(request.context)
        self.log = lambda *_, **__: None  # type: ignore[method-assign]  # there is no Trainer
        files, features = teacher_left(self.averaged, request)
        return network_plan(
            request,
            self.model,
            lambda examples: self.loss(examples, torch.Generator().manual_seed(0))[0],
            files=files,
            leaves=dict.fromkeys(self.leaves, features),
            averaged=True,
        )

    def first_examples(self, context: StageContext) -> Tensor:
        """Training examples, spread evenly over all, that a new flow is standardised on."""
        count = context.data.num_examples("train")
        found: Tensor = context.data.batch("train", torch.linspace(0, count - 1, min(count, START_EXAMPLES)).long())
        return found

    @property
    def averaged(self) -> Flow:
        """The flow with averaged parameters."""
        found = self.average.module
        assert isinstance(found, Flow)
        return found

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        settings = self.hparams
        optimizer = OPTIMIZERS[settings["optimizer"]](self.model.parameters(), lr=settings["lr"])
        num_steps, final = self.trainer.estimated_stepping_batches, settings["final_lr"] / settings["lr"]
        schedule = warmup_cosine(optimizer, num_steps, settings["warmup"], self._context.stage, final)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        generator = self._context.generator("step", self.current_epoch, batch_idx, 0)
        count, self._last = len(batch[0]), batch[0]
        share = self.share_of_batch(count)
        if not count:  # the other ranks have the whole batch; any example does for a gradient of zero
            self._last = batch[0].new_zeros(1, *batch[0].shape[1:])
        with batch_noise(count):
            loss, log_B = self.loss(self._last, generator)
        if count:
            self.train_likelihood.update(log_B)
            self.log(f"train/{self.prefix}{self.unit.name}", self.train_likelihood, on_step=False, on_epoch=True)
        return loss * share

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Cut gradients as the Trainer was told, else to `clip_norm`; refuse those that are not finite."""
        if gradient_clip_val is None:
            norm = clip_grad_norm_(self.model.parameters(), self.hparams["clip_norm"])
        else:
            norm = get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        if not bool(norm.isfinite()):
            raise ValueError(self._fault())

    @override
    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        self.average.update_parameters(self.model)

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.val_likelihood.update(self.averaged.log_prob(batch[0]))
        name = f"{self.prefix}{self.unit.name}"
        self.log(f"val/{name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.hparams["num_pictures"] > 0 and not self.trainer.sanity_checking:
            self._show(f"epoch_{self.current_epoch:03d}")

    @torch.no_grad()
    def figures(self, context: StageContext) -> dict[str, float]:
        """What the averaged flow reaches on validation, its size, its speed, and how loose its bound is.

        "val_<unit>"; "num_parameters"; "densities_per_second" and "samples_per_second" on batches of 64; of images also
        "num_draws" behind the bound, and of some validation images the bound with 100 draws of the noise and the
        importance-weighted one, "few_bound_<unit>" and "few_importance_<unit>".
        """
        flow, data, unit = self.averaged.eval(), context.data, context.data.unit.name
        found = {f"val_{unit}": reached(flow, data, "val", self.device), "num_parameters": float(flow.num_parameters)}
        index = torch.arange(min(64, data.num_examples("val")))
        examples, generator = data.batch("val", index).to(self.device), context.generator("speed")
        found["densities_per_second"] = len(index) / _seconds(lambda: flow.log_prob(examples), self.device)
        found["samples_per_second"] = 64 / _seconds(lambda: flow.sample(64, generator=generator), self.device)
        count = min(self.hparams["bound_examples"], data.num_examples("val"))
        if isinstance(flow, teachers.ImageFlow):
            found["num_draws"] = float(flow.num_draws)
        if isinstance(flow, teachers.ImageFlow) and count > 0:
            few = data.batch("val", torch.arange(count)).to(self.device)
            for name, bound in (
                ("bound", flow.log_prob_bound),
                ("importance", flow.importance_weighted_bound),
            ):
                log_B = bound(few, BOUND_DRAWS, context.generator("bound")).double()
                found[f"few_{name}_{unit}"] = float(data.unit.from_nats(log_B.sum(), data.num_dims, count))
        return found

    def _blend(self, averages: Any, current: Any, num_averaged: Any) -> None:
        """A moving average that forgets fast at first, so that few steps do not leave it behind."""
        count = float(num_averaged)
        decay = min(self.hparams["ema_decay"], (1 + count) / (10 + count))
        torch._foreach_lerp_(averages, current, 1 - decay)

    def _fault(self) -> str:
        generator = torch.Generator().manual_seed(0)
        fault = first_fault(self.model, lambda: self.model.flow.encode(self.model.continuous(self._last, generator)[0]))
        return (
            f"stage {self._context.stage}, epoch {self.current_epoch + 1}, step {self.global_step + 1}: the gradient "
            f"is not finite: {fault}; nothing was changed by this step: lower lr, lengthen warmup or lower clip_norm"
        )

    def _likelihood(self) -> MeanLikelihood:
        data = self._context.data
        return MeanLikelihood(data.unit, data.num_dims)

    @torch.no_grad()
    @rank_zero_only
    def _show(self, name: str) -> None:
        """Write samples of the averaged flow at the temperature, eight in a row."""
        data = self._context.data
        if not isinstance(data, VisibleData):
            return
        generator = self._context.generator("pictures")
        drawn = self.averaged.sample(self.hparams["num_pictures"], self.hparams["temperature"], generator)
        save_picture(self, self._context.dir, name, "samples", picture_rows(data.to_rgb(drawn.cpu()), _COLUMNS))


def check_flow_data(data: Data, stage: str) -> None:
    """Raise a ValueError for data that are neither images nor rows of a table."""
    if not isinstance(data.parts, (ImagePatches, Columns)):
        raise ValueError(
            f"{stage} learns images or tables, but the data's parts are {type(data.parts).__name__}: take another stage"
        )


@torch.no_grad()
def reached(flow: Flow, data: Data, split: str, device: torch.device) -> float:
    """What a flow reaches over a whole split in the data's unit, with `num_draws` of noise; by this rank alone."""
    metric = MeanLikelihood(data.unit, data.num_dims, sync_on_compute=False)
    for index in torch.arange(data.num_examples(split)).split(256):
        metric.update(flow.log_prob(data.batch(split, index).to(device)).cpu())
    return float(metric.compute())


def picture_rows(images: Tensor, columns: int) -> Tensor:
    """Images uint8 RGB (N, 3, H, W) side by side, black where a row ends early: uint8 (H', W', 3)."""
    rows = -(-len(images) // columns)
    blank = images.new_zeros(rows * columns - len(images), *images.shape[1:])
    grid = torch.cat([images, blank]).unflatten(0, (rows, columns))  # (rows, columns, 3, H, W)
    return grid.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).contiguous()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The shortest of three times that some work takes, after a first time that is not counted."""
    taken = []
    for _ in range(4):
        start = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.monotonic() - start)
    return max(min(taken[1:]), 1e-9)

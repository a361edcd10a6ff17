"""What the circuit students share: EM optimizers with a schedule, and the step that uses them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_at_least, check_choice, check_counts, check_share, expect
from lvd_lightning.context import StageContext
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.models.sparse_hmm import SparseHMM
from lvd_lightning.stages.stage import StageModule
from lvd_lightning.stages.validation import validation_likelihood

__all__ = [
    "EMStudent",
    "Rule",
    "check_step_sizes",
    "make_optimizer",
    "step_factor",
]

Rule = Literal["anemone", "em"]


def check_step_sizes(lr: float, final_lr: float, momentum: float, lr_name: str = "lr") -> None:
    """Raise a ValueError if these are no step sizes and momentum of EM."""
    expect(0 < lr <= 1, lr_name, lr, "a step size of EM, above 0 and at most 1")
    expect(0 < final_lr <= lr, "final_lr", final_lr, f"a step size above 0 and at most {lr_name}, which is {lr}")
    check_share(momentum=momentum)


def make_optimizer(
    rule: Rule, module: nn.Module, lr: float, momentum: float, pseudocount: float, shared: bool = True
) -> Optimizer:
    """Anemone, or the classical mini-batch rule (which has no momentum); shared: see `CircuitEM`."""
    check_choice(get_args(Rule), optimizer=rule)
    if rule == "anemone":
        return pc.Anemone(module, lr=lr, momentum=momentum, pseudocount=pseudocount, shared=shared)
    return pc.CircuitEM(module, lr=lr, pseudocount=pseudocount, shared=shared)


def step_factor(step: int, total: float, ratio: float, length: float | None = None) -> float:
    """What the step size of step `step` (from 0) is multiplied by: falls linearly from 1 to `ratio`.

    total: steps of the stage; length: steps of a round, in each of which the step size falls anew, in the last (which
    may be shorter) too; None: the stage is one round.
    """
    start = 0.0 if length is None else step // length * length
    end = total if length is None else min(start + length, total)
    return 1 + (ratio - 1) * min(1.0, (step - start) / max(1.0, end - start - 1))


class EMStudent(StageModule, ABC):
    """A stage whose circuits are trained by EM: manual optimisation, the step size falling linearly per step.

    Subclasses keep these among their hyperparameters:

    optimizer: "anemone" or "em".
    lr, final_lr: EM step size, falling linearly per step from one to the other; 0 < final_lr <= lr <= 1.
    momentum: of Anemone's moving averages, 0 <= momentum < 1.
    pseudocount: per sum node and input unit, in examples of a step.
    round_epochs: optional; the step size falls anew in every round of so many epochs.
    val_images: validation images on which the circuit is evaluated after every epoch; another name for it, where
        examples are no images, stands in `val_setting`. None, where a stage allows it: all.
    """

    rules: ClassVar[tuple[str, ...]] = get_args(Rule)
    val_setting: ClassVar[str] = "val_images"
    em: ClassVar[bool] = True
    accumulates: ClassVar[bool] = True
    #: Whether all ranks train the same circuits; False: each has its own, and a step sends nothing.
    shares_circuits: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.num_added = 0  # batches whose flows the next step will take
        self.automatic_optimization = False
        self.save_hyperparameters()
        settings = self.hparams
        check_choice(self.rules, optimizer=settings["optimizer"])
        check_step_sizes(settings["lr"], settings["final_lr"], settings["momentum"])
        check_at_least(0, pseudocount=settings["pseudocount"])
        check_counts(**{self.val_setting: settings[self.val_setting]})

    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        self.follow(context.data.unit)

    def likelihood(self, **arguments: Any) -> MeanLikelihood:
        """A metric in the data's unit."""
        data = self._context.data
        return MeanLikelihood(data.unit, data.num_dims, **arguments)

    @abstractmethod
    def trained(self) -> nn.Module:
        """The module whose circuits are trained."""

    def configure_optimizers(self) -> Any:
        """One EM optimizer, and a schedule that `em_step` steps, as manual optimisation wants it."""
        optimizer = self.make_optimizer()
        total = float(self.trainer.estimated_stepping_batches)
        if total == float("inf"):
            raise ValueError(
                f"stage {self._context.stage}: set max_epochs of its trainer, so that the step size can fall"
            )
        total = self._num_steps(total)
        return [optimizer], [LambdaLR(optimizer, lambda step: self.factor(step, total))]

    def make_optimizer(self) -> Optimizer:
        """The optimizer that the settings ask for."""
        settings = self.hparams
        rule, rest = settings["optimizer"], (settings["lr"], settings["momentum"], settings["pseudocount"])
        return make_optimizer(rule, self.trained(), *rest, self.shares_circuits)

    def factor(self, step: int, total: float) -> float:
        """What `lr` is multiplied by in step `step` (from 0) of `total`."""
        settings = self.hparams
        ratio, round_epochs = settings["final_lr"] / settings["lr"], settings.get("round_epochs")
        length = None if round_epochs is None else round_epochs * total / max(1, self.trainer.max_epochs or 1)
        return step_factor(step, total, ratio, length)

    def renew_optimizer(self) -> None:
        """An optimizer of the circuits as they are now, without moving averages; the schedule goes on."""
        before = self.lr_schedulers()
        assert isinstance(before, LambdaLR)
        self.trainer.strategy.setup_optimizers(self.trainer)
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        schedule.load_state_dict(before.state_dict())
        for group, lr in zip(schedule.optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = lr

    def em_step(self, *losses: Tensor) -> None:
        """Add up the flows of the losses (minus weighted log-likelihoods), and take one step where one is due.

        Flows are sums over examples: those of `batches_per_step` batches are added up, or of as many as are left at the
        end of an epoch.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for loss in losses:
            self.manual_backward(loss)
        self.num_added += 1
        if self.num_added < self.batches_per_step and not self.trainer.is_last_batch:
            return
        self.num_added = 0
        try:
            optimizer.step()
        except ValueError as error:
            where = f"stage {self._context.stage}, epoch {self.current_epoch + 1}, step {self.global_step}"
            raise ValueError(f"{where}: {error}") from error
        optimizer.zero_grad()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        schedule.step()

    @staticmethod
    def type_in(checkpoint: dict[str, Any], tables: str) -> torch.dtype:
        """The type of the circuits in a checkpoint, which one that takes their parameters has to have."""
        found: Tensor = checkpoint["state_dict"][f"{tables}0"]
        return found.dtype

    def _num_steps(self, num_batches: float) -> float:
        """Steps of the stage that has so many batches: an epoch's last step may take fewer than the others."""
        if self.batches_per_step == 1:
            return num_batches
        epochs = max(1, self.trainer.max_epochs or 1)
        return epochs * math.ceil(num_batches / epochs / self.batches_per_step)

    def validate(self, assembled: AssembledCircuit | HiddenMarkovModel | SparseHMM, context: StageContext) -> float:
        """What a circuit reaches on the first `val_images` validation examples; computed by this rank alone."""
        return validation_likelihood(assembled, context.data, self.hparams[self.val_setting], self.device)

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Random numbers of one step, a function of (seed, stage, epoch, batch): in one state on all ranks."""
        return self._context.generator("step", self.current_epoch, batch_idx, 0)  # 0: what one process always had

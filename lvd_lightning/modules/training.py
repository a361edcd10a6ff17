"""What the circuit students share: EM optimizers with a schedule, and the step that uses them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lvd_lightning import circuits as pc
from lvd_lightning.modules.stage import StageContext, StageModule

__all__ = ["EMStudent", "Rule", "make_optimizer"]

Rule = Literal["anemone", "em"]


def make_optimizer(rule: Rule, module: nn.Module, lr: float, momentum: float, pseudocount: float) -> Optimizer:
    """Anemone, or the classical mini-batch rule (which has no momentum)."""
    if rule == "anemone":
        return pc.Anemone(module, lr=lr, momentum=momentum, pseudocount=pseudocount)
    if rule == "em":
        return pc.CircuitEM(module, lr=lr, pseudocount=pseudocount)
    raise ValueError(f"optimizer: expected 'anemone' or 'em', got {rule!r}")


class EMStudent(StageModule):
    """A stage whose circuits are trained by EM: manual optimisation, the step size falling linearly per step.

    Subclasses keep `lr`, `final_lr`, `momentum`, `pseudocount` and `optimizer` in their hyperparameters.
    """

    em: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()

    def begin_stage(self, context: StageContext) -> None:
        self._context = context

    def trained(self) -> nn.Module:
        """The module whose circuits are trained."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def configure_optimizers(self) -> Any:
        """One EM optimizer, and a schedule that LightningModules in manual optimisation step themselves."""
        settings = self.hparams
        optimizer = make_optimizer(
            settings["optimizer"], self.trained(), settings["lr"], settings["momentum"], settings["pseudocount"]
        )
        total = float(self.trainer.estimated_stepping_batches)
        if total == float("inf"):
            raise ValueError(f"stage {self._context.stage}: set max_epochs, so that the step size can fall")
        ratio = settings["final_lr"] / settings["lr"]
        schedule = LambdaLR(optimizer, lambda step: 1 + (ratio - 1) * min(1.0, step / max(1.0, total - 1)))
        return [optimizer], [schedule]

    def em_step(self, *losses: Tensor) -> None:
        """Add up the flows of the losses (minus weighted log-likelihoods) and take one step."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        for loss in losses:
            self.manual_backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        schedule = self.lr_schedulers()
        assert isinstance(schedule, LambdaLR)
        schedule.step()

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Random numbers of one step, a function of (seed, stage, epoch, batch, rank)."""
        return self._context.generator("step", self.current_epoch, batch_idx, self.global_rank)

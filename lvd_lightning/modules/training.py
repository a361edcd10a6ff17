"""What the circuit students share: EM optimizers with a schedule, the step that uses them, and the assignments.

Shapes: N images, P patches.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lvd_lightning import circuits as pc
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.modules.assembled import AssembledCircuit
from lvd_lightning.modules.stage import StageContext, StageModule

__all__ = [
    "EMStudent",
    "Rule",
    "check_at_least",
    "check_rule",
    "check_step_sizes",
    "make_optimizer",
    "read_assignments",
]

Rule = Literal["anemone", "em"]


def check_rule(name: str, rule: str) -> None:
    if rule not in get_args(Rule):
        raise ValueError(f"{name}: got {rule!r}, expected one of {', '.join(get_args(Rule))}")


def check_at_least(least: float, **settings: float | None) -> None:
    """Raise a ValueError for the first setting that is a number below `least` (or NaN)."""
    for name, value in settings.items():
        if value is not None and not value >= least:
            raise ValueError(f"{name}: got {value}, expected at least {least}")


def check_step_sizes(lr: float, final_lr: float, momentum: float, lr_name: str = "lr") -> None:
    """Raise a ValueError if these are no step sizes and momentum of EM."""
    if not 0 < lr <= 1:
        raise ValueError(f"{lr_name}: got {lr}, expected a step size of EM, above 0 and at most 1")
    if not 0 < final_lr <= lr:
        raise ValueError(f"final_lr: got {final_lr}, expected a step size above 0 and at most {lr_name}, which is {lr}")
    if not 0 <= momentum < 1:
        raise ValueError(f"momentum: got {momentum}, expected 0 <= momentum < 1")


def read_assignments(context: StageContext) -> tuple[dict[str, Tensor], int]:
    """The latent value of every patch by split, int64 (N, P), and how many values there are.

    Raises:
        ValueError: the experiment has no stage latents, or it saw other images or patches.
    """
    folder = context.previous("latents")
    if folder is None:
        raise ValueError(f"stage {context.stage} needs the assignments of a stage latents; the experiment has none")
    z_NP = {split: load_assignments(folder, split) for split in ("train", "val")}
    _, height, width = context.data.image_shape
    side = int(context.shared["patch_size"])
    if side < 1 or height % side or width % side:
        raise ValueError(f"patch_size: {side} does not tile images of {height} x {width}; choose a divisor of both")
    for split, found in z_NP.items():
        expected = (context.data.num_examples(split), (height // side) * (width // side))
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{folder}: holds latents of {tuple(found.shape)} images and patches for {split}, the data have "
                f"{expected} with patch_size {side}: run stage latents again"
            )
    return z_NP, int(load_latents_info(folder)["num_clusters"])


def make_optimizer(rule: Rule, module: nn.Module, lr: float, momentum: float, pseudocount: float) -> Optimizer:
    """Anemone, or the classical mini-batch rule (which has no momentum)."""
    check_rule("optimizer", rule)
    if rule == "anemone":
        return pc.Anemone(module, lr=lr, momentum=momentum, pseudocount=pseudocount)
    return pc.CircuitEM(module, lr=lr, pseudocount=pseudocount)


class EMStudent(StageModule):
    """A stage whose circuits are trained by EM: manual optimisation, the step size falling linearly per step.

    Subclasses keep these among their hyperparameters:

    optimizer: "anemone" or "em".
    lr, final_lr: EM step size, falling linearly per step from one to the other; 0 < final_lr <= lr <= 1.
    momentum: of Anemone's moving averages, 0 <= momentum < 1.
    pseudocount: per sum node and input unit, in examples of a step.
    val_images: validation images on which the circuit is evaluated after every epoch.
    """

    em: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()
        settings = self.hparams
        check_rule("optimizer", settings["optimizer"])
        check_step_sizes(settings["lr"], settings["final_lr"], settings["momentum"])
        check_at_least(0, pseudocount=settings["pseudocount"])
        check_at_least(1, val_images=settings["val_images"])

    def begin_stage(self, context: StageContext) -> None:
        self._context = context

    def trained(self) -> nn.Module:
        """The module whose circuits are trained."""
        raise TypeError(f"{type(self).__name__} is abstract")

    def configure_optimizers(self) -> Any:
        """One EM optimizer, and a schedule that `em_step` steps, as manual optimisation wants it."""
        settings = self.hparams
        optimizer = make_optimizer(
            settings["optimizer"], self.trained(), settings["lr"], settings["momentum"], settings["pseudocount"]
        )
        total = float(self.trainer.estimated_stepping_batches)
        if total == float("inf"):
            raise ValueError(
                f"stage {self._context.stage}: set max_epochs of its trainer, so that the step size can fall"
            )
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

    @torch.no_grad()
    def validate(self, assembled: AssembledCircuit, context: StageContext) -> float:
        """Bits per dimension on the first `val_images` validation images, computed by this rank alone."""
        metric = BitsPerDim(assembled.num_dims, sync_on_compute=False).to(self.device)
        count = min(self.hparams["val_images"], context.data.num_examples("val"))
        for index in torch.arange(count).split(64):
            metric.update(assembled.log_prob(context.data.batch("val", index).to(self.device)))
        return float(metric.compute())

    def step_generator(self, batch_idx: int) -> torch.Generator:
        """Random numbers of one step, a function of (seed, stage, epoch, batch, rank)."""
        return self._context.generator("step", self.current_epoch, batch_idx, self.global_rank)

"""The stage that trains a masked autoencoder as the teacher: a network whose features become latent variables.

Shapes: B images of a batch, P patches.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from PIL import Image
from torch import Tensor
from torchmetrics import MeanMetric
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import check_between, check_share
from lvd_lightning.context import StageContext, VisibleData
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.seeds import derive_seed
from lvd_lightning.shares import drawn_for_batch
from lvd_lightning.stages.finite_losses import check_losses
from lvd_lightning.stages.plans.networks import network_plan, teacher_left
from lvd_lightning.stages.schedules import warmup_cosine
from lvd_lightning.stages.stage import StageModule, image_patches

__all__ = ["MAETeacher", "save_picture"]

# Validation spreads these over the images, so that the loss says something about the whole range used in training.
_VALIDATION_RATIOS = (0.1, 0.3, 0.5, 0.7, 0.9)
_PICTURE_RATIO = 0.7


class MAETeacher(StageModule):
    """Trains a masked autoencoder; every step hides another share of the patches, the same for the whole batch.

    AdamW, the learning rate rising linearly from zero and falling to zero on a cosine, per step. There is no
    augmentation: the latents have to match the images as they are. Masks and validation masks are functions of the
    seed, the epoch and the batch or image, so an interrupted run ends like an uninterrupted one.

    Logs `train/loss` and `val/loss`: mean squared errors of masked patches, pixels scaled to [-1, 1]. Writes pictures
    of reconstructions to `pictures/` after every epoch; of each image the original, what the encoder saw, and the
    reconstruction of what it did not see.

    Args:
        hidden_size: width of the encoder and of the features; the other sizes as in `MAE`.
        lr: the largest learning rate.
        warmup: the share of all steps in which the learning rate rises.
        mask_min: the smallest share of hidden patches; shares are drawn uniformly up to `mask_max`.
        num_pictures: validation images shown in the pictures; 0 writes none.

    Example:
        >>> from lvd_lightning.stages import MAETeacher
        >>> teacher = MAETeacher(hidden_size=64, num_layers=2)
        >>> teacher.monitor, teacher.leaves
        ('val/loss', ('features',))
    """

    monitor = "val/loss"
    monitor_mode = "min"
    leaves: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(
        self,
        hidden_size: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        intermediate_size: int | None = None,
        decoder_hidden_size: int = 64,
        decoder_num_layers: int = 2,
        decoder_num_heads: int = 4,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        warmup: float = 0.05,
        mask_min: float = 0.1,
        mask_max: float = 0.9,
        num_pictures: int = 8,
    ) -> None:
        super().__init__()
        check_between(0, 1, mask_max=mask_max)
        check_between(0, mask_max, mask_min=mask_min)
        check_share(warmup=warmup)
        self.save_hyperparameters()

    @override
    def begin_stage(self, context: StageContext) -> None:
        patches = image_patches(context.data, "MAETeacher")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, context.stage, "parameters"))
            self.teacher = teachers.MAE(
                image_size=patches.example_shape[1:],
                patch_size=patches.patch_size,
                hidden_size=self.hparams["hidden_size"],
                num_layers=self.hparams["num_layers"],
                num_heads=self.hparams["num_heads"],
                intermediate_size=self.hparams["intermediate_size"],
                decoder_hidden_size=self.hparams["decoder_hidden_size"],
                decoder_num_layers=self.hparams["decoder_num_layers"],
                decoder_num_heads=self.hparams["decoder_num_heads"],
                num_channels=patches.example_shape[0],
                num_categories=patches.num_categories,
            )
        self.train_loss = MeanMetric()
        self._context = context

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        self.begin_stage(request.context)
        files, features = teacher_left(self.teacher, request)
        mean = (self.hparams["mask_min"] + self.hparams["mask_max"]) / 2

        def loss(images: Tensor) -> Tensor:
            noise_BP = torch.rand(len(images), self.teacher.num_patches)
            return self.teacher(images, mean, noise_BP).loss.mean()

        return network_plan(request, self.teacher, loss, files=files, leaves={"features": features})

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        """No weight decay for biases, norms and tokens, which have one dimension (with leading ones)."""
        trained = [p for p in self.teacher.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trained if p.squeeze().ndim > 1], "weight_decay": self.hparams["weight_decay"]},
            {"params": [p for p in trained if p.squeeze().ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams["lr"], betas=(0.9, 0.95))
        num_steps = self.trainer.estimated_stepping_batches
        schedule = warmup_cosine(optimizer, num_steps, self.hparams["warmup"], self._context.stage)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        low, high = self.hparams["mask_min"], self.hparams["mask_max"]
        # All images of a step have the same share hidden, so that no rank waits for the others.
        ratio = torch.rand((), generator=self._context.generator("ratio", self.current_epoch, batch_idx)).item()
        generator = self._context.generator("mask", self.current_epoch, batch_idx, 0)
        num_patches = self.teacher.num_patches
        noise_BP = drawn_for_batch(lambda count: torch.rand(count, num_patches, generator=generator), len(images))
        share = self.share_of_batch(len(images))
        if not len(images):  # the other ranks have the whole batch; any image does for a gradient of zero
            images, noise_BP = images.new_zeros(1, *images.shape[1:]), noise_BP.new_zeros(1, num_patches)
        share_hidden, noise_BP = low + (high - low) * ratio, noise_BP.to(images.device)
        loss_B = self.teacher(images, share_hidden, noise_BP).loss
        if len(batch[0]):
            again = partial(self.teacher, images, share_hidden, noise_BP)
            losses = {"reconstruction": loss_B}
            check_losses(self, self._context.stage, self.teacher, losses, batch[1], again)
        loss = loss_B.mean()
        self.train_loss.update(loss.detach(), weight=len(batch[0]))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True)
        return loss * share

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        count = len(batch[0])
        mean = self._validation_losses(*batch).mean() if count else torch.zeros((), device=self.device)
        self.log("val/loss", mean, batch_size=count, sync_dist=True, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.hparams["num_pictures"] > 0 and not self.trainer.sanity_checking:
            self._show_reconstructions(f"epoch_{self.current_epoch:03d}")

    @override
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        teachers.save_teacher(self.teacher, context.dir)
        parameters = sum(p.numel() for p in self.teacher.parameters() if p.requires_grad)
        return {"val_loss": self._validate(context), "num_parameters": float(parameters)}

    def _validation_losses(self, images: Tensor, index: Tensor) -> Tensor:
        """Each image's loss under the masks that belong to its index, whatever batch it comes in; shape (B,)."""
        noise_BP = torch.stack([self._image_noise(i) for i in index.tolist()]).to(images.device)
        loss_B = torch.empty(len(images), dtype=torch.float32, device=images.device)
        for turn, ratio in enumerate(_VALIDATION_RATIOS):
            rows = (index % len(_VALIDATION_RATIOS) == turn).nonzero()[:, 0].to(images.device)
            if len(rows) > 0:
                loss_B[rows] = self.teacher(images[rows], ratio, noise_BP[rows]).loss.float()
        return loss_B

    def _image_noise(self, index: int) -> Tensor:
        return torch.rand(self.teacher.num_patches, generator=self._context.generator("validation", index))

    @torch.no_grad()
    def _validate(self, context: StageContext) -> float:
        """The mean validation loss of the present parameters over the whole split."""
        self.eval()
        total, count = 0.0, context.data.num_examples("val")
        for index in torch.arange(count).split(256):
            total += (
                self._validation_losses(context.data.batch("val", index).to(self.device), index).double().sum().item()
            )
        return total / count

    @torch.no_grad()
    @rank_zero_only
    def _show_reconstructions(self, name: str) -> None:
        data = self._context.data
        index = torch.arange(min(self.hparams["num_pictures"], data.num_examples("val")))
        images = data.batch("val", index)
        noise_BP = torch.stack([self._image_noise(int(i)) for i in index])
        output = self.teacher(images.to(self.device), _PICTURE_RATIO, noise_BP.to(self.device))
        rows = reconstruction_rows(images, output.reconstruction.cpu(), output.masked.cpu(), self.teacher, data)
        save_picture(self, self._context.dir, name, "reconstructions", rows)


def save_picture(module: StageModule, stage_dir: Path, name: str, key: str, pixels: Tensor) -> None:
    """Write a picture, uint8 RGB with shape (H, W, 3), to `pictures/<name>.png`, and log it as `key` to W&B."""
    picture = Image.fromarray(pixels.numpy())
    folder = stage_dir / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png")
    for logger in module.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key=key, images=[picture])


def reconstruction_rows(
    images: Tensor, reconstruction: Tensor, masked: Tensor, teacher: teachers.MAE, data: VisibleData
) -> Tensor:
    """A picture of three rows: originals, what was seen (the rest grey), what was seen with the rest reconstructed.

    Args:
        images: whole numbers, with shape (B, C, H, W).
        reconstruction: in [-1, 1], with shape (B, C, H, W).
        masked: the hidden patches, bool with shape (B, P).
        teacher: what made the reconstruction.
        data: what says how images look.

    Returns:
        uint8 RGB with shape (3 H, B W, 3).
    """
    height, side = images.shape[2], teacher.patch_size
    hidden = masked.view(-1, 1, *teacher.grid).repeat_interleave(side, 2).repeat_interleave(side, 3)
    levels = teacher.scale.levels(reconstruction)
    original, predicted = data.to_rgb(images), data.to_rgb(torch.where(hidden, levels, images))
    seen = original.masked_fill(hidden, 128)
    rows = torch.stack([original, seen, predicted])  # (rows, B, 3, H, W)
    return rows.permute(0, 3, 1, 4, 2).reshape(3 * height, -1, 3).contiguous()

"""The stage that trains a vector-quantised autoencoder as the teacher.

Shapes: B images, P patches, K codes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import check_above, check_at_least, check_between, check_share
from lvd_lightning.color import unpatchify
from lvd_lightning.context import StageContext, VisibleData
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.seeds import derive_seed
from lvd_lightning.stages.finite_losses import check_losses
from lvd_lightning.stages.mae_teacher import save_picture
from lvd_lightning.stages.plans.networks import network_plan, teacher_left
from lvd_lightning.stages.schedules import warmup_cosine
from lvd_lightning.stages.stage import StageModule, image_patches
from lvd_lightning.teachers.batch_noise import batch_noise
from lvd_lightning.teachers.vqvae_scores import VQVAEScores

__all__ = ["VQVAETeacher", "code_sheet"]

_SHEET_COLUMNS = 32


class VQVAETeacher(StageModule):
    """Trains a vector-quantised autoencoder, and with it a prior over its codes.

    Adam minimises, per image of D dimensions, -(log p(x | z) + log p(z)) / (D log 2) + commitment |h - code|^2 / E with
    the features h; the prior's gradients stay in the prior, and the codebook follows by moving averages (see
    `Codebook`). There is no augmentation: the latents have to match the images as they are. What is random is a
    function of the seed, the epoch and the batch, so an interrupted run ends like an uninterrupted one.

    Logs, for `train` and `val` alike, `elbo_<unit>` (the evidence lower bound in the data's unit, such as bpd: the sum
    of the next two), `reconstruction_<unit>`, `prior_<unit>`, `loss` (what is minimised), `code_perplexity` and
    `codes_used` (the share of the codebook that some patch has). Writes to `pictures/` after every epoch
    reconstructions (originals above), and, if patches are decoded alone, the patches of all codes, from the most to the
    least used.

    Args:
        channels: of the convolutions; this and the other sizes, and `decoder`, as in `VQVAE`.
        commitment: the weight of the features' distance from their codes.
        lr: the learning rate, reached linearly in the first `warmup` share of all steps.
        final_lr: where the learning rate falls to, on a cosine; null: it stays.
        num_pictures: validation images shown in the pictures; 0 writes none.

    References:
        see `VQVAE`; the defaults are those of Liu et al., ICML 2023, which trains for 50 epochs of batches of 64.

    Example:
        >>> from lvd_lightning.stages import VQVAETeacher
        >>> VQVAETeacher(decoder="convolutional").leaves
        ('features',)
    """

    leaves: ClassVar[tuple[str, ...]] = ("features",)

    def __init__(
        self,
        channels: int = 128,
        num_residual_blocks: int = 2,
        num_features: int = 128,
        codebook_size: int = 1024,
        decoder: str = "independent",
        num_components: int = 10,
        commitment: float = 0.25,
        codebook_decay: float = 0.99,
        prior_hidden_size: int = 128,
        prior_num_layers: int = 4,
        prior_num_heads: int = 4,
        prior_dropout: float = 0.1,
        lr: float = 3e-4,
        final_lr: float | None = None,
        warmup: float = 0.0,
        num_pictures: int = 8,
    ) -> None:
        super().__init__()
        check_at_least(0, commitment=commitment)
        check_above(0, lr=lr)
        check_between(0, lr, final_lr=final_lr)
        check_share(warmup=warmup)
        self.save_hyperparameters()

    @override
    def begin_stage(self, context: StageContext) -> None:
        patches = image_patches(context.data, "VQVAETeacher")
        self.follow(context.data.unit, "elbo_")
        sizes = (
            *("channels", "num_residual_blocks", "num_features", "codebook_size", "decoder", "num_components"),
            *("codebook_decay", "prior_hidden_size", "prior_num_layers", "prior_num_heads", "prior_dropout"),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, context.stage, "parameters"))
            self.teacher = teachers.VQVAE(
                image_size=patches.example_shape[1:],
                patch_size=patches.patch_size,
                num_channels=patches.example_shape[0],
                num_categories=patches.num_categories,
                **{name: self.hparams[name] for name in sizes},
            )
        count = context.data.num_examples("train")
        self.teacher.start_from(context.data.batch("train", torch.linspace(0, count - 1, min(count, 500)).long()))
        self.train_scores, self.val_scores = self._scores(context), self._scores(context)
        self._context = context

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        self.begin_stage(request.context)
        codebook = self.teacher.codebook.codes
        files, features = teacher_left(self.teacher, request)
        return network_plan(
            request,
            self.teacher,
            lambda images: self.train_scores.losses(self.teacher(images)).mean(),
            files=files,
            leaves={"features": {**features, "num_codes": len(codebook)}},
            beside=codebook.numel() * 4 + len(codebook) * 4,
            counted=codebook.numel(),
        )

    @override
    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.Adam(self.teacher.parameters(), lr=self.hparams["lr"])
        final_lr, warmup = self.hparams["final_lr"], self.hparams["warmup"]
        if final_lr is None and warmup == 0.0:
            return optimizer
        final = 1.0 if final_lr is None else final_lr / self.hparams["lr"]
        schedule = warmup_cosine(optimizer, self.trainer.estimated_stepping_batches, warmup, self._context.stage, final)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @override
    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        share, count = self.share_of_batch(len(images)), len(images)
        if not count:  # the other ranks have the whole batch; any image does for a gradient of zero
            images = images.new_zeros(1, *images.shape[1:])
        with batch_noise(count):
            output = self.teacher(images)
        generator = self._context.generator("codes", self.current_epoch, batch_idx, 0)
        if count:
            losses = {
                "reconstruction": output.log_likelihood,
                "prior": output.log_prior,
                "commitment": output.commitment,
            }
            again = partial(self.teacher, images)
            check_losses(self, self._context.stage, self.teacher, losses, batch[1], again)
        self.teacher.codebook.update(output.features[:count], output.codes[:count], generator)
        loss_B = self._log(output, "train", self.train_scores) if count else self.train_scores.losses(output)
        return loss_B.mean() * share

    @override
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        if len(batch[0]):
            self._log(self.teacher(batch[0]), "val", self.val_scores)

    @override
    def on_validation_epoch_end(self) -> None:
        if self.hparams["num_pictures"] > 0 and not self.trainer.sanity_checking:
            self._show(f"epoch_{self.current_epoch:03d}")

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        teachers.save_teacher(self.teacher, context.dir)
        self.eval()
        scores = self._scores(context, sync_on_compute=False).to(self.device)  # of this rank alone
        for index in torch.arange(context.data.num_examples("val")).split(256):
            scores.update(self.teacher(context.data.batch("val", index).to(self.device)))
        found = {f"val_{name}": float(metric.compute()) for name, metric in scores.named()}
        parameters = sum(p.numel() for p in self.teacher.parameters()) + self.teacher.codebook.codes.numel()
        return {**found, "num_parameters": float(parameters)}

    def _scores(self, context: StageContext, **metric_arguments: Any) -> VQVAEScores:
        data, codes = context.data, self.hparams["codebook_size"]
        return VQVAEScores(data.unit, data.num_dims, codes, self.hparams["commitment"], **metric_arguments)

    def _log(self, output: teachers.VQVAEOutput, split: str, scores: VQVAEScores) -> Tensor:
        """Log the scores of a batch; its losses, with shape (B,)."""
        loss_B = scores.update(output)
        for name, metric in scores.named():
            self.log(f"{split}/{name}", metric, on_step=False, on_epoch=True, prog_bar=name.startswith("elbo_"))
        return loss_B

    @torch.no_grad()
    @rank_zero_only
    def _show(self, name: str) -> None:
        data = self._context.data
        images = data.batch("val", torch.arange(min(self.hparams["num_pictures"], data.num_examples("val"))))
        seen = self.teacher.reconstruct(self.teacher.codes(images.to(self.device))).cpu()
        rows = torch.stack([data.to_rgb(images), data.to_rgb(seen)])  # (rows, B, 3, H, W)
        picture = rows.permute(0, 3, 1, 4, 2).reshape(2 * images.shape[2], -1, 3)
        save_picture(self, self._context.dir, name, "reconstructions", picture)
        if self.hparams["decoder"] == "independent":
            save_picture(self, self._context.dir, f"codes_{name}", "codes", code_sheet(self.teacher, data))


def code_sheet(teacher: teachers.VQVAE, data: VisibleData) -> Tensor:
    """The patches that the codes are decoded to, each alone, side by side from the most to the least used one.

    Args:
        teacher: with the independent decoder.
        data: what says how images look.

    Returns:
        uint8 RGB with shape (rows p, 32 p, 3), the rest of the last row black.
    """
    codebook, side = teacher.codebook, teacher.patch_size
    by_use_KE = codebook.codes[codebook.count.argsort(descending=True, stable=True)]
    mean_KCX = teacher.likelihood(by_use_KE[:, None]).mean()[:, 0]
    codes = mean_KCX.round().to(teacher.scale.dtype).unflatten(2, (side, side))
    rgb = data.to_rgb(codes.cpu())
    rows = -(-len(rgb) // _SHEET_COLUMNS)
    patches = pad(rgb.flatten(1), (0, 0, 0, rows * _SHEET_COLUMNS - len(rgb)))
    return unpatchify(patches[None], side, rows * side, _SHEET_COLUMNS * side)[0].permute(1, 2, 0).contiguous()

"""The stage that trains a normalizing flow by maximum likelihood: a teacher of a smaller flow, or of a circuit."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import check_choice, check_counts
from lvd_lightning.context import Data, StageContext
from lvd_lightning.normalizing_flows.dequantize import DEQUANTIZATIONS
from lvd_lightning.normalizing_flows.tabular import KINDS
from lvd_lightning.parts import Columns, ImagePatches
from lvd_lightning.stages.flow_stage import Flow, FlowStage, check_flow_data
from lvd_lightning.teachers.image_flow import FEATURES

__all__ = ["FlowTeacher", "negative_log_likelihood"]


class FlowTeacher(FlowStage):
    """Trains a flow by maximum likelihood: Glow of images, an autoregressive flow or one of couplings of tables.

    The likelihood of images is a bound, with one draw of dequantisation noise per image. How the flow is trained, see
    `FlowStage`.

    Logs, in the data's unit, `train/<unit>` and, of the averaged parameters, `val/<unit>`. Writes samples to
    `pictures/` after every epoch, where the data can be looked at.

    Args:
        flow: "glow" for images, "maf", "nsf" or "realnvp" for tables; null: glow or maf, by the data.
        num_steps: of a flow, for Glow of every level.
        hidden_size: of the network of every step.
        num_levels, dequantization: of Glow.
        num_hidden_layers: of the network of every step, of tables.
        feature: "latents" or "hidden", what a patch's features are; see `ImageFlow`.
        lr, final_lr, warmup: the largest learning rate, what it ends at, and the share of all steps in which it rises.
        optimizer: "adam" or "adamax".
        clip_norm: the largest norm of a gradient, unless the Trainer has a limit of its own.
        ema_decay: of the moving average of parameters; 0 takes the parameters of the last step.
        temperature: of the samples in pictures.
        num_pictures: samples in pictures; 0 writes none.
        bound_examples: validation images on which the importance-weighted bound is told; 0 for none.

    References:
        see `Glow` and `TabularFlow`.

    Example:
        >>> from lvd_lightning.stages import FlowTeacher
        >>> FlowTeacher(num_steps=4).leaves, FlowTeacher.needs
        (('features', 'flow'), ())
    """

    leaves: ClassVar[tuple[str, ...]] = ("features", "flow")

    def __init__(
        self,
        flow: Literal["glow", "maf", "nsf", "realnvp"] | None = None,
        num_steps: int = 8,
        hidden_size: int = 64,
        num_levels: int = 3,
        num_hidden_layers: int = 2,
        dequantization: Literal["uniform", "variational"] = "uniform",
        feature: Literal["latents", "hidden"] = "latents",
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
        check_choice(("glow", *KINDS), flow=flow)
        check_choice(DEQUANTIZATIONS, dequantization=dequantization)
        check_choice(FEATURES, feature=feature)
        check_counts(num_steps=num_steps, hidden_size=hidden_size, num_levels=num_levels)
        check_counts(num_hidden_layers=num_hidden_layers)

    @override
    def check_data(self, data: Data) -> None:
        check_flow_data(data, type(self).__name__)
        kind, is_table = self.hparams["flow"], isinstance(data.parts, Columns)
        if kind is not None and (kind in KINDS) != is_table:
            raise ValueError(
                f"flow: got {kind!r} for data of {type(data.parts).__name__}, expected "
                f"{' or '.join(KINDS) if is_table else 'glow'}, or null"
            )

    @override
    def make_flow(self, context: StageContext, generator: torch.Generator) -> Flow:
        settings, parts = self.hparams, context.data.parts
        sizes = {name: settings[name] for name in ("num_steps", "hidden_size")}
        flow: Flow
        if isinstance(parts, Columns):
            flow = teachers.TableFlow(
                parts.num_parts,
                kind=settings["flow"] or "maf",
                num_hidden_layers=settings["num_hidden_layers"],
                generator=generator,
                **sizes,
            )
        else:
            assert isinstance(parts, ImagePatches)
            flow = teachers.ImageFlow(
                parts.example_shape,
                num_levels=settings["num_levels"],
                dequantization=settings["dequantization"],
                patch_size=parts.patch_size,
                num_categories=parts.num_categories,
                feature=settings["feature"],
                generator=generator,
                **sizes,
            )
        flow.start_from(self.first_examples(context), generator)
        return flow

    @override
    def loss(self, examples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return negative_log_likelihood(self.model, examples, generator)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        teachers.save_teacher(self.averaged, context.dir)
        return self.figures(context)


def negative_log_likelihood(flow: Flow, examples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Nats per dimension, a number, and the log-likelihoods (B,) that it is the mean of."""
    x, log_weight_B = flow.continuous(examples, generator)
    log_B = flow.flow.encode(x).log_prob + log_weight_B
    return -log_B.mean() / x[0].numel(), log_B.detach()

"""The stage that distils a flow into one of fewer steps.

Shapes: B examples.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import check_above, check_at_least, check_choice, check_counts
from lvd_lightning.context import StageContext, VisibleData
from lvd_lightning.normalizing_flows import Glow, TabularFlow
from lvd_lightning.normalizing_flows.distillation import (
    hidden_distance,
    inherit_permutations,
    inherit_weights,
    inherited_orders,
    latent_distance,
    partners,
    synthesis_distance,
)
from lvd_lightning.stages.flow_stage import Flow, FlowStage, picture_rows
from lvd_lightning.stages.mae_teacher import save_picture

__all__ = ["FlowStudent", "interpolations"]

#: Pairs of images in the picture of interpolations, and images of a row.
_PAIRS, _COLUMNS = 4, 8


class FlowStudent(FlowStage):
    r"""A flow of fewer steps that learns from a larger one and from the data.

    It minimises, each with a weight,

    - the negative log-likelihood, in nats per dimension;
    - the mean squared distance of its latents from the teacher's;
    - the same of what both hold on the way: of images at every squeeze, of tables after every step and its partner's;
    - the distance of what both make of the same latents, which are drawn at a low temperature.

    All distances are means over dimensions, so that weights mean the same for data of any size. Partners are spread
    evenly over the teacher's steps: of 5 and 3 steps they are 1, 3 and 5.

    Logs `train/<unit>`, `train/latent`, `train/intermediate` and `train/synthesis` (those that have a weight) and, of
    the averaged parameters, `val/<unit>`. Writes samples to `pictures/` after every epoch and, at the end, images on
    the way between two validation images in latent space: a row of the teacher, then one of the student, for four
    pairs.

    Args:
        num_steps: of the student, for Glow of every level.
        hidden_size: of the network of every step; null for the teacher's.
        nll_weight, latent_weight, intermediate_weight, synthesis_weight: of these four.
        synthesis_distance: "l1", or "features" for the teacher's own, on their way to its latents.
        synthesis_temperature: the standard deviation of the latents.
        synthesis_examples: how many are drawn in a step; null for as many as there are examples.
        inherit_permutations: whether what is fixed and permutes comes from the teacher: products of permutations of
            Glow's convolutions, orders of columns.
        inherit_weights: whether the student begins with the parameters of its partners; it takes the permutations too.
        lr, final_lr, warmup, optimizer, clip_norm, ema_decay, temperature, num_pictures, bound_examples: see
            `FlowTeacher`.

    References:
        Walton, Klyukin, Artemev, Derkach, Orlov and Shi, Distilling Normalizing Flows, 2025 (arXiv 2506.21003).

    Example:
        >>> from lvd_lightning.stages import FlowStudent
        >>> FlowStudent(num_steps=3).needs, FlowStudent.leaves
        (('flow',), ('model',))
    """

    needs = ("flow",)
    leaves: ClassVar[tuple[str, ...]] = ("model",)
    model_title = "student"
    model_noun = "flow"

    def __init__(
        self,
        num_steps: int = 3,
        hidden_size: int | None = None,
        nll_weight: float = 0.9,
        latent_weight: float = 0.1,
        intermediate_weight: float = 0.0,
        synthesis_weight: float = 0.0,
        synthesis_distance: Literal["l1", "features"] = "l1",
        synthesis_temperature: float = 0.7,
        synthesis_examples: int | None = None,
        inherit_permutations: bool = True,
        inherit_weights: bool = False,
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
        check_counts(num_steps=num_steps, hidden_size=hidden_size, synthesis_examples=synthesis_examples)
        check_choice(("l1", "features"), synthesis_distance=synthesis_distance)
        check_above(0, synthesis_temperature=synthesis_temperature)
        weights = {
            "nll_weight": nll_weight,
            "latent_weight": latent_weight,
            "intermediate_weight": intermediate_weight,
            "synthesis_weight": synthesis_weight,
        }
        check_at_least(0, **weights)
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)}: all are 0: give at least one of them a weight")
        if inherit_weights and not inherit_permutations:
            raise ValueError(
                "inherit_weights: got True without inherit_permutations: weights belong to what they were learned for; "
                "set both or none"
            )

    @classmethod
    @override
    def load_model(cls, folder: Path) -> nn.Module:
        return teachers.load_teacher(folder)

    @override
    def begin_stage(self, context: StageContext) -> None:
        teacher = teachers.load_teacher(context.required("flow"))
        assert isinstance(teacher, Flow)
        # In a list, so that it is no part of checkpoints, of the optimiser or of what ranks exchange.
        self._teacher = [teacher]
        super().begin_stage(context)

    @property
    def teacher(self) -> Flow:
        """The flow that is distilled."""
        return self._teacher[0]

    @override
    def make_flow(self, context: StageContext, generator: torch.Generator) -> Flow:
        settings, teacher = self.hparams, self.teacher
        arguments = teacher.init_args | {"num_steps": settings["num_steps"]}
        if settings["hidden_size"] is not None:
            arguments["hidden_size"] = settings["hidden_size"]
        partners(teacher.init_args["num_steps"], settings["num_steps"])  # a student of too many steps is said here
        if isinstance(teacher.flow, TabularFlow):
            inherits = settings["inherit_permutations"]
            arguments["orders"] = inherited_orders(teacher.flow, settings["num_steps"]) if inherits else None
        made = type(teacher)(**arguments, generator=generator)
        if settings["inherit_permutations"] and isinstance(made.flow, Glow):
            assert isinstance(teacher.flow, Glow)
            inherit_permutations(made.flow, teacher.flow)
        if settings["inherit_weights"]:
            inherit_weights(made.flow, teacher.flow)
            if isinstance(made, teachers.ImageFlow):
                assert isinstance(teacher, teachers.ImageFlow)
                made.dequantizer.load_state_dict(teacher.dequantizer.state_dict())
        else:
            made.start_from(self.first_examples(context), generator)
        return made

    @override
    def on_fit_start(self) -> None:
        like = next(self.model.parameters())
        self.teacher.to(device=like.device, dtype=like.dtype)

    @override
    def loss(self, examples: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        settings, flow, teacher = self.hparams, self.model.flow, self.teacher.flow
        x, log_weight_B = self.model.continuous(examples, generator)
        found = flow.encode(x)
        log_B = found.log_prob + log_weight_B
        loss = -settings["nll_weight"] * log_B.mean() / x[0].numel()
        distances: dict[str, Tensor] = {}
        if settings["latent_weight"] or settings["intermediate_weight"]:
            with torch.no_grad():
                wanted = teacher.encode(x)
            if settings["latent_weight"]:
                distances["latent"] = latent_distance(found, wanted)
            if settings["intermediate_weight"]:
                distances["intermediate"] = hidden_distance(found, wanted)
        if settings["synthesis_weight"]:
            of_features = settings["synthesis_distance"] == "features"
            count = settings["synthesis_examples"] or len(x)
            temperature = settings["synthesis_temperature"]
            distances["synthesis"] = synthesis_distance(flow, teacher, count, temperature, of_features, x, generator)
        for name, distance in distances.items():
            loss = loss + settings[f"{name}_weight"] * distance
            self.log(f"train/{name}", distance, on_step=False, on_epoch=True, batch_size=len(x), sync_dist=True)
        return loss, log_B.detach()

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        teachers.save_teacher(self.averaged, context.dir)
        if self.hparams["num_pictures"] > 0 and isinstance(context.data, VisibleData):
            self._show_interpolations(context)
        return self.figures(context)

    def _show_interpolations(self, context: StageContext) -> None:
        data, flows = context.data, (self.teacher.to(self.device), self.averaged)
        count = min(2 * _PAIRS, data.num_examples("val") // 2 * 2)
        if count == 0:
            return
        images = data.batch("val", torch.linspace(0, data.num_examples("val") - 1, count).long()).to(self.device)
        shown = [interpolations(flow, images, _COLUMNS) for flow in flows if isinstance(flow, teachers.ImageFlow)]
        rows = torch.stack(shown, 1).flatten(0, 2)  # (pairs, teacher and student, images of a row, C, H, W)
        picture = picture_rows(data.to_rgb(rows.cpu()), _COLUMNS)
        save_picture(self, context.dir, "interpolations", "interpolations", picture)


@torch.no_grad()
def interpolations(flow: teachers.ImageFlow, images: Tensor, num_images: int) -> Tensor:
    """Images on straight lines between the latents of two images, from the first to the second.

    Args:
        images: (2 N, C, H, W), pairs one after another.
        num_images: of each line, both ends included.

    Returns:
        Whole numbers with shape (N, num_images, C, H, W).
    """
    latents = flow.flow.encode(flow.continuous(images, torch.Generator(images.device).manual_seed(0))[0]).latents
    shares = torch.linspace(0, 1, num_images, device=images.device, dtype=latents[0].dtype)
    mixed = []
    for z in latents:
        share = shares.view(1, -1, *[1] * (z.ndim - 1))
        mixed.append(((1 - share) * z[0::2, None] + share * z[1::2, None]).flatten(0, 1))
    return flow.dequantizer.levels(flow.flow.decode(mixed)).unflatten(0, (-1, num_images))

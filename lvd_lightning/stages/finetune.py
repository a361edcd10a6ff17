"""Stage "finetune": log p(x) of the assembled circuit, end to end, in bounded memory.

Shapes: B images, P patches, D variables of a patch, K latent values, M candidates per patch.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning.checks import check_above, check_share, expect
from lvd_lightning.context import StageContext
from lvd_lightning.latents.assignments import read_assignments
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.evidence import Candidates, CircuitGroups, EvidenceCache
from lvd_lightning.models.evidence_source import EvidenceSource, load_candidate_table
from lvd_lightning.models.posterior_loss import conditional_loss
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.stages.em_student import EMStudent, Rule
from lvd_lightning.stages.plans.students import finetune_plan

__all__ = ["FinetuneStudent"]


class FinetuneStudent(EMStudent):
    r"""Finetunes prior and conditionals together by EM on log p(x) = log sum_z p(z) prod_i p(x_i | z_i).

    A step has two halves, both of which need little memory. First the evidence log p(x_i | z_i = k) without gradients;
    through it the prior's backward pass gives the posteriors p(z_i = k | x). Then only pairs of a patch and a latent
    value whose posterior exceeds `posterior_floor` pass through their conditional once more, weighted by it: by the
    chain rule these are the flows of the whole circuit.

    Evidence is computed for values whose kept evidence (see `PriorStudent`) is within `margin` nats of the patch's
    best, about one value in ten; for the others the kept evidence stands in. Of images without kept evidence it is
    computed for all candidates. With `margin: null` and `posterior_floor: 0` every step is exact. Validation always is.

    Logs, in the data's unit, `train/<unit>` and `val/<unit>` (on the first `val_images` validation images).

    Args:
        optimizer, lr, final_lr, momentum, pseudocount, val_images: see `EMStudent`.
        margin: in nats; null computes the evidence of all latent values in every step.
        posterior_floor: posteriors below it count as zero.
        slots: slots per conditional circuit and step, as a multiple of the mean number of its patches.
        train_prior: whether the prior learns, too. With many latent values and few images it overfits, since an edge
            between two latents has a table of all pairs of values.

    Example:
        >>> from lvd_lightning.stages import FinetuneStudent
        >>> stage = FinetuneStudent(lr=0.1, final_lr=0.01)
        >>> stage.needs, stage.leaves
        (('prior', 'model'), ('model',))
    """

    needs = ("prior", "model")
    leaves: ClassVar[tuple[str, ...]] = ("model",)
    model_title = "finetuned"

    def __init__(
        self,
        optimizer: Rule = "anemone",
        lr: float = 0.2,
        final_lr: float = 0.02,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        margin: float | None = 12.0,
        posterior_floor: float = 1e-3,
        slots: float = 2.0,
        val_images: int = 256,
        train_prior: bool = True,
    ) -> None:
        super().__init__()
        expect(margin is None or margin > 0, "margin", margin, "more than 0 nats, or null for no limit")
        check_share(posterior_floor=posterior_floor)
        check_above(0, slots=slots)

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return finetune_plan(self.hparams, request)

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.assembled = AssembledCircuit.load(context.required("model"))
        self.assembled.prior.requires_grad_(self.hparams["train_prior"])
        self.source: EvidenceSource | None = None
        if self.hparams["margin"] is not None:
            self.source = self._source(context, context.required("prior") / "evidence")
        self.train_likelihood, self.val_likelihood = self.likelihood(), self.likelihood()

    @override
    def trained(self) -> nn.Module:
        return self.assembled if self.hparams["train_prior"] else self.assembled.conditional

    @override
    def on_fit_start(self) -> None:
        if self.source is not None:
            self.groups.to(self.device)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        if not len(images):  # the other ranks have the whole batch, and wait for what this one has of it
            nothing_BPK = torch.zeros(0, self.assembled.num_positions, self.assembled.num_states, device=self.device)
            self._conditional_loss(images, nothing_BPK, batch_idx)
            self.em_step()
            return
        evidence_BPK = self._evidence(images, index).requires_grad_()
        log_B = self.assembled.prior.log_prob(evidence_BPK)[:, 0]
        self.manual_backward(-log_B.sum())
        assert evidence_BPK.grad is not None
        self.em_step(self._conditional_loss(images, -evidence_BPK.grad, batch_idx))
        self.train_likelihood.update(log_B)
        self.log(f"train/{self.unit.name}", self.train_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        if bool(wanted.any()):
            self.val_likelihood.update(self.assembled.log_prob(images[wanted]))
        self.log(f"val/{self.unit.name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Keep the best epoch, or the circuit that finetuning began with if no epoch is better on validation."""
        folder = context.required("model")
        before = AssembledCircuit.load(folder).to(self.device)
        at_start, at_best = self.validate(before, context), self.validate(self.assembled, context)
        improved = at_best < at_start if self.unit.lower_is_better else at_best > at_start
        if not improved:
            warnings.warn(
                f"finetuning did not better the validation {self.unit.name} ({at_start:.4f} before, {at_best:.4f} at "
                "best): the "
                f"circuit of stage {folder.name} is kept; try a smaller lr or a larger pseudocount",
                stacklevel=2,
            )
        kept = self.assembled if improved else before
        kept.save(context.dir)
        return {
            f"val_{self.unit.name}": at_best if improved else at_start,
            "improved": float(improved),
            "val_images": min(self.hparams["val_images"], context.data.num_examples("val")),
            "num_parameters": kept.num_parameters,
        }

    @torch.no_grad()
    def _evidence(self, images: Tensor, index: Tensor) -> Tensor:
        """log p(x_i | z_i), (B, P, K): fresh within the margin, kept beyond it, -inf for no candidates."""
        if self.source is None:
            return self.assembled.evidence(images)
        self.groups.refresh()
        found_BPK = self.source.evidence(images, index)
        image_B = (index < self.source.num_kept).nonzero()[:, 0]  # the others are fresh
        kept_BPK = found_BPK[image_B]
        near = kept_BPK > kept_BPK.amax(-1, keepdim=True) - self.hparams["margin"]
        image, position, state = near.nonzero(as_tuple=True)
        image = image_B[image]
        circuit, head = self.assembled.head_index.locate(state, position)
        patches_ND = self.assembled.split(images).flatten(0, 1)
        item = image * self.assembled.num_positions + position
        found_BPK[image, position, state] = self.groups.log_prob(patches_ND, item, circuit, head).to(found_BPK.dtype)
        return found_BPK

    def _conditional_loss(self, images: Tensor, posterior_BPK: Tensor, batch_idx: int) -> Tensor:
        return conditional_loss(
            self.assembled,
            images,
            posterior_BPK,
            floor=self.hparams["posterior_floor"],
            slots=self.hparams["slots"],
            generator=self.step_generator(batch_idx),
        )

    def _source(self, context: StageContext, folder: Path) -> EvidenceSource:
        """What training the prior kept, and how to compute the rest of it."""
        cache, table_KM = EvidenceCache.open(folder / "train"), load_candidate_table(folder)
        if cache is None and table_KM is None:
            raise ValueError(f"{folder}: is not complete; run stage {folder.parent.name} again, or set margin: null")
        z_NP = read_assignments(context)[0]["train"]
        self.groups = CircuitGroups(self.assembled.conditional, self._load(cache))
        candidates = None if table_KM is None else Candidates(table_KM.to(context.device), self.groups)
        return EvidenceSource(self.assembled, cache, candidates, z_NP)

    def _load(self, cache: EvidenceCache | None) -> Tensor:
        """How many patches of a sample have each circuit within the margin; without a sample, equally many."""
        if cache is None:
            return torch.ones(self.assembled.conditional.num_circuits)
        sample = torch.arange(0, len(cache), max(1, len(cache) // 512))
        kept_BPK = cache.evidence(sample, "cpu")
        near = kept_BPK > kept_BPK.amax(-1, keepdim=True) - self.hparams["margin"]
        _, position, state = near.nonzero(as_tuple=True)
        circuit, _ = self.assembled.head_index.locate(state, position)
        return torch.bincount(circuit, minlength=self.assembled.conditional.num_circuits)

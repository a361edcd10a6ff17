"""Stage "prior": p(z) over the latents of an image, first from assignments, then on soft evidence.

Shapes: B images, P patches, K latent values, M candidates per patch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_above, check_at_least, check_counts, check_share
from lvd_lightning.circuits.io import pack_structure, unpack_structure
from lvd_lightning.context import Data, StageContext
from lvd_lightning.latents.assignments import read_assignments
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.evidence import CHUNK_IMAGES, Candidates, CircuitGroups, EvidenceCache, candidate_table
from lvd_lightning.models.evidence_source import (
    EvidenceSource,
    images_within,
    load_candidate_table,
    save_candidate_table,
)
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.models.priors import chow_liu_prior, clusters_tree, edge_kinds, hidden_prior
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import on_first, wait
from lvd_lightning.shares import own_chunks
from lvd_lightning.stages.em_student import EMStudent, Rule
from lvd_lightning.stages.plans.students import prior_plan

__all__ = ["PriorStudent"]


class PriorStudent(EMStudent):
    """The prior: a Chow-Liu tree over z in closed form from counts, or with `num_units` a hidden one begun from it.

    Trained for `hard_epochs` epochs on assignments (which a tree from counts does not need), then on soft evidence: the
    log-likelihoods of every patch under the frozen conditionals, computed once and kept in `evidence/`, so that the
    prior is fitted to log p(x) (the latent distribution step of Liu et al., ICLR 2023, section 3). With many values and
    few images that overfits: the prior that it began with is kept if no epoch is better on validation (unless edges
    are to be pruned).

    Logs, in the data's unit, `train/<unit>`, `val/<unit>` (exact: all latent values, on the first `val_images`
    validation images).

    Args:
        num_units: null for the tree over z itself, else the states of its hidden variables, which begin as groups of
            the states of z (see `hidden_prior`).
        hard_epochs: epochs on assignments; what is counted needs none.
        candidates: latent values kept per patch, those that patches of its cluster may have; null for all. What is
            left out counts as impossible, so the training figure is a bound; validation leaves nothing out.
        max_cache_gb: disk space for the evidence of training images, in gigabytes; what does not fit is computed again
            in every epoch, here and in finetuning.
        counts_pseudocount: examples that smooth the counts of a parent's state.
        shrinkage: so many examples draw the counts of a parent's state towards those of all pairs of patches that lie
            alike (see `chow_liu_prior`); null: as many as explain a tenth of the training images best.
        prune_threshold: at the beginning of the last epoch, remove edges with at most this share of the training
            images' flow; null removes none. With K states a tree over P patches has P K^2 edges, most of them idle.
        optimizer, lr, final_lr, momentum, pseudocount, val_images: see `EMStudent`.

    Example:
        >>> from lvd_lightning.stages import PriorStudent
        >>> stage = PriorStudent(candidates=8)
        >>> stage.needs, stage.leaves
        (('latents', 'conditionals'), ('prior', 'model'))
    """

    needs = ("latents", "conditionals")
    leaves: ClassVar[tuple[str, ...]] = ("prior", "model")
    model_title = "distilled"

    def __init__(
        self,
        num_units: int | None = None,
        hard_epochs: int = 0,
        candidates: int | None = 16,
        max_cache_gb: float = 20.0,
        counts_pseudocount: float = 1.0,
        shrinkage: float | None = None,
        prune_threshold: float | None = None,
        optimizer: Rule = "anemone",
        lr: float = 0.2,
        final_lr: float = 0.02,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        val_images: int = 256,
    ) -> None:
        super().__init__()
        check_counts(num_units=num_units, candidates=candidates)
        check_at_least(0, hard_epochs=hard_epochs, max_cache_gb=max_cache_gb)
        check_above(0, counts_pseudocount=counts_pseudocount)
        check_at_least(0, shrinkage=shrinkage)
        check_share(prune_threshold=prune_threshold)

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return prior_plan(self.hparams, request)

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.z_NP, num_states = read_assignments(context)
        conditional = pc.load(context.required("conditionals") / "conditional")
        self.assembled = AssembledCircuit(
            self._first_prior(context, num_states, conditional),
            conditional,
            context.data.parts,
        )
        self.assembled.conditional.requires_grad_(False)
        self.assembled.to(context.device)
        self.train_evidence = self._train_evidence(context)
        count = min(self.hparams["val_images"], context.data.num_examples("val"))
        self.val_cache = self._cache(context, "val", (count, self.assembled.num_positions, num_states), None)
        self.train_likelihood, self.val_likelihood, self.hard_likelihood = (self.likelihood() for _ in range(3))

    @override
    def trained(self) -> nn.Module:
        return self.assembled.prior

    @override
    def on_train_epoch_start(self) -> None:
        """Prune, so that the last epoch trains, and validation judges, what was pruned."""
        threshold = self.hparams["prune_threshold"]
        if threshold is not None and self.current_epoch + 1 == self.trainer.max_epochs:
            self.replace_prior(pc.prune(self.assembled.prior, self.flows(), threshold))
            self.renew_optimizer()

    def flows(self) -> pc.Flows:
        """Flows of the prior over all training images, summed over all processes, which all have to call."""
        flows, data = pc.Flows(self.assembled.prior), self._context.data
        own = own_chunks(len(self.z_NP["train"]), CHUNK_IMAGES)
        for index in torch.arange(own.start, own.stop).split(CHUNK_IMAGES):
            images = data.batch("train", index).to(self.device)
            flows.add(self.train_evidence.evidence(images, index.to(self.device)))
        flows.all_reduce()
        return flows

    def replace_prior(self, graph: pc.CircuitGraph | list[pc.CircuitGraph]) -> None:
        """Go on with another prior over the same latents."""
        self.assembled.prior = pc.Circuit(graph[0] if isinstance(graph, list) else graph).to(self.device)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The structure of the prior: which edges are left."""
        text, tensors = pack_structure(self.assembled.prior.structures)
        checkpoint["prior"] = {"structure": text, "tensors": tensors}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the prior of a checkpoint, whose parameters are loaded next."""
        self.replace_prior(unpack_structure(checkpoint["prior"]["structure"], checkpoint["prior"]["tensors"]))
        self.assembled.prior.to(self.type_in(checkpoint, "assembled.prior.tables."))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        if not len(images):  # the other ranks have the whole batch
            self.em_step()
            return
        if self.current_epoch < self.hparams["hard_epochs"]:
            z_BP = self.z_NP["train"][index.cpu()].to(images.device)
            log_B = self.assembled.prior_log_prob(z_BP)
            self.hard_likelihood.update(log_B)
            self.log(f"train/log_p_z_{self.unit.name}", self.hard_likelihood, on_step=False, on_epoch=True)
        else:
            log_B = self.assembled.prior.log_prob(self.train_evidence.evidence(images, index))[:, 0]
            self.train_likelihood.update(log_B)
            self.log(f"train/{self.unit.name}", self.train_likelihood, on_step=False, on_epoch=True, prog_bar=True)
        self.em_step(-log_B.sum())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < len(self.val_cache)
        if bool(wanted.any()):
            evidence_BPK = self.val_cache.evidence(index[wanted], images.device)
            self.val_likelihood.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
        self.log(f"val/{self.unit.name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Keep the best epoch, or the prior that training began with if no epoch is better on validation."""
        found, improved = self._validate_prior(), True
        if self.hparams["prune_threshold"] is None:  # else what is smaller is wanted, better or not
            trained = self.assembled.prior
            self.assembled.prior = self._first_prior(context, self.assembled.num_states, self.assembled.conditional)
            self.assembled.prior.to(self.device)
            at_start = self._validate_prior()
            improved = found < at_start if self.unit.lower_is_better else found > at_start
            if improved:
                self.assembled.prior = trained
            else:
                found = at_start
        self.assembled.save(context.dir)
        return {
            f"val_{self.unit.name}": found,
            "improved": float(improved),
            "val_images": len(self.val_cache),
            "num_parameters": self.assembled.num_parameters,
        }

    def _validate_prior(self) -> float:
        """What the circuit reaches on the validation images whose evidence is kept; of this rank alone."""
        metric = self.likelihood(sync_on_compute=False).to(self.device)
        for index in torch.arange(len(self.val_cache)).split(256):
            evidence_BPK = self.val_cache.evidence(index, self.device)
            metric.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
        return float(metric.compute())

    def _first_prior(self, context: StageContext, num_states: int, conditional: pc.Circuit) -> pc.Circuit:
        z_NP = self.z_NP["train"]
        tree = clusters_tree(z_NP, HeadIndex.of(conditional, num_states, z_NP.shape[1]))
        counting = {
            "pseudocount": self.hparams["counts_pseudocount"],
            "kinds": edge_kinds(tree, context.data.parts),
            "shrinkage": self.hparams["shrinkage"],
        }
        if self.hparams["num_units"] is None:
            return chow_liu_prior(z_NP, num_states, tree, **counting)
        return hidden_prior(
            z_NP, num_states, self.hparams["num_units"], tree, context.generator("parameters"), **counting
        )

    def _train_evidence(self, context: StageContext) -> EvidenceSource:
        """The evidence of training images, of candidates; as much of it as fits is computed once. All ranks call."""
        folder, states = context.dir / "evidence", self.assembled.num_states
        kept = min(self.hparams["candidates"] or states, states)
        shape = (context.data.num_examples("train"), self.assembled.num_positions, kept)
        count = images_within(self.hparams["max_cache_gb"], shape, states)
        cache, candidates = EvidenceCache.open(folder / "train"), None
        finished = cache is not None and cache.shape == (count, *shape[1:])
        known = load_candidate_table(folder)  # of a run that was killed while it computed the rest
        if kept < states and not (finished and count == shape[0]):
            candidates = find_candidates(context, self.assembled, self.z_NP["train"], kept, known_KM=known)
        if not finished:
            table_KM = None if candidates is None else candidates.table
            on_first(partial(save_candidate_table, folder, table_KM))
            cache = self._cache(context, "train", (count, *shape[1:]), candidates) if count else None
        return EvidenceSource(self.assembled, cache, candidates, self.z_NP["train"])

    def _cache(
        self, context: StageContext, split: str, shape: tuple[int, int, int], candidates: Candidates | None
    ) -> EvidenceCache:
        """The evidence of the first images of a split, computed once. All ranks call."""
        folder = context.dir / "evidence" / split
        found = EvidenceCache.open(folder)
        if found is None or found.shape != shape:
            fill_cache(folder, self.assembled, context.data, split, shape, self.z_NP[split], candidates)
            found = EvidenceCache.open(folder)
        assert found is not None
        return found


def find_candidates(
    context: StageContext,
    assembled: AssembledCircuit,
    z_NP: Tensor,
    num_candidates: int,
    num_images: int = 512,
    known_KM: Tensor | None = None,
) -> Candidates:
    """Candidates of each latent value from a sample of training images, and circuits grouped by their load.

    known_KM: the candidates if they were found before; those of other numbers are not taken.
    """
    sample = torch.randperm(len(z_NP), generator=context.generator("candidates"))[:num_images].sort().values
    images, z_BP = context.data.batch("train", sample).to(context.device), z_NP[sample].to(context.device)
    if known_KM is not None and known_KM.shape == (assembled.num_states, num_candidates):
        table_KM = known_KM.to(z_BP.device)
    else:
        table_KM = candidate_table(assembled, images, z_BP, num_candidates)
    circuit_BMP, _ = assembled.head_index.locate(table_KM[z_BP].permute(0, 2, 1))
    load = torch.bincount(circuit_BMP.flatten(), minlength=assembled.conditional.num_circuits)
    return Candidates(table_KM, CircuitGroups(assembled.conditional, load))


def fill_cache(
    folder: Path,
    assembled: AssembledCircuit,
    data: Data,
    split: str,
    shape: tuple[int, int, int],
    z_NP: Tensor,
    candidates: Candidates | None,
) -> None:
    """Fill a cache of `shape` (N, P, M) with all processes, each its share; the first makes and completes it."""
    sparse, states = candidates is not None, assembled.num_states
    on_first(partial(EvidenceCache.begin, folder, shape, states, sparse))
    rows = own_chunks(shape[0], CHUNK_IMAGES)
    EvidenceCache.fill(folder, assembled, data, split, rows=rows, z_NP=z_NP, candidates=candidates)
    wait()
    on_first(partial(EvidenceCache.complete, folder, states))

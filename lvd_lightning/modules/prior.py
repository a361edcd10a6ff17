"""Stage "prior": p(z) over the latents of an image, first from assignments, then on soft evidence.

Shapes: B images, P patches, K latent values, M candidates per patch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.latents.processes import Processes
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.modules.assembled import AssembledCircuit
from lvd_lightning.modules.evidence import CircuitGroups, EvidenceCache, candidate_table
from lvd_lightning.modules.priors import chow_liu_prior, hidden_prior, latent_tree
from lvd_lightning.modules.stage import StageContext
from lvd_lightning.modules.training import EMStudent, Rule

__all__ = ["PriorStudent", "fill_cache"]


class PriorStudent(EMStudent):
    """The prior: a Chow-Liu tree over z in closed form from counts, or with `num_latents` a hidden Chow-Liu tree.

    Trained for `hard_epochs` epochs on assignments (which a tree from counts does not need), then on soft evidence: the
    log-likelihoods of every patch under the frozen conditionals, computed once and kept in `evidence/`, so that the
    prior is fitted to log p(x) (the latent distribution step of Liu et al., ICLR 2023, section 3).

    Logs `train/bpd`, `val/bpd` (exact: all latent values, on the first `val_images` validation images).

    Args:
        num_latents: None for the tree over z itself, else the states of its hidden variables.
        hard_epochs: epochs on assignments; 0 for the tree from counts.
        candidates: latent values kept per patch, those that patches of its cluster may have; None for all. What is
            left out counts as impossible, so `train/bpd` is an upper bound; validation leaves nothing out.
        counts_pseudocount: examples that smooth the counts of a parent's state.
        optimizer, lr, final_lr, momentum, pseudocount: as in `ConditionalStudent`.
        val_images: as in `ConditionalStudent`.
    """

    def __init__(
        self,
        num_latents: int | None = None,
        hard_epochs: int = 0,
        candidates: int | None = 16,
        counts_pseudocount: float = 1.0,
        optimizer: Rule = "anemone",
        lr: float = 0.2,
        final_lr: float = 0.02,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        val_images: int = 256,
    ) -> None:
        super().__init__()
        if num_latents is not None and hard_epochs < 1:
            raise ValueError("hard_epochs: a prior with num_latents starts at random, give it 1 epoch or more on z")
        if candidates is not None and candidates < 1:
            raise ValueError(f"candidates: expected at least 1, or null for all, got {candidates}")

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        latents, conditional_dir = context.previous("latents"), context.previous("conditional")
        if latents is None or conditional_dir is None:
            raise ValueError("stage prior needs stages latents and conditional; the experiment lacks one")
        self.z_NP = {split: load_assignments(latents, split) for split in ("train", "val")}
        num_states = int(load_latents_info(latents)["num_clusters"])
        tree = latent_tree(self.z_NP["train"], num_states)
        if self.hparams["num_latents"] is None:
            prior = chow_liu_prior(self.z_NP["train"], num_states, tree, self.hparams["counts_pseudocount"])
        else:
            prior = hidden_prior(num_states, self.hparams["num_latents"], tree, context.generator("parameters"))
        self.assembled = AssembledCircuit(
            prior,
            pc.load(conditional_dir / "conditional"),
            int(context.shared["patch_size"]),
            context.data.image_shape,
        )
        self.assembled.conditional.requires_grad_(False)
        self.assembled.to(context.device)
        self.caches = self._fill(context)
        dims = self.assembled.num_dims
        self.train_bpd, self.val_bpd, self.hard_bpd = BitsPerDim(dims), BitsPerDim(dims), BitsPerDim(dims)

    @override
    def trained(self) -> nn.Module:
        return self.assembled.prior

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        if self.current_epoch < self.hparams["hard_epochs"]:
            z_BP = self.z_NP["train"][index.cpu()].to(images.device)
            log_B = self.assembled.prior_log_prob(z_BP)
            self.hard_bpd.update(log_B)
            self.log("train/log_p_z_bpd", self.hard_bpd, on_step=False, on_epoch=True)
        else:
            log_B = self.assembled.prior.log_prob(self.caches["train"].evidence(index, images.device))[:, 0]
            self.train_bpd.update(log_B)
            self.log("train/bpd", self.train_bpd, on_step=False, on_epoch=True, prog_bar=True)
        self.em_step(-log_B.sum())

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < len(self.caches["val"].best)
        if bool(wanted.any()):
            evidence_BPK = self.caches["val"].evidence(index[wanted], images.device)
            self.val_bpd.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
        self.log("val/bpd", self.val_bpd, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        self.assembled.save(context.dir)
        self.val_bpd.reset()
        count = len(self.caches["val"].best)
        for index in torch.arange(count).split(256):
            evidence_BPK = self.caches["val"].evidence(index, self.device)
            self.val_bpd.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
        return {
            "val_bpd": float(self.val_bpd.compute()),
            "val_images": count,
            "num_parameters": self.assembled.num_parameters,
        }

    def _fill(self, context: StageContext) -> dict[str, EvidenceCache]:
        """The caches of both splits; complete ones are reused."""
        wanted = self.hparams["candidates"]
        sparse = wanted is not None and wanted < self.assembled.num_states
        folder, data = context.dir / "evidence", context.data
        if EvidenceCache.open(folder / "train") is None or EvidenceCache.open(folder / "val") is None:
            table, groups = None, None
            if sparse:
                table, groups = sparse_plan(context, self.assembled, self.z_NP["train"], wanted)
            for split, count, chosen in (
                ("train", data.num_examples("train"), table),
                ("val", min(self.hparams["val_images"], data.num_examples("val")), None),
            ):
                fill_cache(folder / split, self.assembled, data, split, count, self.z_NP[split], chosen, groups)
        found = {split: EvidenceCache.open(folder / split) for split in ("train", "val")}
        return {split: cache for split, cache in found.items() if cache is not None}


def sparse_plan(
    context: StageContext, assembled: AssembledCircuit, z_NP: Tensor, num_candidates: int, num_images: int = 512
) -> tuple[Tensor, CircuitGroups]:
    """Which candidates each latent value has, from a sample of training images, and circuits grouped by their load."""
    sample = torch.randperm(len(z_NP), generator=context.generator("candidates"))[:num_images].sort().values
    images = context.data.batch("train", sample).to(context.device)
    table_KM = candidate_table(assembled, images, z_NP[sample].to(context.device), num_candidates)
    circuit, _ = assembled.circuit_index(
        table_KM[z_NP[sample].to(context.device)].permute(0, 2, 1).reshape(-1, z_NP.shape[1])
    )
    load = torch.bincount(circuit, minlength=assembled.conditional.num_circuits)
    return table_KM, CircuitGroups(assembled.conditional, load)


def fill_cache(
    folder: Path,
    assembled: AssembledCircuit,
    data: object,
    split: str,
    count: int,
    z_NP: Tensor,
    table_KM: Tensor | None,
    groups: CircuitGroups | None,
) -> None:
    """Fill a cache with all processes, each its share of the images; the first makes and completes it."""
    processes = Processes()
    positions, states = assembled.num_positions, assembled.num_states
    kept = states if table_KM is None else table_KM.shape[1]
    processes.on_first(partial(EvidenceCache.begin, folder, count, positions, kept, table_KM is not None))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    share = -(-count // world)
    rows = range(min(count, rank * share), min(count, (rank + 1) * share))
    EvidenceCache.fill(folder, assembled, data, split, z_NP, table_KM, groups, rows)
    processes.wait()
    processes.on_first(partial(EvidenceCache.complete, folder, states))

"""Stage "conditional": p(x_i | z_i), one circuit per latent value, each trained on its own examples.

Shapes: B images, P patches, D variables of a patch, K latent values, G circuits, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.structures import chow_liu_trees
from lvd_lightning.color import patchify
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.modules.assembled import AssembledCircuit
from lvd_lightning.modules.assignments import read_assignments
from lvd_lightning.modules.priors import chow_liu_prior, latent_tree
from lvd_lightning.modules.routing import few_sizes, route
from lvd_lightning.modules.stage import StageContext
from lvd_lightning.modules.training import EMStudent, Rule, check_at_least

__all__ = ["ConditionalStudent"]


class ConditionalStudent(EMStudent):
    """K independent HCLTs over patches (tied over positions), or one set of K per position.

    All of them run as one folded circuit. In every step each circuit sees the patches of the batch that carry its
    latent value, in equally many slots for all; where there are more patches than slots a random subset stands for
    them by larger weights. The cost of a step depends on the number of patches, not on K.

    Logs `train/lvd_objective_bpd` (of log p(x, z), the prior over z being the Chow-Liu tree of the assignments' counts)
    and `val/bpd`, that of the circuit assembled with the same prior, on the first `val_images` validation images.

    Args:
        num_latents: states of every hidden variable in a conditional circuit.
        tied: one set of circuits for all positions, or one per position.
        optimizer, lr, final_lr, momentum, pseudocount, val_images: see `EMStudent`.
        init: "quantiles" (see `hclt_from_data`) or "random".
        slots: slots per circuit and step, as a multiple of the mean number of patches.
        max_examples: patches per circuit from which its tree (and first parameters) are learnt.
    """

    def __init__(
        self,
        num_latents: int = 16,
        tied: bool = True,
        optimizer: Rule = "anemone",
        lr: float = 0.3,
        final_lr: float = 0.03,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        init: str = "quantiles",
        slots: float = 1.5,
        max_examples: int = 3000,
        val_images: int = 256,
    ) -> None:
        super().__init__()
        if init not in ("quantiles", "random"):
            raise ValueError(f"init: got {init!r}, expected one of quantiles, random")
        if not slots > 0:
            raise ValueError(f"slots: got {slots}, expected a positive multiple of the mean number of patches")
        check_at_least(1, num_latents=num_latents, max_examples=max_examples)

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.z_NP, num_states = read_assignments(context)
        tree = latent_tree(self.z_NP["train"], num_states)
        prior = chow_liu_prior(self.z_NP["train"], num_states, tree)
        conditional = pc.Circuit(self._graphs(context, num_states))
        self.assembled = AssembledCircuit(
            prior, conditional, int(context.shared["patch_size"]), context.data.image_shape
        )
        self.assembled.prior.requires_grad_(False)
        dims = self.assembled.num_dims
        self.train_objective, self.val_bpd, self.val_objective = BitsPerDim(dims), BitsPerDim(dims), BitsPerDim(dims)

    @override
    def trained(self) -> nn.Module:
        return self.assembled.conditional

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        conditional = self.assembled.conditional
        z_BP = self.z_NP["train"][index.cpu()].to(images.device)
        circuit_N, _ = self.assembled.circuit_index(z_BP)
        slots = few_sizes(round(self.hparams["slots"] * len(circuit_N) / conditional.num_circuits))
        routed = route(circuit_N, conditional.num_circuits, slots=slots, generator=self.step_generator(batch_idx))
        patches_ND = self.assembled.patches(images).flatten(0, 1)
        log_GS = conditional.log_prob(patches_ND[routed.index], head=0)
        total = (routed.weight * log_GS).sum()
        self.em_step(-total)
        with torch.no_grad():
            log_z_B = self.assembled.prior_log_prob(z_BP)
            self.train_objective.update(log_z_B + total.detach() / len(images))
        self.log("train/lvd_objective_bpd", self.train_objective, on_step=False, on_epoch=True, prog_bar=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        if bool(wanted.any()):
            self._update_metrics(images[wanted], index[wanted])
        self.log("val/bpd", self.val_bpd, on_step=False, on_epoch=True, prog_bar=True)
        self.log("val/lvd_objective_bpd", self.val_objective, on_step=False, on_epoch=True)

    @override
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        pc.save(self.assembled.conditional, context.dir / "conditional")
        return {
            "val_bpd": self.validate(self.assembled, context),
            "val_images": min(self.hparams["val_images"], context.data.num_examples("val")),
            "num_parameters": self.assembled.conditional.num_parameters,
        }

    @torch.no_grad()
    def _update_metrics(self, images: Tensor, index: Tensor) -> None:
        evidence_BPK = self.assembled.evidence(images)
        z_BP = self.z_NP["val"][index.cpu()].to(images.device)
        self.val_bpd.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
        given_B = evidence_BPK.gather(2, z_BP[..., None]).sum((1, 2))
        self.val_objective.update(given_B + self.assembled.prior_log_prob(z_BP))

    def _graphs(self, context: StageContext, num_states: int) -> list[pc.CircuitGraph]:
        """One HCLT per circuit, its tree learnt on a sample of its own patches."""
        sets = self._examples(context, num_states)
        trees = chow_liu_trees(sets, max_examples=None)
        leaf, latents = pc.Categorical(256), self.hparams["num_latents"]
        generator = context.generator("parameters")
        if self.hparams["init"] == "random":
            return [pc.hclt(tree, latents, leaf, generator=generator) for tree in trees]
        return [
            pc.hclt_from_data(x, tree, latents, leaf, generator=generator) for x, tree in zip(sets, trees, strict=True)
        ]

    def _examples(self, context: StageContext, num_states: int) -> list[Tensor]:
        """At most `max_examples` random patches of every circuit, uint8 (n, D); circuits without any borrow some."""
        z_NP = self.z_NP["train"]
        positions = z_NP.shape[1]
        if not self.hparams["tied"]:
            z_NP = z_NP + num_states * torch.arange(positions)
        num_circuits = num_states * (1 if self.hparams["tied"] else positions)
        limit = self.hparams["max_examples"]
        routed = route(z_NP.reshape(-1), num_circuits, slots=limit, generator=context.generator("examples"))
        filled_GS = routed.weight > 0
        wanted = routed.index[filled_GS].unique()
        patches_MD = _read_patches(context.data, wanted, positions, int(context.shared["patch_size"]))
        place_GS = torch.searchsorted(wanted, routed.index)
        sets = [patches_MD[place[filled]] for place, filled in zip(place_GS, filled_GS, strict=True)]
        others = patches_MD[:: max(1, len(patches_MD) // limit)][:limit]
        return [found if len(found) else others for found in sets]


def _read_patches(data: Any, flat: Tensor, positions: int, patch_size: int) -> Tensor:
    """Patches at flat numbers image * P + position, ascending; uint8 (M, D). Reads every image once."""
    out = []
    images, place = (flat // positions).unique_consecutive(return_inverse=True)
    bounds = torch.searchsorted(place, torch.arange(0, len(images) + 1024, 1024))
    for number, chunk in enumerate(images.split(1024)):
        at = slice(int(bounds[number]), int(bounds[number + 1]))
        patches_BPD = patchify(data.batch("train", chunk), patch_size)
        out.append(patches_BPD[place[at] - number * 1024, flat[at] % positions])
    return torch.cat(out)

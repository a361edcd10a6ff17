"""Stage "conditional": p(x_i | z_i), a circuit per cluster of patches, each trained on its own; some grow more heads.

Shapes: B images, N images of a split, P patches, D variables of a patch, K latent values, G circuits, S slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_above, check_choice, check_counts
from lvd_lightning.circuits.io import pack_structure, unpack_structure
from lvd_lightning.context import Data, StageContext
from lvd_lightning.growing.ancestry import Ancestry
from lvd_lightning.growing.clustering import first_heads
from lvd_lightning.growing.examples import Examples
from lvd_lightning.growing.features import PatchFeatures
from lvd_lightning.growing.likelihood import best_heads
from lvd_lightning.growing.size import CircuitSize
from lvd_lightning.latents import load_latents_info
from lvd_lightning.latents.assignments import read_clusters, write_assignments
from lvd_lightning.latents.kept_patches import keep_patches
from lvd_lightning.models.assembled import MARGIN, AssembledCircuit
from lvd_lightning.models.first_circuits import first_circuits
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.models.leaves import LeafChoice
from lvd_lightning.models.members import Members
from lvd_lightning.models.priors import chow_liu_prior, edge_kinds, latent_tree
from lvd_lightning.models.sharded import ShardedCircuit
from lvd_lightning.models.shared_routing import route_batch
from lvd_lightning.models.structures import PartStructure, StructureName
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import check_agreement, from_first, rank_and_size
from lvd_lightning.shares import part_order
from lvd_lightning.stages.circuit_shards import first_members, own_checkpoint, rebalanced, whole_checkpoint
from lvd_lightning.stages.em_student import EMStudent, Rule
from lvd_lightning.stages.plans.students import conditional_plan

__all__ = ["ConditionalStudent"]

_PRIOR = "assembled.prior."


class ConditionalStudent(EMStudent):
    """A circuit over patches for every cluster (tied over positions), or a set of them per position.

    All of them run as one folded circuit. In every step each circuit sees the patches of the batch in its cluster, in
    equally many slots for all; where there are more patches than slots a random subset stands for them by larger
    weights. The cost of a step depends on the number of patches, not on that of the circuits.

    A circuit may have several heads, each for patches of its own (LVD-PG: Liu, Liu, Van den Broeck and Liang, ICML
    2023): `num_heads` to begin with, and more where `callbacks.GrowClusters` copies some. A latent value z is a head,
    counted through all circuits, and every patch is trained under its head.

    Logs, in the data's unit, `train/lvd_objective_<unit>` (of log p(x, z), the prior over z having the counts of the
    training patches' assignments, in a Chow-Liu tree over the clusters), `val/<unit>`, that of the circuit assembled
    with the same prior, on the first `val_images` validation images, and `val/lvd_objective_<unit>` of these; the z of
    a validation patch is the likeliest head of its cluster.

    Args:
        num_units: states of every hidden variable in an HCLT, units of every region of another structure.
        structure: "hclt"; "rat_spn", whose random splits are drawn for each circuit; or "poon_domingos", rectangles of
            the patch whose pixels keep their channels together.
        structure_settings: of a RAT-SPN depth, num_repetitions and product, of a Poon-Domingos structure delta and
            product; see `PartStructure` for what they are if not given. Circuits with Kronecker products do not grow.
        leaf: the family of all inputs, in place of the data's, as a class path with its arguments in `init_args`; see
            `LeafChoice`. Numbers of values come from the data.
        tied: one set of circuits for all positions, or one per position.
        num_heads: heads per circuit to begin with, clusters of the features inside its cluster; fewer where there are
            too few patches.
        min_examples: training patches per head to begin with.
        optimizer, lr, final_lr, momentum, pseudocount, round_epochs, val_images: see `EMStudent`. Callbacks that edit
            circuits do so at the beginning of rounds; a shorter last round may follow the last edit.
        init: "quantiles", from data (see `hclt_from_data`, and `regions_from_data` for other structures), or "random".
        slots: slots per circuit and step, as a multiple of the mean number of patches.
        max_examples: patches per circuit from which its tree (and first parameters) are learnt.
        sharding: what ranks divide: "data", every rank having all circuits; or "circuits", every rank having some of
            them, in memory that falls with the number of ranks, and all data: a step sends nothing. The result is the
            same, and a run may go on under the other setting.

    Example:
        >>> from lvd_lightning.stages import ConditionalStudent
        >>> stage = ConditionalStudent(num_units=16, structure="rat_spn", structure_settings={"num_repetitions": 2})
        >>> stage.needs, stage.leaves
        (('latents',), ('conditionals',))
    """

    needs = ("latents",)
    leaves: ClassVar[tuple[str, ...]] = ("conditionals",)
    harmless: ClassVar[tuple[str, ...]] = ("sharding",)
    #: Which rank has which circuits; None where all have all.
    members: Members | None = None

    def __init__(
        self,
        num_units: int = 16,
        tied: bool = True,
        num_heads: int = 1,
        min_examples: int = 100,
        optimizer: Rule = "anemone",
        lr: float = 0.3,
        final_lr: float = 0.03,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        round_epochs: int | None = None,
        init: str = "quantiles",
        slots: float = 1.5,
        max_examples: int = 3000,
        val_images: int = 256,
        structure: StructureName = "hclt",
        structure_settings: dict[str, Any] | None = None,
        leaf: str | dict[str, Any] | None = None,
        sharding: Literal["data", "circuits"] = "data",
    ) -> None:
        super().__init__()
        check_choice(("data", "circuits"), sharding=sharding)
        self.structure = PartStructure.of(structure, structure_settings)
        self.leaf = LeafChoice(leaf)
        check_choice(("quantiles", "random"), init=init)
        check_above(0, slots=slots)
        check_counts(num_units=num_units, num_heads=num_heads, min_examples=min_examples)
        check_counts(max_examples=max_examples, round_epochs=round_epochs)
        if num_heads > 1 and not tied:
            raise ValueError(f"num_heads: got {num_heads}, but circuits of their own per position have one head each")

    @override
    def check_data(self, data: Data) -> None:
        self.leaf.over(data.parts.leaf)

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return conditional_plan(self.hparams, self.structure, self.leaf.over(request.data.parts.leaf), request)

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        self.clusters_NP, num_clusters = read_clusters(context)
        self._check_ties(context)
        self._tree = latent_tree(self.clusters_NP["train"], num_clusters)
        self.round = 0
        circuit_NP, num_circuits = self.clusters_NP["train"], num_clusters
        if not self.hparams["tied"]:
            circuit_NP = circuit_NP + num_clusters * torch.arange(circuit_NP.shape[1])
            num_circuits *= circuit_NP.shape[1]
        heads_NP = torch.zeros(circuit_NP.shape, dtype=torch.int16)
        if self.hparams["num_heads"] > 1:
            heads_NP = first_heads(
                self.features(),
                circuit_NP,
                num_circuits,
                self.hparams["num_heads"],
                min_examples=self.hparams["min_examples"],
                generator=self.generator("first heads"),
            )
        self.members = None
        if self.hparams["sharding"] == "circuits" and rank_and_size()[1] > 1:
            self.members = first_members(context, circuit_NP, heads_NP, num_circuits)
        self.shares_circuits = self.members is None
        graphs = first_circuits(
            context,
            circuit_NP,
            heads_NP,
            num_circuits,
            structure=self.structure,
            leaf=self.leaf.over(context.data.parts.leaf),
            num_latents=self.hparams["num_units"],
            from_data=self.hparams["init"] == "quantiles",
            max_examples=self.hparams["max_examples"],
            kept=None if self.members is None else self.members.own.tolist(),
        )
        self._assemble(graphs, heads_NP)
        self.ancestry: Ancestry | None = Ancestry.first(self.heads_per_circuit)
        self.train_objective, self.val_likelihood, self.val_objective = (self.likelihood() for _ in range(3))

    @override
    def trained(self) -> nn.Module:
        return self.assembled.conditional

    def _check_ties(self, context: StageContext) -> None:
        if self.hparams["tied"] and not load_latents_info(context.required("latents"))["pooled"]:
            raise ValueError(
                "tied: is true, but every position has clusters of its own, so that a value means something else at "
                "each: set tied: false, or pooled: true of the stage that leaves latents"
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        conditional = self.assembled.conditional
        z_BP = self._latent_values(self.clusters_NP["train"][index.cpu()], self.heads_NP[index.cpu()]).to(images.device)
        circuit_N, head_N = (found_BP.flatten() for found_BP in self.assembled.head_index.locate(z_BP))
        routed = route_batch(
            circuit_N,
            self._head_index.num_circuits,
            slots=self.hparams["slots"],
            order=part_order(len(images), z_BP.shape[1], images.device),
            generator=self.step_generator(batch_idx),
            whole=self.members is not None,
        )
        if self.members is not None:
            routed = routed.of(self.members.own.to(images.device))
        if not len(images):  # the other ranks have the whole batch
            self.em_step()
            return
        patches_ND = self.assembled.split(images).flatten(0, 1)
        is_filled = routed.weight > 0
        head_GS = torch.where(is_filled, head_N[routed.index], 0)
        log_GS = conditional.log_prob(patches_ND[routed.index], head=head_GS, wanted=is_filled)
        total = (routed.weight * log_GS).sum()
        self.em_step(-total)
        with torch.no_grad():
            self._update_objective(self._share(z_BP), total.detach())
        self.log(
            f"train/lvd_objective_{self.unit.name}", self.train_objective, on_step=False, on_epoch=True, prog_bar=True
        )

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        if bool(wanted.any()):
            self._update_metrics(images[wanted], index[wanted])
        self.log(f"val/{self.unit.name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)
        self.log(f"val/lvd_objective_{self.unit.name}", self.val_objective, on_step=False, on_epoch=True)

    @override
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Hand on the circuits and, if some have several heads, the latent value of every patch of all splits.

        With these go the tree of heads, and some training patches of each for people to look at.
        """
        if isinstance(self.assembled, ShardedCircuit):  # no epoch was the best one
            content = torch.load(context.dir / "last.ckpt", map_location="cpu", weights_only=True)
            self.on_load_checkpoint(content)
            self.load_state_dict(content["state_dict"])
            self.to(self.device)
        conditional = self.assembled.conditional
        pc.save(conditional, context.dir / "conditional")
        if conditional.num_heads > 1:
            z_NP = self._assign(context)
            write_assignments(context.dir, z_NP, self.assembled.num_states)
            keep_patches(context, z_NP["train"], self.assembled.num_states)
            if self.ancestry is not None:
                counts_GH = self.examples().counts(conditional.num_circuits, conditional.num_heads)
                self.ancestry.write(context.dir, counts_GH.tolist())
        return {
            f"val_{self.unit.name}": self.validate(self.assembled, context),
            "val_images": min(self.hparams["val_images"], context.data.num_examples("val")),
            "num_heads": self.assembled.num_states,
            "num_parameters": conditional.num_parameters,
        }

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What the state_dict does not hold: structure, heads of the training patches, rounds of growth, tree of heads.

        The prior, K x K numbers for every patch, is left out: it follows from the heads by counting.
        """
        conditional = self.assembled.conditional
        if self.members is None:
            text, tensors = pack_structure(conditional.structures)
        else:
            text, tensors = whole_checkpoint(conditional, self.members, checkpoint)
        checkpoint["growing"] = {
            "structure": text,
            "tensors": tensors,
            "heads": self.heads_NP,
            "round": self.round,
            "ancestry": None if self.ancestry is None else self.ancestry.plain(),
        }
        for name in [name for name in checkpoint.get("state_dict", {}) if name.startswith(_PRIOR)]:
            del checkpoint["state_dict"][name]

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the circuits of a checkpoint, whose parameters are loaded next, and count their prior."""
        found = checkpoint["growing"]
        self.round = int(found["round"])
        graphs = unpack_structure(found["structure"], found["tensors"])
        if self.members is not None:
            self.members = own_checkpoint(checkpoint, graphs)
            graphs = [graphs[g] for g in self.members.own.tolist()]
        self._assemble(graphs, found["heads"])
        self.assembled.to(self.type_in(checkpoint, "assembled.conditional.tables."))
        if "ancestry" in found:
            known = found["ancestry"]
            self.ancestry = None if known is None else Ancestry.of_plain(known)
        else:  # an older checkpoint: nobody knows what grew from what, unless nothing did
            self.ancestry = None if self.round else Ancestry.first(self.heads_per_circuit)
        for name, counted in self.assembled.prior.state_dict(prefix=_PRIOR).items():
            checkpoint["state_dict"].setdefault(name, counted)  # older checkpoints have it

    @override
    def on_fit_end(self) -> None:
        """From here on the first rank alone goes on, with all circuits."""
        if self.members is not None:
            self.members = None
            self._context.data.whole_batches = False

    @property
    def context(self) -> StageContext:
        """That of the stage."""
        return self._context

    @property
    def heads_per_circuit(self) -> list[int]:
        """How many heads each circuit has."""
        if self.members is not None:
            return list(self.members.heads)
        return [structure.num_heads for structure in self.assembled.conditional.structures]

    def size(self) -> CircuitSize:
        """How large all circuits are; all ranks have to call."""
        found = CircuitSize.of(self.assembled.conditional)
        return found if self.members is None else found.of_all_ranks()

    def examples(self) -> Examples:
        """The training patches with their circuits and heads as they are now.

        Raises:
            ValueError: there is a set of circuits for every position; these do not grow.
        """
        if not self.hparams["tied"]:
            raise ValueError("tied: is false, but only circuits that positions share are pruned, reassigned and grown")
        context = self._context
        return Examples(context.data, self.clusters_NP["train"], self.heads_NP, "train", self.members)

    def features(self) -> PatchFeatures:
        """The features of the training patches."""
        return PatchFeatures.of(self._context)

    def generator(self, purpose: str) -> torch.Generator:
        """Random numbers for an edit, a function of (seed, stage, round)."""
        return self._context.generator(purpose, self.round)

    def replace_circuits(
        self,
        graphs: list[pc.CircuitGraph],
        heads_NP: Tensor | None = None,
        copied: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Go on training with edited circuits, and other heads of the training patches if given, int16 (N, P).

        The same on every process, which is checked; parameters are those of the first. The prior is counted again, and
        there is a new optimizer, with the schedule going on.

        copied: of every circuit the heads that new ones are copies of, in the order of these. Without it the tree of
            heads is known as long as their number stays the same.
        """
        if self.members is None:
            text, tensors = pack_structure(graphs)
            where = f"the structure of the edited circuits (epoch {self.current_epoch + 1}, round {self.round})"
            check_agreement(where, text, tensors)
        else:
            graphs, self.members = rebalanced(graphs, self.members)
        self._assemble(graphs, self.heads_NP if heads_NP is None else self._checked(heads_NP))
        if self.ancestry is not None and copied is not None:
            self.ancestry = self.ancestry.grown(copied, self.current_epoch)
        if self.ancestry is not None and self.ancestry.num_heads != self.heads_per_circuit:
            self.ancestry = None
        with torch.no_grad():
            for table in self.assembled.conditional.tables if self.members is None else ():
                table.copy_(from_first(table))
        self.renew_optimizer()

    def replace_heads(self, heads_NP: Tensor) -> None:
        """Go on with other heads of the training patches, int16 (N, P); the prior is counted again."""
        self.heads_NP = self._checked(heads_NP)
        self.assembled.prior = self._prior().to(self.device)

    def _share(self, values: Tensor) -> Tensor:
        """The rows of this rank's examples, where it has been given all of the batch."""
        if self.members is None:
            return values
        rank, size = rank_and_size()
        return values[rank::size]

    def _checked(self, heads_NP: Tensor) -> Tensor:
        where = f"the heads of the training patches (epoch {self.current_epoch + 1}, round {self.round})"
        check_agreement(where, "", {"heads": heads_NP})
        return heads_NP

    def _assemble(self, graphs: list[pc.CircuitGraph], heads_NP: Tensor) -> None:
        """The circuits, and their prior by the counts of latent values."""
        self.heads_NP = heads_NP
        num_sets = 1 if self.hparams["tied"] else heads_NP.shape[1]
        heads = [graph.num_heads for graph in graphs] if self.members is None else self.members.heads
        self._head_index = HeadIndex(heads, num_sets)
        conditional, parts = pc.Circuit(graphs), self._context.data.parts
        if self.members is None:
            self.assembled = AssembledCircuit(self._prior(), conditional, parts).to(self.device)
        else:
            found = ShardedCircuit(self._prior(), conditional, parts, self._head_index, self.members)
            self.assembled = found.to(self.device)

    def _prior(self) -> pc.Circuit:
        z_NP = self._latent_values(self.clusters_NP["train"], self.heads_NP)
        kinds_P = edge_kinds(self._tree, self._context.data.parts)
        return chow_liu_prior(z_NP, self._head_index.num_values, self._tree, kinds=kinds_P).requires_grad_(False)

    def _latent_values(self, clusters: Tensor, heads: Tensor) -> Tensor:
        """z of patches (..., P) by cluster and head."""
        return self._head_index.value(self._head_index.circuit(clusters), heads)

    def _update_objective(self, z_BP: Tensor, total: Tensor) -> None:
        """Add the log p(x, z) of this rank's examples; total: the log p(x | z) of these, or of its circuits."""
        if self.members is None:
            self.train_objective.update(self.assembled.prior_log_prob(z_BP) + total / len(z_BP))
            return
        self.train_objective.update(self.assembled.prior_log_prob(z_BP) if len(z_BP) else total.new_zeros(0))
        self.train_objective.nats += total.double()

    @torch.no_grad()
    def _update_metrics(self, images: Tensor, index: Tensor) -> None:
        clusters_BP = self.clusters_NP["val"][index.cpu()].to(images.device)
        evidence_BPK = self.assembled.evidence(images, margin=MARGIN)
        z_BP = self._likeliest(evidence_BPK, clusters_BP)
        given_BP = evidence_BPK.gather(2, z_BP[..., None])[..., 0]
        again = (given_BP <= evidence_BPK.amax(2) - MARGIN).any(1).nonzero()[:, 0]
        if len(again):  # a cluster so far from the best that its evidence is not exact
            evidence_BPK[again] = self.assembled.evidence(images[again])
            z_BP[again] = self._likeliest(evidence_BPK[again], clusters_BP[again])
            given_BP = evidence_BPK.gather(2, z_BP[..., None])[..., 0]
        evidence_BPK, given_BP, z_BP = self._share(evidence_BPK), self._share(given_BP), self._share(z_BP)
        if len(z_BP):
            self.val_likelihood.update(self.assembled.prior.log_prob(evidence_BPK)[:, 0])
            self.val_objective.update(given_BP.sum(1) + self.assembled.prior_log_prob(z_BP))

    def _likeliest(self, evidence_BPK: Tensor, clusters_BP: Tensor) -> Tensor:
        """The likeliest head of each patch's cluster, as a latent value (B, P)."""
        if max(self.heads_per_circuit) == 1:
            return clusters_BP
        value_K = torch.arange(self.assembled.num_states, device=clusters_BP.device)
        circuit_K, _ = self.assembled.head_index.locate(value_K)
        elsewhere_BPK = circuit_K != clusters_BP[..., None]
        # A patch that no head explains gets one of its own cluster, too.
        return evidence_BPK.nan_to_num(neginf=-1e30).masked_fill(elsewhere_BPK, -torch.inf).argmax(-1)

    def _assign(self, context: StageContext) -> dict[str, Tensor]:
        """z of every patch of all splits, int64 (N, P); in validation and test images the likeliest of its cluster."""
        out = {"train": self._latent_values(self.clusters_NP["train"], self.heads_NP)}
        clusters = {**self.clusters_NP, **read_clusters(context, "test")[0]}
        for split in ("val", "test"):
            examples = Examples(context.data, clusters[split], torch.zeros_like(clusters[split]), split)
            heads_NP, _ = best_heads(self.assembled.conditional, examples, alone=True)
            out[split] = self._latent_values(clusters[split], heads_NP)
        return out

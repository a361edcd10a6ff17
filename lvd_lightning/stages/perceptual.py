"""Stage "perceptual": gradients of losses on samples, mixed with the likelihood, for the whole circuit.

Shapes: B images, P patches, K latent values, D dimensions of an example.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any, ClassVar, cast

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_above, check_at_least, check_choice, check_counts, check_share, expect
from lvd_lightning.circuits.rsample import ESTIMATORS
from lvd_lightning.context import Data, StageContext
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.assembled_rsample import reconstruct, rsample
from lvd_lightning.models.leaves import LeafChoice
from lvd_lightning.models.posterior_loss import conditional_loss, training_evidence
from lvd_lightning.models.reparameterized import as_assembled, reparameterized
from lvd_lightning.models.structures import PartStructure, StructureName
from lvd_lightning.models.whole_circuits import training_sample, whole_graph, whole_tree
from lvd_lightning.parts import ImagePatches
from lvd_lightning.perceptual.discriminator import Discriminator, adversary_loss
from lvd_lightning.perceptual.encoder import LatentEncoder
from lvd_lightning.perceptual.sample_losses import LossWeights, SampleLosses
from lvd_lightning.ranks import rank_and_size, sum_in_place
from lvd_lightning.seeds import derive_seed
from lvd_lightning.shares import batch_total, whole_batch
from lvd_lightning.stages.stage import StageModule
from lvd_lightning.stages.validation import validation_likelihood
from lvd_lightning.teachers import load_teacher

__all__ = ["PerceptualStudent"]


class PerceptualStudent(StageModule):
    r"""Trains a circuit by gradients of losses on its own samples, mixed with its likelihood.

    Samples are those of `models.assembled_rsample`: exact ones, through which gradients flow. Adam moves the
    parameters as logits; at the end they are probabilities again, in the files that finetuning leaves. The circuit is
    that of the last stage that left a model, or, with `structure`, one over whole images from scratch.

    Likelihood and samples pull in different directions, and no single number says which epoch is best: the last one
    counts, or the last one whose validation likelihood is within `allowed_rise` of that before the stage.

    Logs `train/<unit>`, `val/<unit>` and, as `train/<name>`, every loss without its weight; of the discriminator
    `train/discriminator`; and `train/temperature`.

    Args:
        nll, mmd, feature_mmd, adversarial, autoencode, feature_distance: weights, see `LossWeights`. Losses on features
            need the teacher of an earlier stage.
        estimator: how gradients pass through choices: "simple", "straight_through" or "gumbel", see `Circuit.rsample`.
            "gumbel" draws from all heads for every patch, K times as much.
        temperature, final_temperature, temperature_shape: from one to the other over the steps of the stage, see
            `TemperatureSchedule`; null: it stays. "simple" has none.
        hard: of "gumbel".
        num_samples: samples of a step; reconstructions are those of the batch. Every rank draws all of them.
        lr, final_lr: of Adam, falling linearly per step.
        clip: the largest norm of a step's gradient, which is shortened to it; null for none.
        train_prior: whether the prior learns, too.
        allowed_rise: in the data's unit; by so much the validation likelihood may become worse. If no epoch keeps to
            it, the circuit stays as it was. Null: the last epoch counts whatever it costs.
        learned_encoder: whether a network that learns beside the circuit says which latent values an image has, for
            reconstructions, in place of the circuit's own posteriors.
        encoder_channels: of that network.
        r1, discriminator_channels, discriminator_lr: of the adversary, see `adversary_loss`.
        posterior_floor, slots, val_images: see `FinetuneStudent`.
        structure: of a circuit from scratch: "hclt", "rat_spn" or "poon_domingos".
        structure_settings, num_units, init, leaf, max_tree_examples: of that circuit, see `CircuitBaseline`.

    References:
        Lang, Mundt, Ventola, Peharz, Kersting, Elevating Perceptual Sample Quality in PCs through Differentiable
        Sampling, PMLR 181, 2022.

    Example:
        >>> from lvd_lightning.stages import PerceptualStudent
        >>> PerceptualStudent(mmd=1.0).needs, PerceptualStudent(feature_mmd=1.0).needs
        (('model',), ('model', 'features'))
        >>> PerceptualStudent(mmd=1.0, structure="rat_spn").needs
        ()
    """

    needs: tuple[str, ...] = ("model",)
    leaves: ClassVar[tuple[str, ...]] = ("model",)
    em: ClassVar[bool] = True  # it takes steps of its own and sums gradients over ranks itself
    model_title = "perceptual"
    learns_from_samples: ClassVar[bool] = True
    monitor = "val/score"
    monitor_mode = "max"

    def __init__(
        self,
        nll: float = 1.0,
        mmd: float = 0.0,
        feature_mmd: float = 0.0,
        adversarial: float = 0.0,
        autoencode: float = 0.0,
        feature_distance: float = 0.0,
        estimator: str = "simple",
        temperature: float = 1.0,
        final_temperature: float | None = None,
        temperature_shape: str = "exponential",
        hard: bool = False,
        num_samples: int = 128,
        lr: float = 3e-3,
        final_lr: float = 3e-4,
        clip: float | None = 1.0,
        train_prior: bool = True,
        allowed_rise: float | None = None,
        learned_encoder: bool = False,
        encoder_channels: int = 64,
        r1: float = 1.0,
        discriminator_channels: int = 32,
        discriminator_lr: float = 1e-3,
        posterior_floor: float = 1e-3,
        slots: float = 2.0,
        val_images: int = 256,
        structure: StructureName | None = None,
        structure_settings: dict[str, Any] | None = None,
        num_units: int = 8,
        init: str = "random",
        leaf: str | dict[str, Any] | None = None,
        max_tree_examples: int = 2000,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.save_hyperparameters()
        self.weights = LossWeights(**{field.name: self.hparams[field.name] for field in fields(LossWeights)})
        check_choice(ESTIMATORS, estimator=estimator)
        self.temperatures = pc.TemperatureSchedule(
            temperature, temperature if final_temperature is None else final_temperature, temperature_shape
        )
        check_above(0, lr=lr, clip=clip, discriminator_lr=discriminator_lr, slots=slots)
        expect(0 < final_lr <= lr, "final_lr", final_lr, f"more than 0 and at most lr, which is {lr}")
        check_at_least(0, r1=r1, allowed_rise=allowed_rise)
        check_share(posterior_floor=posterior_floor)
        check_counts(num_units=num_units, max_tree_examples=max_tree_examples, val_images=val_images)
        check_counts(encoder_channels=encoder_channels, discriminator_channels=discriminator_channels)
        expect(num_samples >= 2, "num_samples", num_samples, "2 or more")
        check_choice(("random", "quantiles"), init=init)
        self.leaf = LeafChoice(leaf)
        self.structure = None if structure is None else PartStructure.of(structure, structure_settings)
        self.needs = () if self.structure is not None else ("model",)
        if self.weights.needs_features:
            self.needs = (*self.needs, "features")
        if self.structure is not None and (allowed_rise is not None or learned_encoder):
            name = "allowed_rise" if allowed_rise is not None else "learned_encoder"
            why = (
                "no likelihood before it" if allowed_rise is not None else "no latent values that an encoder could say"
            )
            raise ValueError(f"{name}: a circuit of a structure of its own, from scratch, has {why}: leave it away")

    @override
    def check_data(self, data: Data) -> None:
        parts = data.parts
        if not isinstance(parts, ImagePatches):
            raise ValueError(
                f"PerceptualStudent looks at pictures, but the data's parts are {type(parts).__name__}: leave it away"
            )
        if self.structure is not None:
            self.leaf.over(parts.leaf)

    @override
    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        self.unit = context.data.unit
        parts = context.data.parts
        before = self._from_scratch(context) if self.structure is not None else self._before(context)
        self.assembled = reparameterized(before, "logits")
        self.assembled.prior.requires_grad_(self.hparams["train_prior"])
        teacher = load_teacher(context.required("features")) if self.weights.needs_features else None
        self.losses = SampleLosses(self.weights, parts, teacher)
        self.encoder: LatentEncoder | None = None
        self.discriminator: Discriminator | None = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(context.seed, context.stage, "networks"))
            if self.weights.adversarial > 0:
                self.discriminator = Discriminator(parts.example_shape, self.hparams["discriminator_channels"])
            if self.hparams["learned_encoder"]:
                states, channels = self.assembled.num_states, self.hparams["encoder_channels"]
                self.encoder = LatentEncoder(parts.example_shape, parts.patch_size, states, channels)
        self.train_likelihood, self.val_likelihood = (
            MeanLikelihood(self.unit, context.data.num_dims) for _ in range(2)
        )
        self.at_start: float | None = None
        if self.hparams["allowed_rise"] is not None:
            count, device = self.hparams["val_images"], context.device
            self.at_start = validation_likelihood(before.to(device), context.data, count, device)

    @override
    def configure_optimizers(self) -> list[Optimizer]:
        learnt = [p for p in self.assembled.parameters() if p.requires_grad]
        learnt += [] if self.encoder is None else list(self.encoder.parameters())
        optimizers: list[Optimizer] = [torch.optim.Adam(learnt, lr=self.hparams["lr"], betas=(0.9, 0.99))]
        if self.discriminator is not None:
            settings = {"lr": self.hparams["discriminator_lr"], "betas": (0.5, 0.99)}
            optimizers.append(torch.optim.Adam(self.discriminator.parameters(), **settings))
        self._num_steps = float(self.trainer.estimated_stepping_batches)
        if self._num_steps == float("inf"):
            raise ValueError(f"stage {self._context.stage}: set max_epochs of its trainer, so that its schedules end")
        return optimizers

    @override
    def on_fit_start(self) -> None:
        self.losses.to(self._like())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, _ = batch
        step = self.current_epoch * int(self.trainer.num_training_batches) + batch_idx
        generator = self._context.generator("step", self.current_epoch, batch_idx, 0, device=self.device)
        found: dict[str, Tensor] = {}
        if self.weights.nll > 0:
            self._learn_likelihood(images)
        # Losses on samples are none of single examples: every rank has those of the whole batch, with the same noise.
        images = whole_batch(images)
        scaled = self.losses.spread(images, self._like())
        sampler: dict[str, Any] = self._sampler(step)
        drawn: Tensor | None = None
        if self.weights.needs_samples:
            drawn = self.losses.spread(
                rsample(self.assembled, self.hparams["num_samples"], generator=generator, **sampler), self._like()
            )
            of_samples = self.losses.of_samples(drawn, scaled, self.discriminator)
            self.manual_backward(self.losses.weighted(of_samples))
            found |= of_samples
        if self.weights.needs_reconstructions:
            evidence = None if self.encoder is None else self.encoder(scaled)
            again = reconstruct(self.assembled, images, evidence, generator=generator, **sampler)
            of_pairs = self.losses.of_reconstructions(self.losses.spread(again, self._like()), scaled)
            self.manual_backward(self.losses.weighted(of_pairs))
            found |= of_pairs
        optimizers = cast(list[LightningOptimizer], self.optimizers(use_pl_optimizer=True))
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self._step(optimizers[0], step)
        if self.discriminator is not None:
            assert drawn is not None
            optimizers[1].zero_grad()  # what the samples' loss has left
            found["discriminator"] = adversary_loss(self.discriminator, drawn, scaled, self.hparams["r1"])
            self.manual_backward(found["discriminator"])
            self._step(optimizers[1])
        for name, value in found.items():
            self.log(f"train/{name}", value.detach(), on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        self.log("train/temperature", sampler["temperature"], on_step=False, on_epoch=True, batch_size=1)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        if bool(wanted.any()):
            self.val_likelihood.update(self.assembled.log_prob(images[wanted]))
        self.log(f"val/{self.unit.name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        rise = self._rise(float(self.val_likelihood.compute()))
        allowed = self.hparams["allowed_rise"]
        score = float(self.current_epoch + 1) if allowed is None or rise <= allowed else -rise
        self.log("val/score", score, sync_dist=True)  # the same on all ranks

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Keep the epoch that counts; or, where `allowed_rise` is exceeded in all of them, the circuit of before."""
        count = self.hparams["val_images"]
        kept = reparameterized(self.assembled, "probabilities")
        name = f"val_{self.unit.name}"
        found = {name: validation_likelihood(kept, context.data, count, self.device)}
        if self.structure is None:
            before = self._before(context).to(self.device)
            found[f"{name}_before"] = validation_likelihood(before, context.data, count, self.device)
            self.at_start = found[f"{name}_before"]
            allowed = self.hparams["allowed_rise"]
            is_kept = allowed is None or self._rise(found[name]) <= allowed
            if not is_kept:
                warnings.warn(
                    f"no epoch keeps the validation {self.unit.name} within {allowed} of the {self.at_start:.4f} "
                    f"before: the circuit of stage {context.required('model').name} stays as it was; try a smaller lr, "
                    "smaller weights or a larger nll",
                    stacklevel=2,
                )
                kept, found[name] = before, self.at_start
            found["changed"] = float(is_kept)
        kept.save(context.dir)
        return {**found, "num_parameters": kept.num_parameters}

    def _learn_likelihood(self, images: Tensor) -> None:
        """Gradients of the weighted negative log-likelihood, with few heads in the graph at a time."""
        size, count = rank_and_size()[1], batch_total(len(images))
        # What a nat of an image of the batch counts; ranks average their gradients.
        weight = self.weights.nll * size / (count * self._context.data.num_dims)
        if len(images):
            evidence_BPK = training_evidence(self.assembled, images).requires_grad_()
            log_B = self.assembled.prior.log_prob(evidence_BPK)[:, 0]
            self.manual_backward(-log_B.sum() * weight)
            assert evidence_BPK.grad is not None
            posterior_BPK = -evidence_BPK.grad / weight
        else:  # the other ranks have the whole batch, and wait for what this one has of it
            posterior_BPK = torch.zeros(0, self.assembled.num_positions, self.assembled.num_states, device=self.device)
        loss = conditional_loss(
            self.assembled,
            images,
            posterior_BPK,
            floor=self.hparams["posterior_floor"],
            slots=self.hparams["slots"],
            generator=self._context.generator("slots", self.current_epoch, 0),
        )
        if not len(images):
            return
        self.manual_backward(loss * weight)
        self.train_likelihood.update(log_B)
        self.log(f"train/{self.unit.name}", self.train_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    def _sampler(self, step: int) -> dict[str, Any]:
        """How samples of this step are drawn."""
        temperature = self.temperatures(step, int(self._num_steps))
        return {"estimator": self.hparams["estimator"], "temperature": temperature, "hard": self.hparams["hard"]}

    def _step(self, optimizer: LightningOptimizer, step: int | None = None) -> None:
        """Average gradients over ranks, shorten them, and take a step; `step`: of the circuit, whose rate falls."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            if parameter.grad is None:  # on this rank or in this step; all send the same numbers
                parameter.grad = torch.zeros_like(parameter)
        gradients = [cast(Tensor, parameter.grad) for parameter in parameters]
        size = rank_and_size()[1]
        sum_in_place(gradients)
        for gradient in gradients:
            gradient.div_(size)
        if step is not None:
            if self.hparams["clip"] is not None:
                nn.utils.clip_grad_norm_(parameters, self.hparams["clip"])
            lr, final_lr = self.hparams["lr"], self.hparams["final_lr"]
            for group in optimizer.param_groups:
                group["lr"] = lr + (final_lr - lr) * min(1.0, step / max(1.0, self._num_steps - 1))
        optimizer.step()
        optimizer.zero_grad()

    def _rise(self, likelihood: float) -> float:
        """By how much it is worse than before the stage; 0 if nobody asked."""
        if self.at_start is None:
            return 0.0
        return likelihood - self.at_start if self.unit.lower_is_better else self.at_start - likelihood

    def _like(self) -> Tensor:
        """A parameter, whose device and type losses work in."""
        return self.assembled.conditional.tables[0]

    def _before(self, context: StageContext) -> AssembledCircuit:
        return AssembledCircuit.load(context.required("model"))

    def _from_scratch(self, context: StageContext) -> AssembledCircuit:
        """A circuit over whole images; its tree is learnt from a sample."""
        assert self.structure is not None
        if context.artefact("latents") is not None:
            raise ValueError(
                f"stage {context.stage}: structure: a circuit from scratch knows no latent values, but stages before "
                "it make some: give it an experiment of its own, with these stages set to null"
            )
        parts = context.data.parts
        sample_ND = training_sample(context, self.hparams["max_tree_examples"])
        graph = whole_graph(
            parts,
            self.structure,
            self.leaf,
            self.hparams["num_units"],
            parents=whole_tree(self.structure, sample_ND, parts),
            sample=sample_ND if self.hparams["init"] == "quantiles" else None,
            generator=context.generator("parameters"),
        )
        return as_assembled(graph, parts)

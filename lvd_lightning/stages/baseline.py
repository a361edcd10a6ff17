"""Stage "baseline": plain EM on a circuit over whole examples, with as many parameters and as much time.

Shapes: B images, N sample, D dimensions of an example.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_at_least, check_choice, check_counts
from lvd_lightning.context import DONE_MARKER, Data, StageContext
from lvd_lightning.files import read_json, write_json
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.models.leaves import LeafChoice
from lvd_lightning.models.structures import PartStructure, StructureName
from lvd_lightning.models.whole_circuits import training_sample, whole_graph, whole_tree
from lvd_lightning.parts import example_leaf
from lvd_lightning.ranks import on_first, rank_and_size
from lvd_lightning.resumable_loader import ResumableLoader
from lvd_lightning.stages.em_student import Rule, check_step_sizes, make_optimizer
from lvd_lightning.stages.rule_comparison import RULES, RuleComparison

__all__ = ["CircuitBaseline"]

#: Step sizes fall to this share of the first.
FINAL_SHARE = 0.1
#: Steps that are timed. The fastest counts: others may have waited for something else that the machine did.
TIMED_STEPS = 12


class CircuitBaseline(RuleComparison):
    """Trains the same circuit over all variables of an example twice: by mini-batch EM and by Anemone.

    It has as many latent states (units) as give it about the parameters of the distilled circuit, or more, and each
    rule trains for about as long as all earlier stages took. The number of steps is fixed once, from a measured rate,
    and written to `plan.json`, so a resumed run ends as an uninterrupted one. A tree is learnt outside that time.

    Logs, in the data's unit, `train/em_<unit>`, `train/anemone_<unit>`, `val/em_<unit>`, `val/anemone_<unit>` and the
    better one of these two as `val/<unit>`; of each rule the epoch with the best validation counts. The steps are
    divided evenly over the epochs.

    Args:
        structure: "hclt", "rat_spn" or "poon_domingos".
        structure_settings, leaf: see `ConditionalStudent`.
        num_units: hidden states of an HCLT, units of every region of another structure; null to match the parameters
            of the distilled circuit.
        seconds: per rule; null for the time that earlier stages took.
        batch_size: images per step, all ranks together.
        init: "random", or "quantiles" (from data, see `hclt_from_data` and `regions_from_data`).
        em_lr, anemone_lr: first step sizes; both fall linearly to a tenth.
        momentum: of Anemone.
        em_pseudocount, anemone_pseudocount: per sum node and input unit, in examples of a step.
        max_tree_examples: training images from which the tree (and quantiles) are learnt.
        val_images: validation images on which both circuits are evaluated after every epoch.

    Example:
        >>> from lvd_lightning.stages import CircuitBaseline
        >>> CircuitBaseline().needs, CircuitBaseline(num_units=8, seconds=60.0).needs  # the size of a model, or its own
        (('model',), ())
    """

    def __init__(
        self,
        structure: StructureName = "hclt",
        num_units: int | None = None,
        seconds: float | None = None,
        batch_size: int = 256,
        init: str = "random",
        em_lr: float = 0.2,
        anemone_lr: float = 0.4,
        momentum: float = 0.9,
        em_pseudocount: float = 0.01,
        anemone_pseudocount: float = 1e-3,
        max_tree_examples: int = 2000,
        val_images: int = 256,
        structure_settings: dict[str, Any] | None = None,
        leaf: str | dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.structure = PartStructure.of(structure, structure_settings)
        self.leaf = LeafChoice(leaf)
        check_choice(("random", "quantiles"), init=init)
        for name, lr in (("em_lr", em_lr), ("anemone_lr", anemone_lr)):
            check_step_sizes(lr, lr, momentum, lr_name=name)
        check_at_least(0, seconds=seconds, em_pseudocount=em_pseudocount, anemone_pseudocount=anemone_pseudocount)
        check_counts(
            num_units=num_units,
            batch_size=batch_size,
            max_tree_examples=max_tree_examples,
            val_images=val_images,
        )
        self.needs = ("model",) if num_units is None else ()
        self.automatic_optimization = False
        self.save_hyperparameters()

    @override
    def check_data(self, data: Data) -> None:
        self.leaf.over(data.parts.leaf)

    @override
    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        sample_ND = training_sample(context, self.hparams["max_tree_examples"])
        plan = self._plan(context, sample_ND)
        circuit = self._first_circuit(context, sample_ND, plan)
        self.circuits = nn.ModuleDict({rule: copy.deepcopy(circuit) for rule in RULES})
        self.steps: dict[str, int] = plan["steps"]
        self.seconds = dict.fromkeys(RULES, 0.0)
        self.best = dict.fromkeys(RULES, math.inf)
        self.follow(context.data.unit)
        names = [f"{split}_{rule}" for split in ("train", "val") for rule in RULES]
        metrics = {name: MeanLikelihood(self.unit, circuit.num_variables) for name in names}
        self.metrics = nn.ModuleDict(metrics)

    def circuit(self, rule: Rule) -> pc.Circuit:
        """The circuit that this rule trains."""
        found = self.circuits[rule]
        assert isinstance(found, pc.Circuit)
        return found

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch."""
        epochs = self.trainer.max_epochs
        if epochs is None or epochs < 1:
            raise ValueError(
                f"stage {self._context.stage}: set max_epochs of its trainer, which the steps are spread over"
            )
        return max(1, math.ceil(max(self.steps.values()) / epochs))

    @override
    def configure_optimizers(self) -> Any:
        return [self._optimizer(rule, self.circuit(rule)) for rule in RULES]

    def train_dataloader(self) -> DataLoader[Any]:
        """The batches of this epoch's steps: random images, a function of (seed, epoch)."""
        batches = _RandomBatches(self, self._context, self.hparams["batch_size"], self.steps_per_epoch)
        return ResumableLoader(
            _Images(self._context.data), sampler=batches, batch_size=None, order=batches, trainer=self.trainer
        )

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images of the datamodule."""
        found: DataLoader[Any] = self._context.data.val_dataloader()
        return found

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        done = self.current_epoch * self.steps_per_epoch + batch_idx
        for rule, optimizer in zip(RULES, optimizers, strict=True):
            if done < self.steps[rule]:
                assert isinstance(optimizer, LightningOptimizer)
                self._step(rule, optimizer, batch.flatten(1), done)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        for rule in RULES:
            metric = self._metric("val", rule)
            if bool(wanted.any()):
                metric.update(_log_prob(self.circuit(rule), images[wanted]))
            self.log(f"val/{rule}_{self.unit.name}", metric, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        scores = {rule: float(self._metric("val", rule).compute()) for rule in RULES}
        self.log(f"val/{self.unit.name}", self._best(scores), sync_dist=True)  # the same on all ranks
        if self.trainer.sanity_checking:
            return
        for rule, score in scores.items():
            if self._is_better(score, self.best[rule]) or math.isinf(self.best[rule]):  # some epoch has to count
                self.best[rule] = math.inf if math.isnan(score) else score
                if self.trainer.is_global_zero:
                    pc.save(self.circuit(rule), self._context.dir / rule)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Evaluate each rule's best epoch on all of validation and, once, on test."""
        results = {}
        spent = read_json(context.dir / "spent.json")
        for rule in RULES:
            circuit = pc.load(context.dir / rule, device=self.device)
            results[rule] = {
                "seconds": spent[rule],
                "num_parameters": circuit.num_parameters,
                f"val_{self.unit.name}": _mean_likelihood(circuit, context.data, "val"),
                self.unit.name: _mean_likelihood(circuit, context.data, "test"),
            }
        write_json(context.dir / "baseline.json", results, indent=2)
        key = f"val_{self.unit.name}"
        return {key: self._best({rule: found[key] for rule, found in results.items()})}

    def _is_better(self, score: float, best: float) -> bool:
        return score < best if self.unit.lower_is_better else score > best

    def _best(self, scores: Mapping[Rule, float]) -> float:
        return min(scores.values()) if self.unit.lower_is_better else max(scores.values())

    def _step(self, rule: Rule, optimizer: LightningOptimizer, images_BD: Tensor, done: int) -> None:
        """One EM step by a rule, with the clock running."""
        start = self._now()
        for group in optimizer.param_groups:
            group["lr"] = self._step_size(rule, done)
        log_B = self.circuit(rule).log_prob(images_BD)[:, 0]
        self.manual_backward(-log_B.sum())
        optimizer.step()
        optimizer.zero_grad()
        self.seconds[rule] += self._now() - start
        metric = self._metric("train", rule)
        metric.update(log_B)
        self.log(f"train/{rule}_{self.unit.name}", metric, on_step=False, on_epoch=True)

    def _step_size(self, rule: Rule, step: int) -> float:
        fallen = (1 - FINAL_SHARE) * step / max(1, self.steps[rule] - 1)
        return float(self.hparams[f"{rule}_lr"] * (1 - fallen))

    def _metric(self, split: str, rule: Rule) -> MeanLikelihood:
        found = self.metrics[f"{split}_{rule}"]
        assert isinstance(found, MeanLikelihood)
        return found

    def _optimizer(self, rule: Rule, circuit: pc.Circuit) -> torch.optim.Optimizer:
        settings = self.hparams
        lr, pseudocount = settings[f"{rule}_lr"], settings[f"{rule}_pseudocount"]
        return make_optimizer(rule, circuit, lr, settings["momentum"], pseudocount)

    def _plan(self, context: StageContext, sample_ND: Tensor) -> dict[str, Any]:
        """Tree, size and number of steps: decided once, by rank 0, and read ever after. All ranks call."""
        path = context.dir / "plan.json"
        if not path.is_file():
            tree_D = whole_tree(self.structure, sample_ND, context.data.parts)
            plan: dict[str, Any] = {
                "parents": None if tree_D is None else tree_D.tolist(),
                "num_units": self._num_units(context),
                "seconds": self._time_limit(context),
            }
            circuit = self._first_circuit(context, sample_ND, plan)
            plan["steps"] = {rule: self._measure(circuit, sample_ND, rule, plan["seconds"]) for rule in RULES}
            context.dir.mkdir(parents=True, exist_ok=True)
            on_first(partial(write_json, path, plan))
        found: dict[str, Any] = read_json(path)
        return found

    def _first_circuit(self, context: StageContext, sample_ND: Tensor, plan: dict[str, Any]) -> pc.Circuit:
        parents = None if plan["parents"] is None else torch.tensor(plan["parents"])
        graph = whole_graph(
            context.data.parts,
            self.structure,
            self.leaf,
            plan["num_units"],
            parents=parents,
            sample=sample_ND if self.hparams["init"] == "quantiles" else None,
            generator=context.generator("parameters"),
        )
        return pc.Circuit(graph)

    def _num_units(self, context: StageContext) -> int:
        """The fewest hidden states with at least (nearly) as many parameters as the distilled circuit."""
        if self.hparams["num_units"] is not None:
            return int(self.hparams["num_units"])
        wanted = float(read_json(context.required("model") / DONE_MARKER)["num_parameters"])
        generator = context.generator("parameters")  # as that of the circuit itself
        parts = context.data.parts
        counts = self.structure.num_parameters(
            parts.example_shape, leaf=self.leaf.over(example_leaf(parts)), generator=generator
        )
        states = 1
        while sum(count * states**power for power, count in counts.items()) < 0.98 * wanted:
            states += 1
        return states

    def _time_limit(self, context: StageContext) -> float:
        if self.hparams["seconds"] is not None:
            return float(self.hparams["seconds"])
        folders = context.earlier_folders()
        if not folders:
            raise ValueError(f"stage {context.stage}: no earlier stage says how long it may take; set seconds")
        return sum(float(read_json(folder / DONE_MARKER)["seconds"]) for folder in folders)

    def _measure(self, circuit: pc.Circuit, sample_ND: Tensor, rule: Rule, seconds: float) -> int:
        """How many steps of all ranks fit into `seconds`, from a few that are timed on a copy. All ranks call."""
        rank, size = rank_and_size()
        circuit = copy.deepcopy(circuit).to(self._context.device)
        optimizer = self._optimizer(rule, circuit)
        batch_BD = sample_ND[: self.hparams["batch_size"]][rank::size].to(circuit.device)
        spent = []
        for _ in range(TIMED_STEPS):
            start = self._now()
            (-circuit.log_prob(batch_BD).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            spent.append(self._now() - start)
        return max(1, round(seconds / min(spent)))

    def _now(self) -> float:
        """Seconds on a clock, when the device is done with what it was given."""
        if self._context.device.type == "cuda":
            torch.cuda.synchronize(self._context.device)
        return time.monotonic()


class _Images(Dataset[Tensor]):
    """Training images by batches of numbers."""

    def __init__(self, data: Data) -> None:
        self.data = data

    def __getitem__(self, index: Tensor) -> Tensor:
        return self.data.batch("train", index)


class _RandomBatches(Sampler[Tensor]):
    """This rank's share of the batches of one epoch: random order, starting over as often as needed."""

    def __init__(self, module: CircuitBaseline, context: StageContext, batch_size: int, num_batches: int) -> None:
        self.module, self.context = module, context
        self.batch_size, self.num_batches = batch_size, num_batches
        self.skip = 0  # see `ResumableLoader`

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        count = self.context.data.num_examples("train")
        generator = self.context.generator("batches", self.module.current_epoch)
        order = torch.empty(0, dtype=torch.int64)
        first, self.skip = self.skip, 0
        for number in range(self.num_batches):
            while len(order) < min(self.batch_size, count):
                order = torch.cat([order, torch.randperm(count, generator=generator)])
            index, order = order[: self.batch_size], order[self.batch_size :]
            if number < first:
                continue
            yield index[self.module.global_rank :: self.module.trainer.world_size]


def _log_prob(circuit: pc.Circuit, images: Tensor) -> Tensor:
    """log p(x) in nats of whole examples, in bounded memory."""
    return torch.cat([circuit.log_prob(part.flatten(1))[:, 0] for part in images.split(circuit.batch_limit)])


def _mean_likelihood(circuit: pc.Circuit, data: Data, split: str) -> float:
    """What a circuit reaches over a whole split, in the data's unit; computed by this rank alone."""
    metric = MeanLikelihood(data.unit, circuit.num_variables, sync_on_compute=False).to(circuit.device)
    for index in torch.arange(data.num_examples(split)).split(256):
        metric.update(_log_prob(circuit, data.batch(split, index).to(circuit.device)))
    return float(metric.compute())

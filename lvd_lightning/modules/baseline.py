"""Stage "baseline": plain EM on a circuit over whole images, with as many parameters and as much time.

Shapes: B images, N sample, D dimensions of an image.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.bookkeeping import write_atomically
from lvd_lightning.metrics import BitsPerDim
from lvd_lightning.modules.stage import DONE_MARKER, StageContext, StageModule
from lvd_lightning.modules.training import Rule, make_optimizer

__all__ = ["CircuitBaseline"]

#: Stages whose time a baseline may take.
TIMED = ("teacher", "latents", "conditional", "prior", "finetune")
#: Sum of parameters and time of the distilled circuit come from these, the last that is there.
SIZED = ("finetune", "prior")


class CircuitBaseline(StageModule):
    """Trains the same random HCLT over all pixels of the image twice: by mini-batch EM and by Anemone.

    It has as many latent states as give it about the parameters of the distilled circuit, or more, and each rule trains
    for about as long as all earlier stages took. The number of steps is fixed once, from a measured rate, and
    written to `plan.json`, so a resumed run ends as an uninterrupted one. The tree is learnt outside that time.

    Logs `val/em_bpd` and `val/anemone_bpd`; of each rule the epoch with the best validation counts.

    Args:
        structure: "hclt".
        num_latents: hidden states; null to match the parameters of the distilled circuit.
        seconds: per rule; null for the time that earlier stages took.
        batch_size: images per step.
        init: "random", or "quantiles" (see `hclt_from_data`).
        em_lr, anemone_lr: first step sizes; both fall linearly to a tenth.
        pseudocount: as in `ConditionalStudent`.
        val_images: as in `ConditionalStudent`.
    """

    em: ClassVar[bool] = True

    def __init__(
        self,
        structure: str = "hclt",
        num_latents: int | None = None,
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
    ) -> None:
        super().__init__()
        if structure != "hclt":
            raise ValueError(f"structure: expected 'hclt', got {structure!r}")
        if init not in ("random", "quantiles"):
            raise ValueError(f"init: expected 'random' or 'quantiles', got {init!r}")
        self.automatic_optimization = False
        self.save_hyperparameters()

    @override
    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        dims = math.prod(context.data.image_shape)
        plan_path = context.dir / "plan.json"
        plan = json.loads(plan_path.read_text()) if plan_path.is_file() else {}
        sample_ND = self._sample(context)
        if not plan:
            plan["parents"] = pc.chow_liu_tree(sample_ND, max_examples=self.hparams["max_tree_examples"]).tolist()
            plan["num_latents"] = self._num_latents(context, dims)
        parents = torch.tensor(plan["parents"])
        self.circuits = torch.nn.ModuleDict({rule: self._circuit(sample_ND, parents, plan, context) for rule in RULES})
        if "steps" not in plan:
            plan["seconds"] = self._time_limit(context)
            plan["steps"] = {rule: self._measure(sample_ND, rule, plan["seconds"]) for rule in RULES}
            context.dir.mkdir(parents=True, exist_ok=True)
            write_atomically(plan_path, json.dumps(plan))
            self.circuits = torch.nn.ModuleDict(
                {rule: self._circuit(sample_ND, parents, plan, context) for rule in RULES}
            )
        self.steps: dict[str, int] = plan["steps"]
        self.seconds = dict.fromkeys(RULES, 0.0)
        self.best = dict.fromkeys(RULES, math.inf)
        self.train_bpd = torch.nn.ModuleDict({rule: BitsPerDim(dims) for rule in RULES})
        self.val_bpd = torch.nn.ModuleDict({rule: BitsPerDim(dims) for rule in RULES})

    @override
    def configure_optimizers(self) -> Any:
        return [self._optimizer(rule) for rule in RULES]

    def train_dataloader(self) -> DataLoader[Any]:
        """The steps that this epoch takes, of random images, a function of (seed, epoch)."""
        epochs = self.trainer.max_epochs or 1
        per_epoch = max(1, math.ceil(max(self.steps.values()) / epochs))
        batches = _RandomBatches(self, self._context, self.hparams["batch_size"], per_epoch)
        return DataLoader(_Images(self._context.data), sampler=batches, batch_size=None)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation images of the datamodule."""
        found: DataLoader[Any] = self._context.data.val_dataloader()
        return found

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        images_BD = batch.flatten(1)
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        for rule, optimizer in zip(RULES, optimizers, strict=True):
            assert isinstance(optimizer, LightningOptimizer)
            done = self._done(batch_idx)
            if done >= self.steps[rule]:
                continue
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = self._step_size(rule, done)
            log_B = self.circuits[rule].log_prob(images_BD)[:, 0]
            self.manual_backward(-log_B.sum())
            optimizer.step()
            optimizer.zero_grad()
            self.seconds[rule] += time.monotonic() - start
            self.train_bpd[rule].update(log_B)  # type: ignore[operator]
            self.log(f"train/{rule}_bpd", self.train_bpd[rule], on_step=False, on_epoch=True)  # type: ignore[arg-type]

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, index = batch
        wanted = index < self.hparams["val_images"]
        for rule in RULES:
            metric = self.val_bpd[rule]
            if bool(wanted.any()):
                metric.update(_log_prob(self.circuits[rule], images[wanted]))  # type: ignore[operator, arg-type]
            self.log(f"val/{rule}_bpd", metric, on_step=False, on_epoch=True, prog_bar=True)  # type: ignore[arg-type]

    @override
    def on_validation_epoch_end(self) -> None:
        scores = {rule: float(self.val_bpd[rule].compute()) for rule in RULES}  # type: ignore[operator]
        self.log("val/bpd", min(scores.values()))
        if self.trainer.sanity_checking:
            return
        for rule, score in scores.items():
            if score < self.best[rule]:
                self.best[rule] = score
                if self.trainer.is_global_zero:
                    pc.save(self.circuits[rule], self._context.dir / rule)  # type: ignore[arg-type]

    @override
    def on_train_epoch_end(self) -> None:
        if self.trainer.is_global_zero:  # finish_stage holds the best epoch's state, which may be an earlier one
            write_atomically(self._context.dir / "spent.json", json.dumps(self.seconds))

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["baseline"] = {"seconds": dict(self.seconds), "best": dict(self.best)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.seconds = dict(checkpoint["baseline"]["seconds"])
        self.best = dict(checkpoint["baseline"]["best"])

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Evaluate each rule's best epoch on all of validation and, once, on test."""
        results = {}
        spent = json.loads((context.dir / "spent.json").read_text())
        for rule in RULES:
            circuit = pc.load(context.dir / rule, device=self.device)
            found = {"seconds": spent[rule], "num_parameters": circuit.num_parameters}
            for split, name in (("val", "val_bpd"), ("test", "bpd")):
                metric = BitsPerDim(circuit.num_variables).to(self.device)
                for index in torch.arange(context.data.num_examples(split)).split(256):
                    metric.update(_log_prob(circuit, context.data.batch(split, index).to(self.device)))
                found[name] = float(metric.compute())
            results[rule] = found
        write_atomically(context.dir / "baseline.json", json.dumps(results, indent=2))
        return {"val_bpd": min(found["val_bpd"] for found in results.values())}

    def _optimizer(self, rule: Rule) -> torch.optim.Optimizer:
        settings = self.hparams
        lr, pseudocount = settings[f"{rule}_lr"], settings[f"{rule}_pseudocount"]
        return make_optimizer(rule, self.circuits[rule], lr, settings["momentum"], pseudocount)

    def _step_size(self, rule: Rule, step: int) -> float:
        return float(self.hparams[f"{rule}_lr"] * (1 - 0.9 * step / max(1, self.steps[rule] - 1)))

    def _done(self, batch_idx: int) -> int:
        per_epoch = max(1, math.ceil(max(self.steps.values()) / (self.trainer.max_epochs or 1)))
        return self.current_epoch * per_epoch + batch_idx

    def _sample(self, context: StageContext) -> Tensor:
        count = context.data.num_examples("train")
        order = torch.randperm(count, generator=context.generator("sample"))[: self.hparams["max_tree_examples"]]
        found: Tensor = context.data.batch("train", order.sort().values)
        return found.flatten(1)

    def _circuit(self, sample_ND: Tensor, parents: Tensor, plan: dict[str, Any], context: StageContext) -> pc.Circuit:
        leaf, generator = pc.Categorical(256), context.generator("parameters")
        if self.hparams["init"] == "quantiles":
            return pc.Circuit(pc.hclt_from_data(sample_ND, parents, plan["num_latents"], leaf, generator=generator))
        return pc.Circuit(pc.hclt(parents, plan["num_latents"], leaf, generator=generator))

    def _num_latents(self, context: StageContext, dims: int) -> int:
        """The fewest hidden states with at least as many parameters as the distilled circuit."""
        if self.hparams["num_latents"] is not None:
            return int(self.hparams["num_latents"])
        for stage in SIZED:
            folder = context.previous(stage)
            if folder is not None:
                wanted = float(json.loads((folder / DONE_MARKER).read_text())["num_parameters"])
                states = 1
                while dims * states * 255 + (dims - 1) * states * (states - 1) + states - 1 < 0.98 * wanted:
                    states += 1
                return states
        raise ValueError("baseline: without a stage prior or finetune, set num_latents and seconds")

    def _time_limit(self, context: StageContext) -> float:
        if self.hparams["seconds"] is not None:
            return float(self.hparams["seconds"])
        total = 0.0
        for stage in TIMED:
            folder = context.previous(stage)
            if folder is not None:
                total += float(json.loads((folder / DONE_MARKER).read_text())["seconds"])
        return total

    def _measure(self, sample_ND: Tensor, rule: Rule, seconds: float) -> int:
        """How many steps fit into `seconds`, from a few that are timed (on a copy that is thrown away)."""
        circuit = self.circuits[rule].to(self._context.device)
        optimizer = self._optimizer(rule)
        batch_BD = sample_ND[: self.hparams["batch_size"]].to(self._context.device)
        spent = []
        for _ in range(5):
            start = time.monotonic()
            (-circuit.log_prob(batch_BD).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
            if batch_BD.is_cuda:
                torch.cuda.synchronize()
            spent.append(time.monotonic() - start)
        return max(1, round(seconds / sorted(spent)[2]))


RULES: tuple[Rule, Rule] = ("em", "anemone")


class _Images(Dataset[Tensor]):
    """Training images by batches of numbers."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __getitem__(self, index: Tensor) -> Tensor:
        found: Tensor = self.data.batch("train", index)
        return found


class _RandomBatches(Sampler[Tensor]):
    """This rank's share of the batches of one epoch: random order, starting over as often as needed."""

    def __init__(self, module: CircuitBaseline, context: StageContext, batch_size: int, num_batches: int) -> None:
        self.module, self.context = module, context
        self.batch_size, self.num_batches = batch_size, num_batches

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[Tensor]:
        count = self.context.data.num_examples("train")
        generator = self.context.generator("batches", self.module.current_epoch)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(self.num_batches):
            while len(order) < min(self.batch_size, count):
                order = torch.cat([order, torch.randperm(count, generator=generator)])
            index, order = order[: self.batch_size], order[self.batch_size :]
            yield index[self.module.global_rank :: max(1, self.module.trainer.world_size)]


def _log_prob(circuit: pc.Circuit, images: Tensor) -> Tensor:
    """log p(x) in nats of whole images, in bounded memory."""
    step = max(1, (1 << 26) // circuit.plan.num_value_rows)
    return torch.cat([circuit.log_prob(part.flatten(1))[:, 0] for part in images.split(step)])

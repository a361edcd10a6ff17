"""Stage "baseline" of a text: the same hidden Markov model from random parameters, by as much EM.

Shapes: B windows, T positions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from typing_extensions import override

from lvd_lightning.checks import check_at_least, check_counts
from lvd_lightning.context import Data, StageContext
from lvd_lightning.files import read_json, write_json
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.models.sparse_hmm import SparseHMM
from lvd_lightning.shares import drawn_for_batch
from lvd_lightning.stages.em_student import Rule, check_step_sizes
from lvd_lightning.stages.hmm_settings import (
    check_hmm_settings,
    check_memory,
    hmm_optimizer,
    random_hmm,
    sparse_hmm,
    two_phases,
    words_of,
)
from lvd_lightning.stages.rule_comparison import RULES, RuleComparison

__all__ = ["HMMBaseline"]


class HMMBaseline(RuleComparison):
    """Trains the hidden Markov model of the run from random parameters, by mini-batch EM and by Anemone.

    Both begin with the same parameters, see the same batches, and take the same steps as `HMMStudent` does with the
    same settings and epochs. Of each rule the epoch with the best validation counts.

    Logs, in the data's unit, `train/em_<unit>`, `train/anemone_<unit>`, `val/em_<unit>`, `val/anemone_<unit>` and the
    better one of these two as `val/<unit>`. Figures are in `baseline.json` as `random_em` and `random_anemone`.

    Args:
        num_states, homogeneous: of the model; null for those of the model that an earlier stage left.
        lr, final_lr, momentum, last_epochs, last_lr, token_dropout, val_windows, max_memory_gb: see `HMMStudent`; they
            are of both rules.
        em_pseudocount, anemone_pseudocount: per row and step, in examples.

    Example:
        >>> from lvd_lightning.stages import HMMBaseline
        >>> HMMBaseline().needs, HMMBaseline(num_states=8, homogeneous=False).needs
        (('model',), ())
    """

    harmless = ("max_memory_gb",)

    def __init__(
        self,
        num_states: int | None = None,
        homogeneous: bool | None = None,
        lr: float = 0.4,
        final_lr: float = 0.04,
        momentum: float = 0.9,
        em_pseudocount: float = 1e-3,
        anemone_pseudocount: float = 1e-3,
        last_epochs: int = 0,
        last_lr: float = 0.02,
        token_dropout: float = 0.0,
        val_windows: int | None = None,
        max_memory_gb: float | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_states=num_states, val_windows=val_windows)
        check_step_sizes(lr, final_lr, momentum)
        check_at_least(0, em_pseudocount=em_pseudocount, anemone_pseudocount=anemone_pseudocount)
        if (num_states is None) != (homogeneous is None):
            raise ValueError(
                f"num_states, homogeneous: got {num_states} and {homogeneous}, expected both, or null for both to take "
                "those of the model of an earlier stage"
            )
        self.needs = ("model",) if num_states is None else ()
        self.automatic_optimization = False
        self.save_hyperparameters()
        check_hmm_settings(self.hparams)

    @override
    def check_data(self, data: Data) -> None:
        words_of(data, type(self).__name__)

    @override
    def begin_stage(self, context: StageContext) -> None:
        self._context = context
        num_states, homogeneous = self.hparams["num_states"], self.hparams["homogeneous"]
        if num_states is None:
            model = HiddenMarkovModel.load(context.required("model"))
            num_states, homogeneous = model.num_states, model.homogeneous
        check_memory(context, num_states, bool(homogeneous), "anemone", self.hparams["max_memory_gb"], models=2)
        first = random_hmm(context, num_states, bool(homogeneous))
        self.models = nn.ModuleDict({rule: sparse_hmm(context, first, rule) for rule in RULES})
        self.seconds = dict.fromkeys(RULES, 0.0)
        self.best = dict.fromkeys(RULES, math.nan)
        self.follow(context.data.unit)
        names = [f"{split}_{rule}" for split in ("train", "val") for rule in RULES]
        self.metrics = nn.ModuleDict({name: self._likelihood() for name in names})

    def model(self, rule: Rule) -> SparseHMM:
        """The model that this rule trains."""
        found = self.models[rule]
        assert isinstance(found, SparseHMM)
        return found

    @override
    def configure_optimizers(self) -> Any:
        total = float(self.trainer.estimated_stepping_batches)
        if total == math.inf:
            raise ValueError(
                f"stage {self._context.stage}: set max_epochs of its trainer, so that the step size can fall"
            )
        self.num_steps = total
        return [hmm_optimizer(self.model(rule), self.hparams, self.hparams[f"{rule}_pseudocount"]) for rule in RULES]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizers = self.optimizers()
        assert isinstance(optimizers, list)
        done = self.current_epoch * self.num_steps / max(1, self.trainer.max_epochs or 1) + batch_idx
        lr = self.hparams["lr"] * two_phases(round(done), self.num_steps, self.trainer.max_epochs, self.hparams)
        kept_BT = self._kept_tokens(batch[0], batch_idx)
        for rule, optimizer in zip(RULES, optimizers, strict=True):
            assert isinstance(optimizer, LightningOptimizer)
            start = self._now()
            for group in optimizer.param_groups:
                group["lr"] = lr
            log_B = self.model(rule).add_flows(batch[0], kept_BT) if len(batch[0]) else None
            optimizer.step()
            optimizer.zero_grad()
            self.seconds[rule] += self._now() - start
            if log_B is None:  # the other ranks have the whole batch
                continue
            metric = self._metric("train", rule)
            metric.update(log_B)
            self.log(f"train/{rule}_{self.unit.name}", metric, on_step=False, on_epoch=True)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x_BT, index_B = batch
        limit = self.hparams["val_windows"]
        wanted_B = torch.ones_like(index_B, dtype=torch.bool) if limit is None else index_B < limit
        for rule in RULES:
            metric = self._metric("val", rule)
            if bool(wanted_B.any()):
                metric.update(self.model(rule).log_prob(x_BT[wanted_B]))
            self.log(f"val/{rule}_{self.unit.name}", metric, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def on_validation_epoch_end(self) -> None:
        scores = {rule: float(self._metric("val", rule).compute()) for rule in RULES}
        self.log(f"val/{self.unit.name}", self._best(scores), sync_dist=True)  # the same on all ranks
        if self.trainer.sanity_checking:
            return
        for rule, score in scores.items():
            if math.isnan(self.best[rule]) or self._best({rule: score, "": self.best[rule]}) != self.best[rule]:
                self.best[rule] = score
                self.model(rule).emissions.multiply_out()  # as `finished` does: on all ranks, or they round apart
                if self.trainer.is_global_zero:
                    self.model(rule).finished().save(self._context.dir / rule)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Evaluate each rule's best epoch on all of validation and, once, on test."""
        results, unit = {}, self.unit.name
        spent = read_json(context.dir / "spent.json")
        for rule in RULES:
            model = HiddenMarkovModel.load(context.dir / rule).to(self.device)
            results[f"random_{rule}"] = {
                "seconds": spent[rule],
                "num_parameters": model.num_parameters,
                f"val_{unit}": self._reached(model, context.data, "val"),
                unit: self._reached(model, context.data, "test"),
            }
        write_json(context.dir / "baseline.json", results, indent=2)
        key = f"val_{unit}"
        return {key: self._best({name: found[key] for name, found in results.items()})}

    def _best(self, scores: Mapping[Any, float]) -> float:
        return min(scores.values()) if self.unit.lower_is_better else max(scores.values())

    def _likelihood(self, **arguments: Any) -> MeanLikelihood:
        data = self._context.data
        return MeanLikelihood(data.unit, data.num_dims, **arguments)

    def _reached(self, model: HiddenMarkovModel, data: Data, split: str) -> float:
        """What a model reaches over a whole split, in the data's unit; computed by this rank alone."""
        metric = self._likelihood(sync_on_compute=False).to(self.device)
        for index in torch.arange(data.num_examples(split)).split(256):
            metric.update(model.log_prob(data.batch(split, index).to(self.device)))
        return float(metric.compute())

    def _metric(self, split: str, rule: Rule) -> MeanLikelihood:
        found = self.metrics[f"{split}_{rule}"]
        assert isinstance(found, MeanLikelihood)
        return found

    def _kept_tokens(self, x_BT: Tensor, batch_idx: int) -> Tensor | None:
        share = self.hparams["token_dropout"]
        if share == 0:
            return None
        generator = self._context.generator("step", self.current_epoch, batch_idx, 0)
        drawn_BT = drawn_for_batch(lambda count: torch.rand(count, x_BT.shape[1], generator=generator), len(x_BT))
        return (drawn_BT >= share).to(x_BT.device)

    def _now(self) -> float:
        """Seconds on a clock, when the device is done with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

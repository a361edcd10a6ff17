"""Stage "hmm": a hidden Markov model of words, in closed form from clusters as states, then by EM on log p(x).

Shapes: B windows, T positions.
"""

from __future__ import annotations

import sys
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lvd_lightning.checks import check_at_least, check_choice, check_counts
from lvd_lightning.context import Data, StageContext
from lvd_lightning.latents.assignments import read_assignments
from lvd_lightning.models.hmm_counts import HMMCounts
from lvd_lightning.models.hmm_graph import HMMTables
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import rank_and_size
from lvd_lightning.shares import drawn_for_batch
from lvd_lightning.stages.em_student import EMStudent
from lvd_lightning.stages.hmm_settings import (
    HMMRule,
    check_hmm_settings,
    check_memory,
    hmm_optimizer,
    random_hmm,
    sparse_hmm,
    two_phases,
    words_of,
)
from lvd_lightning.stages.plans.texts import hmm_plan

__all__ = ["HMMStudent"]

#: Windows that are counted at a time.
COUNTED_AT_ONCE = 4096


class HMMStudent(EMStudent):
    r"""A hidden Markov model whose states begin as the clusters that were found for every token.

    With the states given, maximum likelihood is counting: first states, transitions and emissions, of every position by
    itself or of all positions together (`homogeneous`). EM then raises log p(x), with the states summed out. It never
    sees the clusters again. The best epoch on validation is kept, or the closed form if no epoch betters it.

    Logs, in the data's unit, `train/<unit>` and `val/<unit>` (on the first `val_windows` validation windows). Of the
    closed form the report has `counts_<unit>` and `counts_seconds`, of EM `em_tokens_per_second` (flows and steps,
    without validation).

    Args:
        homogeneous: one table of transitions and one of emissions for all positions. Clusters should be pooled over
            positions then, else state k means another thing at every position.
        init: "counts", or "random" for parameters that know nothing of the clusters.
        num_states: how many states a random beginning has; null for as many as there are clusters.
        counts_pseudocount: examples that smooth every row of counts, spread over its entries.
        reserved_token: a word that has one more state for itself alone, such as the end of a text or what windows are
            filled up with; null for none.
        token_dropout: share of the tokens of a training step that count as missing, which is exact in EM.
        optimizer: "anemone", "em" (mini-batches) or "full" (one step an epoch, with the flows of all windows; take
            lr 1 and final_lr 1 for classical EM).
        lr, final_lr, momentum, pseudocount: see `EMStudent`.
        last_epochs, last_lr: a second phase of so many of the stage's epochs at this step size.
        val_windows: validation windows on which the model is evaluated after every epoch; null for all.
        max_memory_gb: what training may take; it is told, and refused, before anything is allocated. null for what the
            machine has.

    References:
        Liu, Zhang and Van den Broeck, Scaling Up Probabilistic Circuits by Latent Variable Distillation, 2023
        (arXiv 2210.04398), section 2; token dropout: Zhang et al., Ctrl-G, 2024 (arXiv 2406.13892).

    Example:
        >>> from lvd_lightning.stages import HMMStudent
        >>> stage = HMMStudent(homogeneous=True, last_epochs=5, last_lr=0.01)
        >>> stage.needs, stage.leaves
        (('latents',), ('model',))
    """

    needs: tuple[str, ...] = ("latents",)
    leaves: ClassVar[tuple[str, ...]] = ("model",)
    model_title = "hmm"
    rules = ("anemone", "em", "full")
    val_setting = "val_windows"
    harmless = ("max_memory_gb",)

    def __init__(
        self,
        homogeneous: bool = False,
        init: Literal["counts", "random"] = "counts",
        num_states: int | None = None,
        counts_pseudocount: float = 0.1,
        reserved_token: str | None = None,
        token_dropout: float = 0.0,
        optimizer: HMMRule = "anemone",
        lr: float = 0.4,
        final_lr: float = 0.04,
        momentum: float = 0.9,
        pseudocount: float = 1e-3,
        last_epochs: int = 0,
        last_lr: float = 0.02,
        val_windows: int | None = None,
        max_memory_gb: float | None = None,
    ) -> None:
        super().__init__()
        check_choice(("counts", "random"), init=init)
        check_at_least(0, counts_pseudocount=counts_pseudocount)
        check_counts(num_states=num_states)
        if num_states is not None and init == "counts":
            raise ValueError(
                f"num_states: got {num_states}, but from counts there are as many states as clusters: leave it "
                "null, or set init: random"
            )
        if num_states is not None:
            self.needs = ()
        check_hmm_settings(self.hparams)

    @classmethod
    @override
    def load_model(cls, folder: Path) -> nn.Module:
        return HiddenMarkovModel.load(folder)

    @override
    def check_data(self, data: Data) -> None:
        words_of(data, type(self).__name__)

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return hmm_plan(self.hparams, request)

    @override
    def begin_stage(self, context: StageContext) -> None:
        super().begin_stage(context)
        rule = self.hparams["optimizer"]
        num_states = self._num_states(context)
        self.memory = check_memory(
            context, num_states, self.hparams["homogeneous"], rule, self.hparams["max_memory_gb"]
        )
        start = time.monotonic()
        tables = self._first_tables(context)
        self.spent = {"first_parameters": time.monotonic() - start, "steps": 0.0, "tokens": 0.0}
        self.model = sparse_hmm(context, tables, rule)
        self.train_likelihood, self.val_likelihood = self.likelihood(), self.likelihood()

    @override
    def trained(self) -> nn.Module:
        return self.model

    @override
    def make_optimizer(self) -> Optimizer:
        return hmm_optimizer(self.model, self.hparams, self.hparams["pseudocount"])

    @override
    def factor(self, step: int, total: float) -> float:
        return two_phases(step, total, self.trainer.max_epochs, self.hparams)

    @override
    def configure_optimizers(self) -> Any:
        if self.hparams["optimizer"] == "full":
            self.batches_per_step = sys.maxsize  # until the end of an epoch
        return super().configure_optimizers()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x_BT, start = batch[0], self._now()
        kept_BT = self.kept_tokens(x_BT, batch_idx)
        if not len(x_BT):  # the other ranks have the whole batch
            self.em_step()
            return
        log_B = self.model.add_flows(x_BT, kept_BT)
        self.em_step()
        self.spent["steps"] += self._now() - start
        self.spent["tokens"] += x_BT.numel()
        # Of dropped tokens nothing was asked: what is logged is told per token that was there.
        share_B = 1.0 if kept_BT is None else kept_BT.double().mean(1).clamp_min(1 / x_BT.shape[1])
        self.train_likelihood.update(log_B / share_B)
        self.log(f"train/{self.unit.name}", self.train_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["hmm"] = {"spent": dict(self.spent)}

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.spent.update({name: checkpoint["hmm"]["spent"][name] for name in ("steps", "tokens")})

    def kept_tokens(self, x_BT: Tensor, batch_idx: int) -> Tensor | None:
        """Which tokens of a step's windows are not dropped, bool (B, T); None for all."""
        share = self.hparams["token_dropout"]
        if share == 0:
            return None
        generator = self.step_generator(batch_idx)
        drawn_BT = drawn_for_batch(lambda count: torch.rand(count, x_BT.shape[1], generator=generator), len(x_BT))
        return (drawn_BT >= share).to(x_BT.device)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x_BT, index_B = batch
        limit = self.hparams["val_windows"]
        wanted_B = torch.ones_like(index_B, dtype=torch.bool) if limit is None else index_B < limit
        if bool(wanted_B.any()):
            self.val_likelihood.update(self.model.log_prob(x_BT[wanted_B]))
        self.log(f"val/{self.unit.name}", self.val_likelihood, on_step=False, on_epoch=True, prog_bar=True)

    @override
    @torch.no_grad()
    def finish_stage(self, context: StageContext) -> dict[str, float]:
        """Keep the best epoch, or the closed form if no epoch is better on validation."""
        unit, at_best = self.unit.name, self.validate(self.model, context)
        figures = {f"val_{unit}": at_best}
        kept = self.model.taken(self._reserved(context)).to(self.device)
        if self.hparams["init"] == "counts":
            length = words_of(context.data, context.stage).num_parts
            tables = self._first_tables(context, alone=True)
            counted = HiddenMarkovModel.from_tables(tables, length, self._reserved(context)).to(self.device)
            del tables
            at_start = self.validate(counted, context)
            figures[f"counts_{unit}"] = at_start
            if not (at_best < at_start if self.unit.lower_is_better else at_best > at_start):
                warnings.warn(
                    f"EM did not better the validation {unit} ({at_start:.4f} from counts, {at_best:.4f} at best): the "
                    "closed form is kept; try a smaller lr or a larger pseudocount",
                    stacklevel=2,
                )
                kept, figures[f"val_{unit}"] = counted, at_start
            del counted  # the one that is not kept makes room for what is written
        kept.save(context.dir)
        figures |= {"num_states": kept.num_states, "num_parameters": kept.num_parameters}
        figures["planned_memory_gb"] = self.memory.peak / 1e9
        if self.hparams["init"] == "counts":
            figures["counts_seconds"] = self.spent["first_parameters"]
        if self.spent["steps"] > 0:
            figures["em_tokens_per_second"] = self.spent["tokens"] / self.spent["steps"]
        return figures

    def _now(self) -> float:
        """Seconds on a clock, when the device is done with what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.monotonic()

    def _num_states(self, context: StageContext) -> int:
        """K: clusters, and one state for a reserved token; or what the setting says."""
        if self.hparams["num_states"] is not None:
            return int(self.hparams["num_states"])
        return read_assignments(context)[1] + (self._reserved(context) is not None)

    def _first_tables(self, context: StageContext, alone: bool = False) -> HMMTables:
        """Parameters before EM: the same on every rank, each counting its share, unless this one does it `alone`."""
        words, settings, num_states = words_of(context.data, context.stage), self.hparams, self._num_states(context)
        if settings["init"] == "random":
            return random_hmm(context, num_states, settings["homogeneous"])
        z_NT, reserved = read_assignments(context)[0], self._reserved(context)
        counts = HMMCounts(words.num_parts, num_states, words.vocabulary, settings["homogeneous"])
        rank, size = (0, 1) if alone else rank_and_size()
        for index in torch.arange(rank, len(z_NT["train"]), size).split(COUNTED_AT_ONCE):
            x_NT, states_NT = context.data.batch("train", index), z_NT["train"][index]
            if reserved is not None:
                states_NT = states_NT.masked_fill(x_NT == reserved, num_states - 1)
            counts.add(states_NT, x_NT)
        if not alone:
            counts.all_reduce()
        return counts.tables(settings["counts_pseudocount"], torch.get_default_dtype())

    def _reserved(self, context: StageContext) -> int | None:
        """The token that has a state for itself, or None."""
        word = self.hparams["reserved_token"]
        if word is None:
            return None
        vocabulary = getattr(context.data, "vocabulary", None)
        if vocabulary is None:
            raise ValueError(f"reserved_token: got {word!r}, but the data have no vocabulary of words: leave it null")
        return int(vocabulary.encode([word])[0])

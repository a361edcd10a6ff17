"""What the stages of hidden Markov models share: the words of the data, first parameters, steps in two phases."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer

from lvd_lightning.checks import check_above, check_counts, check_share, expect
from lvd_lightning.context import Data, StageContext
from lvd_lightning.models.hmm_graph import HMMTables, random_tables
from lvd_lightning.models.hmm_memory import HMMMemory
from lvd_lightning.models.sparse_hmm import SparseHMM, sparse_optimizer
from lvd_lightning.parts import Tokens
from lvd_lightning.ranks import rank_and_size
from lvd_lightning.stages.em_student import step_factor

__all__ = [
    "HMMRule",
    "check_hmm_settings",
    "check_memory",
    "hmm_optimizer",
    "random_hmm",
    "sparse_hmm",
    "two_phases",
    "words_of",
]

HMMRule = Literal["anemone", "em", "full"]


def words_of(data: Data, stage: str) -> Tokens:
    """The words of a text; a ValueError for data of another kind, which the stage called `stage` cannot learn."""
    parts = data.parts
    if not isinstance(parts, Tokens):
        raise ValueError(
            f"{stage} learns words of texts, but the data's parts are {type(parts).__name__}: take a datamodule of "
            "texts, or another stage"
        )
    expect(parts.num_parts >= 2, "data.length", parts.num_parts, "windows of 2 tokens or more")
    return parts


def check_hmm_settings(settings: Any) -> None:
    """Raise a ValueError unless these settings of both stages are in their ranges."""
    check_share(token_dropout=settings["token_dropout"])
    check_above(0, max_memory_gb=settings["max_memory_gb"])
    last_epochs, last_lr, lr = settings["last_epochs"], settings["last_lr"], settings["lr"]
    expect(last_epochs == 0 or isinstance(last_epochs, int), "last_epochs", last_epochs, "a whole number")
    check_counts(last_epochs=last_epochs or None)
    expect(0 < last_lr <= lr, "last_lr", last_lr, f"a step size above 0 and at most lr, which is {lr}")


def two_phases(step: int, total: float, max_epochs: int | None, settings: Any) -> float:
    """What `lr` is multiplied by in step `step` of `total`: falls to `final_lr`, then stays at `last_lr`.

    The second phase is that of the last `last_epochs` of the stage's epochs.
    """
    epochs, last = max(1, max_epochs or 1), settings["last_epochs"]
    first = total * max(0, epochs - last) / epochs
    if last and step >= round(first):
        return float(settings["last_lr"] / settings["lr"])
    return step_factor(step, first, settings["final_lr"] / settings["lr"])


def hmm_optimizer(model: SparseHMM, settings: Any, pseudocount: float) -> Optimizer:
    """The optimizer of the model's rule."""
    return sparse_optimizer(model, lr=settings["lr"], momentum=settings["momentum"], pseudocount=pseudocount)


def check_memory(
    context: StageContext, num_states: int, homogeneous: bool, rule: HMMRule, limit_gb: float | None, models: int = 1
) -> HMMMemory:
    """What training takes; a ValueError that names the figures if there is less.

    rule: "full" is the classical rule with one step an epoch. models: how many are trained at once.
    """
    words = words_of(context.data, context.stage)
    size = windows_at_once(context.data)
    rule = "anemone" if rule == "anemone" else "em"
    memory = HMMMemory(words.num_parts, num_states, words.vocabulary, homogeneous, size, rule, models=models)
    try:
        memory.check(limit_gb, context.device)
    except ValueError as error:
        raise ValueError(f"stage {context.stage}: {error}") from error
    return memory


def windows_at_once(data: Data) -> int:
    """Windows of a training step on this rank; larger batches are divided."""
    return max(1, -(-int(getattr(data, "batch_size", 256)) // rank_and_size()[1]))


def sparse_hmm(context: StageContext, tables: HMMTables, rule: HMMRule) -> SparseHMM:
    """A model in training, with first parameters."""
    size = windows_at_once(context.data)
    length = words_of(context.data, context.stage).num_parts
    return SparseHMM(tables, length, size, "anemone" if rule == "anemone" else "em").to(context.device)


def random_hmm(context: StageContext, num_states: int, homogeneous: bool) -> HMMTables:
    """Random parameters, a function of the run's seed and the stage's name."""
    words = words_of(context.data, context.stage)
    generator = context.generator("parameters")
    return random_tables(words.num_parts, num_states, words.vocabulary, homogeneous, generator)

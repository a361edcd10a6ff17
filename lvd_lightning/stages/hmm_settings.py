"""What the stages of hidden Markov models share: the words of the data, first parameters, steps in two phases."""

from __future__ import annotations

from typing import Any, Literal

from torch.optim import Optimizer

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_choice, check_counts, check_share, expect
from lvd_lightning.context import Data, StageContext
from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.parts import Tokens
from lvd_lightning.stages.em_student import make_optimizer, step_factor

__all__ = ["HMMRule", "check_hmm_settings", "hmm_optimizer", "random_hmm", "two_phases", "words_of"]

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


def hmm_optimizer(rule: HMMRule, model: HiddenMarkovModel, settings: Any) -> Optimizer:
    """The optimizer of a rule: "full" is classical EM that takes one step an epoch, with the flows of all of it."""
    check_choice(("anemone", "em", "full"), optimizer=rule)
    lr, pseudocount = settings["lr"], settings["pseudocount"]
    if rule == "full":
        return pc.CircuitEM(model, lr=lr, pseudocount=pseudocount)
    return make_optimizer(rule, model, lr, settings["momentum"], pseudocount)


def random_hmm(context: StageContext, num_states: int, homogeneous: bool) -> HiddenMarkovModel:
    """A model with random parameters, a function of the run's seed and the stage's name."""
    words = words_of(context.data, context.stage)
    generator = context.generator("parameters")
    tables = random_tables(words.num_parts, num_states, words.vocabulary, homogeneous, generator)
    return HiddenMarkovModel.from_tables(tables, words.num_parts)

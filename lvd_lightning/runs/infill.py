"""Words that are missing in a text, filled in by the model of a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lvd_lightning.checks import check_at_least, check_counts
from lvd_lightning.models.infilling import best_completion, sampled_completions
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.runs.run import Run
from lvd_lightning.seeds import generator_for

__all__ = ["MASK", "Completion", "completions", "print_completions"]

MASK = "<mask>"


@dataclass(frozen=True)
class Completion:
    """A text without gaps.

    how: "best" (words and states together) or "sample".
    words: those of the text, the missing ones filled in.
    log_prob: log p(the words that were missing | the others), in nats.
    """

    how: str
    words: list[str]
    log_prob: float


def completions(run: Run, text: str, num_samples: int = 5, seed: int = 0) -> Iterator[Completion]:
    """The best completion of a text, then exact samples; every `<mask>` is a missing word.

    The text stands at the beginning of a window.

    Args:
        run: with a finished hidden Markov model of words.
        text: at most as many words as a window has.
        num_samples: how many are drawn after the best one.
        seed: of what is drawn.

    Raises:
        ValueError: the run has no such model, or the text no `<mask>`, unknown words (which are named), or too many.
    """
    check_counts(num_samples=num_samples)
    check_at_least(0, seed=seed)
    model = run.model()
    if not isinstance(model, HiddenMarkovModel):
        raise ValueError(f"{run.dir}: its model is a {type(model).__name__}, expected a hidden Markov model of words")
    vocabulary = getattr(run.data(), "vocabulary", None)
    if vocabulary is None:
        raise ValueError(f"{run.dir}: its data have no vocabulary of words")
    words = vocabulary.tokens(text)
    missing = [word == MASK for word in words]
    if not any(missing):
        raise ValueError(f"text: got {text!r}, expected {MASK} for every word that is to be filled in")
    if len(words) > model.length:
        raise ValueError(f"text: has {len(words)} words, expected at most the {model.length} of a window")
    known = iter(vocabulary.encode([word for word in words if word != MASK]))
    x = torch.tensor([0 if gap else next(known) for gap in missing])
    observed = ~torch.tensor(missing)
    best = best_completion(model, x, observed)
    drawn = sampled_completions(model, x, observed, num_samples, generator_for(seed, "infill"))
    for how, found in (("best", best), ("sample", drawn)):
        for tokens_L, log_prob in zip(found.tokens_NL, found.log_prob_N.tolist(), strict=True):
            yield Completion(how, vocabulary.decode(tokens_L.tolist()), log_prob)


def print_completions(run: Run, text: str, num_samples: int, seed: int) -> None:
    """The completions as a table."""
    vocabulary: Any = None
    table = Table("", "completion", "log p", "p")
    for number in (2, 3):
        table.columns[number].justify = "right"
    for found in completions(run, text, num_samples, seed):
        vocabulary = vocabulary or run.data().vocabulary
        shown = vocabulary.text(found.words) if hasattr(vocabulary, "text") else " ".join(found.words)
        table.add_row(found.how, shown, f"{found.log_prob:.2f}", f"{math.exp(found.log_prob):.2g}")
    Console().print(table)
    print("best: of words and hidden states together; log p: of the missing words given the others, in nats")

"""Stage "ngrams": what n-gram models with Kneser-Ney smoothing reach on the same words and windows."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from typing_extensions import override

from lvd_lightning.checks import check_counts, expect
from lvd_lightning.context import Data, StageContext
from lvd_lightning.files import write_json
from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.models.kneser_ney import KneserNey
from lvd_lightning.ranks import on_first
from lvd_lightning.stages.hmm_settings import words_of
from lvd_lightning.stages.stage import PlainStage

__all__ = ["NGramReference"]


class NGramReference(PlainStage):
    """Counts n-grams of the training text and tells what they reach on windows of the other splits.

    It leaves no model; figures are in `reference.json`, and in the report under "reference": of every order as
    `kneser_ney_<n>`, and as `kneser_ney` that of the order which is best on validation.

    Args:
        orders: words of an n-gram, one model for each.

    Example:
        >>> from lvd_lightning.stages import NGramReference
        >>> NGramReference().leaves, NGramReference().needs
        ((), ())
    """

    def __init__(self, orders: Sequence[int] = (3, 5)) -> None:
        expect(len(orders) > 0, "orders", orders, "one order or more")
        for order in orders:
            check_counts(orders=order)
        self.orders = list(orders)

    @override
    def check_data(self, data: Data) -> None:
        words_of(data, type(self).__name__)

    def run(self, context: StageContext) -> dict[str, float]:
        """Count and evaluate, on the first rank alone."""
        return on_first(lambda: self._run(context))

    def _run(self, context: StageContext) -> dict[str, float]:
        data, found = context.data, {}
        unit, words = data.unit, words_of(data, context.stage)
        if hasattr(data, "stream"):  # of overlapping windows some words would count twice
            text_NT = torch.from_numpy(data.stream("train").astype("int64"))[None]
        else:
            text_NT = data.batch("train", torch.arange(data.num_examples("train")))
        for order in self.orders:
            start = time.monotonic()
            model = KneserNey(text_NT, words.vocabulary, order)
            reached = {split: self._reached(model, data, split) for split in ("val", "test")}
            found[order] = {
                unit.name: reached["test"],
                f"val_{unit.name}": reached["val"],
                "order": order,
                "num_parameters": model.num_parameters,
                "seconds": time.monotonic() - start,
            }
        best = min(found.values(), key=lambda figures: figures[f"val_{unit.name}"])
        named = {"kneser_ney": best, **{f"kneser_ney_{order}": figures for order, figures in found.items()}}
        context.dir.mkdir(parents=True, exist_ok=True)
        write_json(context.dir / "reference.json", named, indent=2)
        return {f"val_{unit.name}": best[f"val_{unit.name}"]}

    def _reached(self, model: KneserNey, data: Data, split: str) -> float:
        metric = MeanLikelihood(data.unit, data.num_dims, sync_on_compute=False)
        for index in torch.arange(data.num_examples(split)).split(4096):
            metric.update(model.log_prob(data.batch(split, index)))
        return float(metric.compute())

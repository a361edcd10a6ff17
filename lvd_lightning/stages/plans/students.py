"""What the stages of circuits over images take: conditional, prior, finetune.

Shapes: N examples, P parts, D variables of a part, G circuits, K latent values, M candidates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.engine.workspace import few_sizes
from lvd_lightning.models.evidence_source import images_within
from lvd_lightning.models.structures import Leaf, PartStructure
from lvd_lightning.planning import ESTIMATE, PlanRequest, StagePlan
from lvd_lightning.stages.plans.circuits import (
    WORK,
    Conditionals,
    TableSizes,
    grown,
    saved_bytes,
    training_memory,
    tree_prior_sizes,
)

__all__ = ["conditional_plan", "finetune_plan", "prior_plan"]


def conditional_plan(
    settings: Mapping[str, Any], structure: PartStructure, leaf: Leaf, request: PlanRequest
) -> StagePlan:
    """The plan of a `ConditionalStudent`: with callbacks that grow circuits, of the largest that they may become."""
    parts, clusters = request.data.parts, int(request.known("latents")["num_states"])
    first, heads = _part_circuit(settings, structure, leaf, parts.shape), settings["num_heads"]
    num_circuits = clusters if settings["tied"] else clusters * parts.num_parts
    one = TableSizes.of(first)
    whole = one * num_circuits
    edges, notes = one.edges * request.epochs, []
    targets = _growth(request)
    if targets:
        last, heads = grown(first, [target for _, target in targets]), max(heads, *(most for _, most in targets))
        largest = TableSizes.of(last)
        before, after = targets[0][0], request.epochs - targets[-1][0]
        edges = one.edges * before + largest.edges * (request.epochs - before)
        whole = largest * num_circuits
        notes.append(
            f"of circuits grown to {heads} heads, nothing pruned, as they may be in the last {after} epochs; at first "
            f"{one.parameters * num_circuits:,} parameters"
        )
    width, rule, sharded = request.bytes_per_number, settings["optimizer"], settings.get("sharding") == "circuits"
    batch = min(request.batch_size, request.num_examples("train"))
    ranks = request.num_ranks
    slots = few_sizes(round(settings["slots"] * batch * parts.num_parts / num_circuits))
    own = whole
    if sharded:
        own = (largest if targets else one) * math.ceil(num_circuits / ranks)
        notes.append("circuits are divided over ranks: a step sends nothing; files are those of all circuits")
    memory = training_memory(own, request, rule, slots if sharded else math.ceil(slots / ranks))
    states = num_circuits * heads if settings["tied"] else clusters
    memory["prior"] = tree_prior_sizes(parts.num_parts, states, None).tables(width)
    checkpoint = whole.tables(width) + whole.averages(width, rule) + whole.text
    checkpoint += request.num_examples("train") * parts.num_parts * 2
    files = {"conditional.safetensors": saved_bytes(whole, request), "best.ckpt": checkpoint, "last.ckpt": checkpoint}
    if heads > 1:
        files["assignments"] = request.num_examples() * parts.num_parts * 4
    return StagePlan(
        parameters=whole.parameters,
        memory=memory,
        epochs=request.epochs,
        steps_per_epoch=request.steps_per_epoch,
        sent_per_step=0 if sharded else request.sent(whole.gradients(width)),
        files=files,
        work=float(request.num_examples("train") * parts.num_parts * edges),
        work_is=WORK,
        leaves={"conditionals": Conditionals(whole, num_circuits, states)},
        notes=tuple(notes),
    )


def prior_plan(settings: Mapping[str, Any], request: PlanRequest) -> StagePlan:
    """The plan of a `PriorStudent`."""
    parts, width, rule = request.data.parts, request.bytes_per_number, settings["optimizer"]
    conditionals: Conditionals = request.known("conditionals")
    states = conditionals.num_states
    sizes = tree_prior_sizes(parts.num_parts, states, settings["num_units"])
    kept = min(settings["candidates"] or states, states)
    num_train, num_val = request.num_examples("train"), min(settings["val_images"], request.num_examples("val"))
    cached = images_within(settings["max_cache_gb"], (num_train, parts.num_parts, kept), states)
    each = parts.num_parts * (kept * (2 + (0 if kept == states else 2 if states <= 1 << 15 else 4)) + 4)
    memory = training_memory(sizes, request, rule, request.share)
    memory["conditionals"] = conditionals.sizes.tables(width)
    memory[f"evidence ({ESTIMATE})"] = 2 * request.share * parts.num_parts * states * width
    checkpoint = (sizes + conditionals.sizes).tables(width) + sizes.averages(width, rule) + sizes.text
    notes = [] if cached == num_train else [f"max_cache_gb holds the evidence of {cached:,} images"]
    return StagePlan(
        parameters=sizes.parameters + conditionals.sizes.parameters,
        memory=memory,
        epochs=request.epochs,
        steps_per_epoch=request.steps_per_epoch,
        sent_per_step=request.sent(sizes.gradients(width)),
        files={
            "evidence of training images": cached * each,
            "evidence of validation images": num_val * parts.num_parts * (states * 2 + 4),
            "prior.safetensors": saved_bytes(sizes, request),
            "conditional.safetensors": saved_bytes(conditionals.sizes, request),
            "best.ckpt": checkpoint,
            "last.ckpt": checkpoint,
        },
        work=float(request.epochs * num_train * sizes.edges + num_train * parts.num_parts * kept * _head(conditionals)),
        work_is=f"{WORK}, and those that evidence is computed by",
        leaves={"prior": sizes, "model": sizes + conditionals.sizes},
        notes=tuple(notes),
    )


def finetune_plan(settings: Mapping[str, Any], request: PlanRequest) -> StagePlan:
    """The plan of a `FinetuneStudent`."""
    parts, width, rule = request.data.parts, request.bytes_per_number, settings["optimizer"]
    conditionals: Conditionals = request.known("conditionals")
    prior: TableSizes = request.known("prior")
    trained = prior + conditionals.sizes if settings["train_prior"] else conditionals.sizes
    slots = few_sizes(round(settings["slots"] * request.batch_size * parts.num_parts / conditionals.num_circuits))
    memory = training_memory(trained, request, rule, math.ceil(slots / request.num_ranks), conditionals.sizes)
    if not settings["train_prior"]:
        memory["prior"] = prior.tables(width)
    memory["copies of the conditionals"] = conditionals.sizes.tables(width)
    passes = 2 * prior.rows + 2 * parts.num_parts * conditionals.num_states
    memory[f"prior and evidence ({ESTIMATE})"] = passes * request.share * width
    whole = prior + conditionals.sizes
    checkpoint = whole.tables(width) + trained.averages(width, rule)
    return StagePlan(
        parameters=prior.parameters + conditionals.sizes.parameters,
        memory=memory,
        epochs=request.epochs,
        steps_per_epoch=request.steps_per_epoch,
        sent_per_step=request.sent(trained.gradients(width)),
        files={
            "prior.safetensors": saved_bytes(prior, request),
            "conditional.safetensors": saved_bytes(conditionals.sizes, request),
            "best.ckpt": checkpoint,
            "last.ckpt": checkpoint,
        },
        work=float(request.epochs * request.num_examples("train"))
        * (prior.edges + parts.num_parts * conditionals.num_states * _head(conditionals)),
        work_is=f"{WORK}, as if evidence were computed of all latent values",
        leaves={"model": whole},
    )


def _part_circuit(
    settings: Mapping[str, Any], structure: PartStructure, leaf: Leaf, shape: tuple[int, ...]
) -> pc.Circuit:
    """One of the circuits, with random parameters; any tree has tables of the same sizes."""
    graph = structure.graph(
        shape,
        settings["num_units"],
        settings["num_heads"],
        leaf=leaf,
        parents=torch.arange(-1, math.prod(shape) - 1),
        generator=torch.Generator().manual_seed(0),
    )
    return pc.Circuit([graph])


def _growth(request: PlanRequest) -> list[tuple[int, int]]:
    """The epochs at which circuits grow, and how many heads they have at most after each."""
    found = []
    for callback in request.callbacks:
        target = getattr(callback, "target", None)
        if isinstance(target, int) and hasattr(callback, "should_act"):
            found += [(epoch, target) for epoch in range(request.epochs) if callback.should_act(epoch)]
    return found


def _head(conditionals: Conditionals) -> float:
    """Edges of a circuit: what the evidence of one of its heads takes."""
    return conditionals.sizes.edges / conditionals.num_circuits

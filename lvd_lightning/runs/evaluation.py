"""What the trained circuits of a run reach on its images: bits per dimension, exact, over whole images."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.context import ImageData
from lvd_lightning.latents import load_assignments
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.metrics import LVDGap
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.run import Run
from lvd_lightning.seeds import derive_seed
from lvd_lightning.teachers import load_teacher

__all__ = ["SPLITS", "circuit_bpd", "evaluate_run", "is_evaluated", "lvd_gap", "mean_bpds"]

SPLITS = ("train", "val", "test")
# Figures beside those of the models.
_BOUNDS = ("teacher_elbo", "lvd_objective")
# So many training images, drawn once, say where a circuit stands on them; validation and test images all count.
MAX_TRAIN_IMAGES = 1_000
# Images per pass over all ranks; a circuit divides them further by itself.
_BATCH = 256


def evaluate_run(run: Run, data: ImageData, ranks: Ranks) -> dict[str, Any]:
    """Bits per dimension of a run's models on all splits; all ranks have to call.

    Returns:
        "circuits": {"train_bpd", "val_bpd", "test_bpd"} of "teacher_elbo", "lvd_objective" and the model of every stage
        that left one, by its title ("distilled", "finetuned"), "gap": what `LVDGap` says of the test images for these
        models, "num_train": the training images that were counted, "num_parameters" and "num_heads" (values of a
        latent variable) of the last model. What a run has not is absent; empty if no stage left a model.
    """
    circuits: dict[str, dict[str, float]] = {}
    gaps: dict[str, Any] = {}
    described: dict[str, Any] = {}
    assignments = assignments_folder(run)
    for number, stage in enumerate(run.leaving("model")):
        name, circuit = stage.title, stage.model(ranks.device)
        # The bounds are those of the first model, which was trained on the latent values that they are about.
        teacher = _teacher_with_elbo(run, ranks) if number == 0 else None
        for split in SPLITS:
            if assignments is None:
                circuits.setdefault(name, {})[f"{split}_bpd"] = circuit_bpd(circuit, data, split, ranks)
                continue
            found = lvd_gap(circuit, teacher, data, split, load_assignments(assignments, split), ranks)
            titles = {"log_prob": name}
            if number == 0:
                titles = {**{bound: bound for bound in _BOUNDS}, "log_prob": name}
            for key, title in titles.items():
                if key in found:
                    circuits.setdefault(title, {})[f"{split}_bpd"] = found[key]["bpd"]
            if split == "test":
                gaps[name] = found
        described = {"num_parameters": circuit.num_parameters, "num_heads": circuit.num_states}
    if not circuits:
        return {}
    gap = {"gap": gaps} if gaps else {}
    return {"circuits": circuits, **gap, "num_train": len(_rows(data, "train")), **described}


def is_evaluated(run: Run) -> bool:
    """Whether `evaluate_run` was done with the models that there are."""
    titles = {stage.title for stage in run.leaving("model")}
    found = run.evaluation()
    return bool(found) and {*found.get("circuits", {})} - {*_BOUNDS} == titles


@torch.inference_mode()
def lvd_gap(
    circuit: Any, teacher: Any | None, data: ImageData, split: str, z_NP: Tensor, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """What `LVDGap` says of a circuit and its teacher on a split; all ranks have to call.

    teacher: something with `elbo(images)`, or None; z_NP: the latent values that the circuit was given.
    """
    metric = LVDGap(math.prod(data.image_shape), sync_on_compute=False)
    for rows in ranks.share(_rows(data, split)).split(max(1, _BATCH // ranks.world_size)):
        images = data.batch(split, rows).to(ranks.device)
        log_B, joint_B = circuit.log_prob_and_objective(images, z_NP[rows].to(ranks.device))
        elbo_B = None if teacher is None else teacher.elbo(images).cpu()
        metric.update(log_B.cpu(), joint_B.cpu(), elbo_B)
    for name in LVDGap.STATES:
        setattr(metric, name, ranks.sum(getattr(metric, name)))
    found: dict[str, dict[str, float]] = metric.compute()
    return found


def circuit_bpd(circuit: Any, data: ImageData, split: str, ranks: Ranks) -> float:
    """Bits per dimension of a circuit on a split; all ranks have to call."""
    device = ranks.device
    return mean_bpds(lambda rows: [circuit.log_prob(data.batch(split, rows).to(device))], data, split, ranks)[0]


@torch.inference_mode()
def mean_bpds(log_probs: Callable[[Tensor], list[Tensor]], data: ImageData, split: str, ranks: Ranks) -> list[float]:
    """The means of -log2 p(x) / (3 H W) over a split, each rank doing its share.

    log_probs: rows of the split int64 [n] -> log-likelihoods in nats, each [n], of one or several models.
    """
    total: Tensor | None = None
    for rows in ranks.share(_rows(data, split)).split(max(1, _BATCH // ranks.world_size)):
        part = torch.stack([found.double().sum().cpu() for found in log_probs(rows)] + [torch.tensor(float(len(rows)))])
        total = part if total is None else total + part
    if total is None:  # fewer images than ranks
        total = torch.zeros(len(log_probs(_rows(data, split)[:1])) + 1, dtype=torch.float64)
    *nats, count = ranks.sum(total).tolist()
    return [-value / count / math.prod(data.image_shape) / math.log(2.0) for value in nats]


def _teacher_with_elbo(run: Run, ranks: Ranks) -> Any | None:
    """The run's teacher, if it has one that bounds the likelihood of images."""
    folder = run.artefact("features")
    if folder is None:
        return None
    teacher = load_teacher(folder)
    return teacher.to(ranks.device) if hasattr(teacher, "elbo") else None


def _rows(data: ImageData, split: str) -> Tensor:
    count = data.num_examples(split)
    if split != "train" or count <= MAX_TRAIN_IMAGES:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed("evaluate", count))
    return torch.randperm(count, generator=generator)[:MAX_TRAIN_IMAGES].sort().values

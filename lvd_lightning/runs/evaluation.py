"""What the trained circuits of a run reach on its images: bits per dimension, exact, over whole images."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.context import DONE_MARKER, ImageData
from lvd_lightning.latents import load_assignments
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.metrics import LVDGap
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.ranks import Ranks
from lvd_lightning.seeds import derive_seed
from lvd_lightning.teachers import load_teacher

__all__ = ["CIRCUIT_STAGES", "SPLITS", "circuit_bpd", "evaluate_run", "final_stage", "lvd_gap", "mean_bpds"]

SPLITS = ("train", "val", "test")
# Stages that leave a circuit over images, and what reports call it.
CIRCUIT_STAGES = {"prior": "distilled", "finetune": "finetuned"}
# So many training images, drawn once, say where a circuit stands on them; validation and test images all count.
MAX_TRAIN_IMAGES = 1_000
# Images per pass over all ranks; a circuit divides them further by itself.
_BATCH = 256


def evaluate_run(run_dir: Path, data: ImageData, ranks: Ranks) -> dict[str, Any]:
    """Bits per dimension of a run's circuits on all splits; all ranks have to call.

    Returns:
        "circuits": {"train_bpd", "val_bpd", "test_bpd"} of "teacher_elbo", "lvd_objective", "distilled" and
        "finetuned", "gap": what `LVDGap` says of the test images for "distilled" and "finetuned", "num_train": the
        training images that were counted, "num_parameters" and "num_heads" (values of a latent variable) of the final
        circuit. What a run has not is absent; empty if no stage left a circuit.
    """
    circuits: dict[str, dict[str, float]] = {}
    gaps: dict[str, Any] = {}
    described: dict[str, Any] = {}
    assignments = assignments_folder(run_dir)
    for stage, name in CIRCUIT_STAGES.items():
        if not _is_finished(run_dir, stage):
            continue
        circuit = AssembledCircuit.load(run_dir / stage).to(ranks.device).eval()
        teacher = _teacher_with_elbo(run_dir, ranks) if stage == "prior" else None
        for split in SPLITS:
            if assignments is None:
                circuits.setdefault(name, {})[f"{split}_bpd"] = circuit_bpd(circuit, data, split, ranks)
                continue
            found = lvd_gap(circuit, teacher, data, split, load_assignments(assignments, split), ranks)
            titles = {"log_prob": name}
            if stage == "prior":
                titles = {"teacher_elbo": "teacher_elbo", "lvd_objective": "lvd_objective", "log_prob": name}
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


@torch.inference_mode()
def lvd_gap(
    circuit: AssembledCircuit, teacher: Any | None, data: ImageData, split: str, z_NP: Tensor, ranks: Ranks
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


def final_stage(run_dir: Path) -> str | None:
    """The last finished stage that left a circuit over images, if there is one."""
    finished = [stage for stage in CIRCUIT_STAGES if _is_finished(run_dir, stage)]
    return finished[-1] if finished else None


def circuit_bpd(circuit: AssembledCircuit, data: ImageData, split: str, ranks: Ranks) -> float:
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


def _teacher_with_elbo(run_dir: Path, ranks: Ranks) -> Any | None:
    """The run's teacher, if it has one that bounds the likelihood of images."""
    if not _is_finished(run_dir, "teacher"):
        return None
    teacher = load_teacher(run_dir / "teacher")
    return teacher.to(ranks.device) if hasattr(teacher, "elbo") else None


def _rows(data: ImageData, split: str) -> Tensor:
    count = data.num_examples(split)
    if split != "train" or count <= MAX_TRAIN_IMAGES:
        return torch.arange(count)
    generator = torch.Generator().manual_seed(derive_seed("evaluate", count))
    return torch.randperm(count, generator=generator)[:MAX_TRAIN_IMAGES].sort().values


def _is_finished(run_dir: Path, stage: str) -> bool:
    return (run_dir / stage / DONE_MARKER).is_file()

"""What the trained circuits of a run reach on its data: exact likelihoods of whole examples, and figures of samples."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.context import Data, VisibleData
from lvd_lightning.latents import load_assignments
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.metrics import LVDGap, MeanLikelihood
from lvd_lightning.models.carried import carried_log_prob
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.perception import Perception
from lvd_lightning.runs.run import Run
from lvd_lightning.runs.sample_figures import sample_figures
from lvd_lightning.seeds import generator_for
from lvd_lightning.stopping import stop_if_requested
from lvd_lightning.teachers import load_teacher
from lvd_lightning.teachers.io import ARGUMENTS_FILE

__all__ = ["SPLITS", "evaluate_run", "is_evaluated", "lvd_gap", "mean_likelihood"]

SPLITS = ("train", "val", "test")
# Figures beside those of the models.
_BOUNDS = ("teacher_elbo", "lvd_objective")
# So many training images, drawn once, say where a circuit stands on them; validation and test images all count.
MAX_TRAIN_IMAGES = 1_000
# Test images, and draws of noise for each, that show how loose the bound of a flow is.
MAX_SLACK_IMAGES, SLACK_DRAWS = 32, 100
# Images per pass over all ranks; a circuit divides them further by itself.
_BATCH = 256


def evaluate_run(run: Run, data: Data, ranks: Ranks) -> dict[str, Any]:
    """The likelihoods of a run's models on all splits, in the data's unit, and the samples of the last one; all ranks
    have to call.

    Returns:
        "teacher": what the flow that was distilled reaches on the splits, and its "num_parameters"; "num_draws" of the
        noise behind bounds of flows;
        "circuits": {"train_<unit>", "val_<unit>", "test_<unit>"} of "teacher_elbo", "lvd_objective" and the model of
        every stage that left one, by its title ("distilled", "finetuned"), "gap": what `LVDGap` says of the test
        examples for these models, "num_train": the training examples that were counted, "num_parameters" and
        "num_heads" (values of a latent variable) of the last model; where data are pictures, what `sample_figures` says
        of it, and, if it learnt from samples, as "perception" what `Perception` says of "test images", of it and of the
        model before. What a run has not is absent; empty if no stage left a model.
    """
    circuits: dict[str, dict[str, float]] = {}
    gaps: dict[str, Any] = {}
    described: dict[str, Any] = {}
    assignments, unit, models = assignments_folder(run), data.unit.name, run.leaving("model")
    for number, stage in enumerate(models):
        circuit: Any = stage.model(ranks.device)
        name = stage.title
        # The bounds are those of the first model, which was trained on the latent values that they are about.
        teacher = _teacher_with_elbo(run, ranks) if number == 0 else None
        for split in SPLITS:
            if assignments is None:
                circuits.setdefault(name, {})[f"{split}_{unit}"] = mean_likelihood(circuit, data, split, ranks)
                continue
            found = lvd_gap(circuit, teacher, data, split, load_assignments(assignments, split), ranks)
            titles = {"log_prob": name}
            if number == 0:
                titles = {**{bound: bound for bound in _BOUNDS}, "log_prob": name}
            for key, title in titles.items():
                if key in found:
                    circuits.setdefault(title, {})[f"{split}_{unit}"] = found[key][unit]
            if split == "test":
                gaps[name] = {**found, **ranks.on_first(partial(_slack, teacher, data, ranks.device))}
        for split, value in _carried(circuit, data, ranks).items():
            circuits.setdefault(name, {})[f"{split}_{unit}_carried"] = value
        sizes = {"num_parameters": "num_parameters", "num_heads": "num_states", "num_draws": "num_draws"}
        described = {name: getattr(circuit, of) for name, of in sizes.items() if hasattr(circuit, of)}
        if stage == models[-1] and isinstance(data, VisibleData):
            described |= sample_figures(circuit, data, ranks, run.experiment.seed)
            described |= _perception(run, data, ranks)
    if not circuits:
        return {}
    gap = {"gap": gaps} if gaps else {}
    distilled = {"teacher": _flow_teacher(run, data, ranks)} if hasattr(circuit, "flow") else {}
    return {"circuits": circuits, **distilled, **gap, "num_train": len(_rows(data, "train")), **described}


def _flow_teacher(run: Run, data: Data, ranks: Ranks) -> dict[str, float]:
    """What the flow reaches that the run's model, a smaller one, was distilled from."""
    flow: Any = load_teacher(run.leaving("flow")[-1].folder).to(ranks.device)
    found = {f"{split}_{data.unit.name}": mean_likelihood(flow, data, split, ranks) for split in SPLITS}
    return {**found, "num_parameters": flow.num_parameters}


def _perception(run: Run, data: VisibleData, ranks: Ranks) -> dict[str, Any]:
    """The samples of a model that learnt from samples and of the one before it; all ranks have to call."""
    models = run.leaving("model")
    if not models[-1].kind.learns_from_samples:
        return {}
    teacher = _teacher(run, ranks)
    perception = Perception(data, teacher if hasattr(teacher, "activations") else None, ranks, run.experiment.seed)
    found = {"test images": perception.of_test()}
    for stage in models[-2:]:
        circuit: Any = stage.model(ranks.device)
        found[stage.title] = perception.of_samples(circuit)
    return {"perception": found}


@torch.inference_mode()
def _slack(teacher: Any | None, data: Data, device: torch.device) -> dict[str, dict[str, float]]:
    """How loose the bound of a flow is: on a few test examples the bound and the importance-weighted one, of the same
    draws of dequantisation noise; nothing for other teachers."""
    if teacher is None or not hasattr(teacher, "importance_weighted_bound"):
        return {}
    count = min(MAX_SLACK_IMAGES, data.num_examples("test"))
    images = data.batch("test", torch.linspace(0, data.num_examples("test") - 1, count).long()).to(device)
    found = {}
    for name, bound in (
        ("teacher_few_bound", teacher.log_prob_bound),
        ("teacher_few_importance", teacher.importance_weighted_bound),
    ):
        nats = float(bound(images, SLACK_DRAWS, generator_for("slack", device=device)).double().mean())
        in_unit = float(data.unit.from_nats(nats, data.num_dims))
        found[name] = {"nats": nats, data.unit.name: in_unit, "num_examples": count, "num_draws": SLACK_DRAWS}
    return found


def _carried(circuit: Any, data: Data, ranks: Ranks) -> dict[str, float]:
    """What a homogeneous hidden Markov model reaches with its state carried over all of a split, in the data's unit.

    Of validation and test; nothing for other models and for data that are no stream. Every rank does the same.
    """
    if not getattr(circuit, "homogeneous", False) or not hasattr(data, "stream"):
        return {}
    found = {}
    for split in ("val", "test"):
        tokens = torch.from_numpy(data.stream(split).astype("int64")).to(ranks.device)
        if len(tokens):
            found[split] = float(data.unit.from_nats(carried_log_prob(circuit.tables(), tokens), len(tokens)))
    return found


def is_evaluated(run: Run) -> bool:
    """Whether `evaluate_run` was done with the models that there are."""
    titles = {stage.title for stage in run.leaving("model")}
    found = run.evaluation()
    return bool(found) and {*found.get("circuits", {})} - {*_BOUNDS} == titles


@torch.inference_mode()
def lvd_gap(
    circuit: Any, teacher: Any | None, data: Data, split: str, z_NP: Tensor, ranks: Ranks
) -> dict[str, dict[str, float]]:
    """What `LVDGap` says of a circuit and its teacher on a split; all ranks have to call.

    teacher: something with `elbo(images)`, or None; z_NP: the latent values that the circuit was given.
    """
    metric = LVDGap(data.unit, data.num_dims, sync_on_compute=False)
    for rows in ranks.share(_rows(data, split)).split(max(1, _BATCH // ranks.world_size)):
        stop_if_requested()
        images = data.batch(split, rows).to(ranks.device)
        log_B, joint_B = circuit.log_prob_and_objective(images, z_NP[rows].to(ranks.device))
        elbo_B = None if teacher is None else teacher.elbo(images).cpu()
        metric.update(log_B.cpu(), joint_B.cpu(), elbo_B)
    for name in LVDGap.STATES:
        setattr(metric, name, ranks.sum(getattr(metric, name)))
    found: dict[str, dict[str, float]] = metric.compute()
    return found


@torch.inference_mode()
def mean_likelihood(circuit: Any, data: Data, split: str, ranks: Ranks) -> float:
    """The likelihood of a split under a circuit, in the data's unit, each rank doing its share; all have to call."""
    metric = MeanLikelihood(data.unit, data.num_dims, sync_on_compute=False)
    for rows in ranks.share(_rows(data, split)).split(max(1, _BATCH // ranks.world_size)):
        stop_if_requested()
        metric.update(circuit.log_prob(data.batch(split, rows).to(ranks.device)).cpu())
    metric.nats, metric.weight = ranks.sum(metric.nats), ranks.sum(metric.weight)
    return float(metric.compute())


def _teacher(run: Run, ranks: Ranks) -> Any | None:
    """The run's teacher, if it has one."""
    folder = run.artefact("features")
    if folder is None or not (folder / ARGUMENTS_FILE).is_file():  # other teachers leave nothing but features
        return None
    return load_teacher(folder).to(ranks.device)


def _teacher_with_elbo(run: Run, ranks: Ranks) -> Any | None:
    """The run's teacher, if it has one that bounds the likelihood of images."""
    teacher = _teacher(run, ranks)
    return teacher if hasattr(teacher, "elbo") else None


def _rows(data: Data, split: str) -> Tensor:
    count = data.num_examples(split)
    if split != "train" or count <= MAX_TRAIN_IMAGES:
        return torch.arange(count)
    generator = generator_for("evaluate", count)
    return torch.randperm(count, generator=generator)[:MAX_TRAIN_IMAGES].sort().values

"""The plan of an experiment: what each of its stages will take on so many ranks, without training any of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lvd_lightning.checks import check_counts
from lvd_lightning.context import StageContext
from lvd_lightning.planning import PlanRequest, StagePlan, StandInData
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.rates import Rates
from lvd_lightning.runs.run import read_figures

__all__ = ["ExperimentPlan", "PlanOfStage", "make_plan", "print_plan"]


@dataclass(frozen=True)
class PlanOfStage:
    """A stage's name, the name of its class, and its plan; None: nobody knows what it takes, and `why`."""

    name: str
    kind: str
    plan: StagePlan | None
    why: str = ""


@dataclass(frozen=True)
class ExperimentPlan:
    """stages: in order. counts: examples by split. published: whether nobody had to read them."""

    num_ranks: int
    stages: tuple[PlanOfStage, ...]
    counts: Mapping[str, int]
    published: bool


def make_plan(experiment: Experiment, num_ranks: int = 1) -> ExperimentPlan:
    """Plan every stage; nothing is trained, and nothing is written into the run's directory.

    Raises:
        ValueError: fewer ranks than one, more than a batch has examples, or a stage that cannot be planned.
        FileNotFoundError: data that have to be read to be counted are not there.
    """
    check_counts(ranks=num_ranks)
    found: list[PlanOfStage] = []
    left: dict[str, Any] = {}
    data_of = cache(_stand_in)
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        for stage in experiment.stages:
            data, _ = data_of(stage.data)
            if data.batch_size < num_ranks:
                raise ValueError(
                    f"--ranks: {num_ranks} ranks do not share batches of {data.batch_size} examples: raise "
                    "data.batch_size, which counts all ranks together"
                )
            request = _request(experiment, stage, data, Path(folder), num_ranks, dict(left))
            one = _plan_stage(stage, request)
            found.append(one)
            left |= dict.fromkeys(stage.kind.leaves)
            left |= {} if one.plan is None else dict(one.plan.leaves)
    data, published = data_of(experiment.data)
    return ExperimentPlan(num_ranks, tuple(found), data.counts, published)


def print_plan(
    experiment: Experiment, ranks: int = 1, rates: str | None = None, write_rates: str | None = None
) -> None:
    """Print the plan; with `write_rates` write what the finished stages of the run reached on so many ranks."""
    table = Rates() if rates is None else Rates.read(Path(rates))
    found = make_plan(experiment, ranks)
    print(_text(experiment.name, found, table))
    if write_rates is not None:
        seconds = [read_figures(experiment.run_dir / stage.name).get("seconds") for stage in found.stages]
        if not any(seconds):
            raise ValueError(f"--write_rates: no stage of {experiment.run_dir} is finished: run `fit` first")
        timed = [(stage.kind, stage.plan, taken) for stage, taken in zip(found.stages, seconds, strict=True)]
        Rates.measured(f"{experiment.run_dir}, {ranks} ranks", timed, ranks).write(Path(write_rates))
        print(f"rates of {experiment.run_dir}: {write_rates}")


def _stand_in(make: Callable[[], Any]) -> tuple[StandInData, bool]:
    """Data in shape alone, and whether that is the shape of published data, which nobody had to read."""
    data = make()
    known = data.published() if hasattr(data, "published") else None
    if known is not None:
        counts, parts = known
        return StandInData(data, parts, counts), True
    data.prepare_data()
    data.setup("fit")
    return StandInData(data, data.parts, {split: data.num_examples(split) for split in ("train", "val", "test")}), False


def _request(
    experiment: Experiment, stage: PlannedStage, data: StandInData, folder: Path, num_ranks: int, left: dict[str, Any]
) -> PlanRequest:
    trainer: Mapping[str, Any] = stage.config.get("trainer") or {}
    context = StageContext(folder, stage.name, experiment.seed, data, experiment.shared, experiment.earlier(stage.name))
    return PlanRequest(
        context,
        num_ranks,
        epochs=int(trainer.get("max_epochs") or 1),
        batch_size=data.batch_size,
        accumulate=int(trainer.get("accumulate_grad_batches") or 1),
        bytes_per_number=8 if str(trainer.get("precision")).startswith("64") else 4,
        callbacks=stage.callbacks(),
        left=left,
    )


def _plan_stage(stage: PlannedStage, request: PlanRequest) -> PlanOfStage:
    kind = stage.kind.__name__
    made = stage.model()
    if any(kind not in request.left for kind in made.needs):
        raise ValueError(f"stages.{stage.name}: needs {', '.join(made.needs)}, which no stage before it leaves")
    unsaid = [kind for kind in made.needs if request.left[kind] is None]
    if unsaid:
        return PlanOfStage(stage.name, kind, None, f"what {unsaid[0]} will be is unknown")
    try:
        plan = made.plan(request)
    except ValueError as error:
        raise ValueError(f"stages.{stage.name}: {error}") from error
    return PlanOfStage(stage.name, kind, plan, "" if plan is not None else f"a {kind} says nothing of what it takes")


def _text(name: str, found: ExperimentPlan, rates: Rates) -> str:
    """The plan for people: a table, then what the figures of each stage are made of."""
    counted = ", ".join(f"{count:,} {split}" for split, count in found.counts.items())
    where = "published, not read" if found.published else "counted"
    lines = [f"{name} on {found.num_ranks} ranks; examples: {counted} ({where}); rates: {rates.measured_on}", ""]
    head = ("stage", "parameters", "memory a rank", "epochs", "steps", "sent a step", "files", "hours")
    rows = [head, *(_row(stage, rates, found.num_ranks) for stage in found.stages)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))]
        lines.append("  ".join(cells).rstrip())
    lines.append("steps: of an epoch; sent: what a rank gives to all-reduces")
    for stage in found.stages:
        lines += ["", f"{stage.name} ({stage.kind})", *_details(stage)]
        sending = None if stage.plan is None else rates.sending_seconds(stage.plan, found.num_ranks)
        if sending:
            lines.append(f"  messages: {sending / 3600:.2f} h by themselves")
    return "\n".join(lines)


def _row(stage: PlanOfStage, rates: Rates, num_ranks: int) -> tuple[str, ...]:
    plan = stage.plan
    if plan is None:
        return (stage.name, *["unknown"] * 7)
    seconds = rates.seconds(stage.kind, plan, num_ranks)
    return (
        stage.name,
        "unknown" if plan.parameters is None else f"{plan.parameters:,}",
        _bytes(plan.total_memory),
        f"{plan.epochs}",
        f"{plan.steps_per_epoch:,}",
        _bytes(plan.sent_per_step),
        _bytes(sum(plan.files.values())),
        "unknown" if seconds is None else f"{seconds / 3600:.2f}",
    )


def _details(stage: PlanOfStage) -> list[str]:
    plan = stage.plan
    if plan is None:
        return [f"  {stage.why}"]
    lines = []
    for title, parts in (("memory", plan.memory), ("files", plan.files)):
        if parts:
            lines.append(f"  {title}: " + ", ".join(f"{what} {_bytes(size)}" for what, size in parts.items()))
    if plan.work:
        lines.append(f"  work: {plan.work:.3g} {plan.work_is}")
    return [*lines, *(f"  {note}" for note in plan.notes)]


def _bytes(count: int) -> str:
    """Bytes in the unit in which they have one to three digits before the point."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"

"""The report of a run: a table, pictures, summary.md for people and summary.json for scripts."""

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lvd_lightning.context import DONE_MARKER, ImageData
from lvd_lightning.files import write_atomically
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs.bookkeeping import protocol_note
from lvd_lightning.runs.evaluation import final_stage
from lvd_lightning.runs.experiment import EVALUATE, REPORT, Experiment
from lvd_lightning.runs.pictures import cluster_picture, curve_picture, gap_picture, inpainting_picture, sample_picture
from lvd_lightning.seeds import derive_seed

__all__ = ["print_table", "summarize", "table_rows", "worse_than_uniform", "write_report"]

Row = Mapping[str, Any]

_COLUMNS = ("model", "train bpd", "val bpd", "test bpd", "parameters", "seconds")
# What knows nothing about a byte needs for it.
UNIFORM_BPD = 8.0
_PICTURES = {
    "training.png": "Bits per dimension over time",
    "gap.png": "Teacher, LVD objective and student on the test images",
    "samples.png": "Samples",
    "inpainting.png": "Test images with one half missing: original, what is given, a sample of the rest, its mean",
    "clusters.png": "Training patches of clusters, one cluster a row, from the most to the least used",
}


def write_report(experiment: Experiment, data: ImageData, device: torch.device) -> None:
    """Write `report/` in the run directory, unless it is there, and print its table."""
    run_dir, stages = experiment.run_dir, [stage.name for stage in experiment.stages]
    folder = run_dir / REPORT
    folder.mkdir(exist_ok=True)
    evaluation = _figures(run_dir / EVALUATE)
    summary = summarize(run_dir, stages, data)
    rows = table_rows(run_dir, stages)
    if not (folder / "summary.json").is_file():
        _draw(experiment, summary, data, device)
        write_atomically(folder / "summary.md", _markdown(run_dir.name, rows, summary, evaluation, folder))
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
    print_table(run_dir.name, rows, protocol_note(data.lossy, data.region))
    worse = worse_than_uniform(rows)
    if worse:
        warnings.warn(worse, stacklevel=2)
    print(f"report: {folder}", flush=True)


def summarize(run_dir: Path, stages: Iterable[str], data: ImageData) -> dict[str, Any]:
    """What summary.json says; what a run has not is absent."""
    found = {stage: _figures(run_dir / stage) for stage in stages}
    evaluation = _figures(run_dir / EVALUATE)
    circuits = evaluation.get("circuits", {})
    final = circuits.get("finetuned", circuits.get("distilled", {}))
    test = {
        "bpd": final.get("test_bpd"),
        "distilled_bpd": circuits.get("distilled", {}).get("test_bpd"),
        "lvd_objective_bpd": circuits.get("lvd_objective", {}).get("test_bpd"),
        "teacher_elbo_bpd": circuits.get("teacher_elbo", {}).get("test_bpd"),
        "num_parameters": evaluation.get("num_parameters"),
        "num_heads": evaluation.get("num_heads"),
    }
    summary = {
        "stages": {stage: figures for stage, figures in found.items() if figures},
        "test": {key: value for key, value in test.items() if value is not None},
        "baseline": {
            name: {key: figures[key] for key in ("bpd", "num_parameters", "seconds") if key in figures}
            for name, figures in _baselines(run_dir).items()
        },
    }
    present = {key: value for key, value in summary.items() if value}
    return {**present, "protocol": {"color": data.color, "region": data.region, "lossy": data.lossy}}


def table_rows(run_dir: Path, stages: Sequence[str]) -> list[Row]:
    """One row per model: bits per dimension on each split, parameters, and the seconds that led to it.

    is_bound: whether its figures are bounds of a likelihood and not one.
    """
    evaluation = _figures(run_dir / EVALUATE)
    circuits = evaluation.get("circuits", {})
    rows: list[Row] = []
    seconds = {stage: _figures(run_dir / stage).get("seconds", 0.0) for stage in stages if stage != "baseline"}
    for key, title, last in (
        ("teacher_elbo", "teacher, ELBO", "teacher"),
        ("lvd_objective", "LVD objective, log p(x, z)", "prior"),
        ("distilled", "distilled circuit", "prior"),
        ("finetuned", "finetuned circuit", "finetune"),
    ):
        if key in circuits:
            figures = {split: circuits[key].get(f"{split}_bpd") for split in ("train", "val", "test")}
            until = list(seconds).index(last) + 1
            rows.append(
                {
                    "model": title,
                    **figures,
                    "is_bound": key in ("teacher_elbo", "lvd_objective"),
                    "parameters": None if key == "teacher_elbo" else evaluation.get("num_parameters"),
                    "seconds": sum(list(seconds.values())[:until]),
                }
            )
    titles = {"em": "baseline, EM", "anemone": "baseline, Anemone"}
    for name, figures in _baselines(run_dir).items():
        rows.append(
            {
                "model": titles.get(name, f"baseline, {name}"),
                "is_bound": False,
                "train": figures.get("train_bpd"),
                "val": figures.get("val_bpd"),
                "test": figures.get("bpd"),
                "parameters": figures.get("num_parameters"),
                "seconds": figures.get("seconds"),
            }
        )
    return rows


def print_table(name: str, rows: Sequence[Row], note: str) -> None:
    """The table on the terminal; nothing without rows."""
    if not rows:
        return
    table = Table(*_COLUMNS, title=name)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*_cells(row, note))
    Console().print(table)


def worse_than_uniform(rows: Sequence[Row]) -> str:
    """One line about models whose validation figure says that guessing every byte would do better; else empty."""
    known = [row for row in rows if row["val"] is not None and not row["is_bound"]]
    bad = [f"{row['model']} {row['val']:.4f}" for row in known if row["val"] > UNIFORM_BPD]
    if not bad:
        return ""
    return (
        f"validation bpd above {UNIFORM_BPD:g}, worse than a uniform distribution over bytes: {', '.join(bad)}; train "
        "for longer, on more images, or with another learning rate"
    )


def _cells(row: Row, note: str) -> list[str]:
    figures = ["" if row[split] is None else f"{row[split]:.4f}{note}" for split in ("train", "val", "test")]
    parameters = "" if row["parameters"] is None else f"{row['parameters']:,}"
    return [row["model"], *figures, parameters, "" if row["seconds"] is None else f"{row['seconds']:,.0f}"]


def _markdown(name: str, rows: Sequence[Row], summary: Row, evaluation: Row, folder: Path) -> str:
    protocol = summary["protocol"]
    note = protocol_note(protocol["lossy"], protocol["region"])
    lines = [f"# {name}", "", f"Bits per dimension of images in {protocol['color']}, {protocol['region']} image."]
    if protocol["lossy"]:
        lines.append("The colour transform is lossy: no figure here can be compared with one for RGB images.")
    if rows:
        lines += ["", f"| {' | '.join(_COLUMNS)} |", f"|{'---|' + '---:|' * (len(_COLUMNS) - 1)}"]
        lines += [f"| {' | '.join(_cells(row, note))} |" for row in rows]
    worse = worse_than_uniform(rows)
    if worse:
        lines += ["", f"**{worse[0].upper()}{worse[1:]}.**"]
    if "num_train" in evaluation:
        lines += [
            "",
            f"Train: over {evaluation['num_train']:,} training images. Seconds: of all stages up to the model.",
        ]
    if "gap" in evaluation:
        lines += ["", *_gap_table(evaluation["gap"], note)]
    if summary.get("stages"):
        lines += ["", "| stage | seconds | figures |", "|---|---:|---|"]
        for stage, figures in summary["stages"].items():
            others = ", ".join(
                f"{key} {_number(value, key, note)}" for key, value in figures.items() if key != "seconds"
            )
            lines.append(f"| {stage} | {figures.get('seconds', 0.0):,.0f} | {others} |")
    for file, title in _PICTURES.items():
        if (folder / file).is_file():
            lines += ["", f"## {title}", "", f"![{title}]({file})"]
    return "\n".join(lines) + "\n"


def gap_rows(gaps: Mapping[str, Row]) -> list[tuple[str, str, float, float]]:
    """Title, whose latents, nats per test image and bits per dimension, for the teacher and every circuit."""
    rows = []
    for name, found in gaps.items():
        if "teacher_elbo" in found:
            rows.append(("teacher, ELBO", "the teacher's codes", *found["teacher_elbo"].values()))
        given = "those given to the student"
        rows.append((f"{name}, LVD objective log p(x, z)", given, *found["lvd_objective"].values()))
        rows.append((f"{name}, student log p(x)", "all, summed out", *found["log_prob"].values()))
    return rows


def _gap_table(gaps: Mapping[str, Row], note: str) -> list[str]:
    lines = ["| test images | latents | nats per image | bpd |", "|---|---|---:|---:|"]
    return lines + [
        f"| {title} | {latents} | {nats:,.1f} | {bpd:.4f}{note} |" for title, latents, nats, bpd in gap_rows(gaps)
    ]


def _number(value: Any, key: str, note: str) -> str:
    text = f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    return text + (note if key.endswith("bpd") else "")


def _draw(experiment: Experiment, summary: Row, data: ImageData, device: torch.device) -> None:
    run_dir, folder, seed = experiment.run_dir, experiment.run_dir / REPORT, experiment.seed
    seconds = {stage: figures.get("seconds", 0.0) for stage, figures in summary.get("stages", {}).items()}
    curve_picture(folder / "training.png", run_dir, seconds, _baselines(run_dir), data)
    gaps = _figures(run_dir / EVALUATE).get("gap", {})
    if gaps:
        gap_picture(folder / "gap.png", [(title, bpd) for title, _, _, bpd in gap_rows(gaps)], data)
    assignments = assignments_folder(run_dir)
    if assignments is not None:
        generator = torch.Generator().manual_seed(derive_seed(seed, REPORT, "clusters"))
        patch_size = int(experiment.shared["patch_size"])
        cluster_picture(folder / "clusters.png", assignments, data, patch_size, generator)
    stage = final_stage(run_dir)
    if stage is not None:
        circuit = AssembledCircuit.load(run_dir / stage).to(device).eval()
        for file, draw in (("samples.png", sample_picture), ("inpainting.png", inpainting_picture)):
            draw(folder / file, circuit, data, torch.Generator(device).manual_seed(derive_seed(seed, REPORT, file)))


def _figures(folder: Path) -> dict[str, Any]:
    path = folder / DONE_MARKER
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _baselines(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "baseline" / "baseline.json"
    finished = (run_dir / "baseline" / DONE_MARKER).is_file()
    return dict(json.loads(path.read_text())) if finished and path.is_file() else {}

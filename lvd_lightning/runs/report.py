"""The report of a run: a table, pictures, summary.md for people and summary.json for scripts."""

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lvd_lightning.context import ImageData
from lvd_lightning.files import write_atomically
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.runs.bookkeeping import protocol_note
from lvd_lightning.runs.data_record import left_out
from lvd_lightning.runs.pictures import cluster_picture, curve_picture, gap_picture, inpainting_picture, sample_picture
from lvd_lightning.runs.run import Run
from lvd_lightning.runs.settings import REPORT
from lvd_lightning.seeds import derive_seed

__all__ = ["is_written", "print_table", "summarize", "table_rows", "worse_than_uniform", "write_report"]

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


def write_report(run: Run, data: ImageData, device: torch.device) -> None:
    """Write `report/` in the run directory, unless it is there with the stages that are finished; print its table."""
    folder = run.dir / REPORT
    folder.mkdir(exist_ok=True)
    summary, rows = summarize(run, data), table_rows(run)
    if not is_written(run):
        _draw(run, data, device)
        write_atomically(folder / "summary.md", _markdown(run.dir.name, rows, summary, run.evaluation(), folder))
        write_atomically(folder / "summary.json", json.dumps(summary, indent=2))
    print_table(run.dir.name, rows, protocol_note(data.lossy, data.region))
    worse = worse_than_uniform(rows)
    if worse:
        warnings.warn(worse, stacklevel=2)
    print(f"report: {folder}", flush=True)


def is_written(run: Run) -> bool:
    """Whether the report is there, of all stages that are finished."""
    path = run.dir / REPORT / "summary.json"
    return path.is_file() and list(json.loads(path.read_text()).get("stages", {})) == list(run.stage_figures())


def summarize(run: Run, data: ImageData) -> dict[str, Any]:
    """What summary.json says; what a run has not is absent."""
    evaluation = run.evaluation()
    circuits = evaluation.get("circuits", {})
    titles = [stage.title for stage in run.leaving("model")]
    test = {
        "bpd": circuits.get(titles[-1], {}).get("test_bpd") if titles else None,
        **{f"{title}_bpd": circuits.get(title, {}).get("test_bpd") for title in titles[:-1] or titles},
        "lvd_objective_bpd": circuits.get("lvd_objective", {}).get("test_bpd"),
        "teacher_elbo_bpd": circuits.get("teacher_elbo", {}).get("test_bpd"),
        "num_parameters": evaluation.get("num_parameters"),
        "num_heads": evaluation.get("num_heads"),
    }
    summary = {
        "stages": run.stage_figures(),
        "test": {key: value for key, value in test.items() if value is not None},
        "baseline": {
            name: {key: figures[key] for key in ("bpd", "num_parameters", "seconds") if key in figures}
            for name, figures in run.baselines().items()
        },
    }
    summary["left_out"] = left_out(run.dir, [stage.name for stage in run.stages])
    present = {key: value for key, value in summary.items() if value}
    return {**present, "protocol": {"color": data.color, "region": data.region, "lossy": data.lossy}}


def table_rows(run: Run) -> list[Row]:
    """One row per model: bits per dimension on each split, parameters, and the seconds that led to it.

    is_bound: whether its figures are bounds of a likelihood and not one.
    """
    evaluation = run.evaluation()
    circuits = evaluation.get("circuits", {})
    rows: list[Row] = []
    teachers, models = run.leaving("features")[-1:], run.leaving("model")
    seconds = {stage.name: stage.figures().get("seconds", 0.0) for stage in run.stages if stage.kind.leaves}
    for key, title, last in (
        *(("teacher_elbo", "teacher, ELBO", stage) for stage in teachers),
        *(("lvd_objective", "LVD objective, log p(x, z)", stage) for stage in models[:1]),
        *((stage.title, f"{stage.title} circuit", stage) for stage in models),
    ):
        if key in circuits:
            figures = {split: circuits[key].get(f"{split}_bpd") for split in ("train", "val", "test")}
            until = list(seconds).index(last.name) + 1
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
    for name, figures in run.baselines().items():
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
    if "left_out" in summary:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in summary["left_out"].items())
        lines += ["", f"Of the data were left out: {listed}."]
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


def _draw(run: Run, data: ImageData, device: torch.device) -> None:
    """The curves of all stages, and those pictures that are not there: they show the models, which stay as they are."""
    folder, seed = run.dir / REPORT, run.experiment.seed
    curve_picture(folder / "training.png", [stage for stage in run.stages if stage.is_finished], data)
    gaps = run.evaluation().get("gap", {})
    if gaps:
        gap_picture(folder / "gap.png", [(title, bpd) for title, _, _, bpd in gap_rows(gaps)], data)
    assignments = assignments_folder(run)
    if assignments is not None and not (folder / "clusters.png").is_file():
        generator = torch.Generator().manual_seed(derive_seed(seed, REPORT, "clusters"))
        patch_size = int(run.experiment.shared["patch_size"])
        cluster_picture(folder / "clusters.png", assignments, data, patch_size, generator)
    for file, draw in (("samples.png", sample_picture), ("inpainting.png", inpainting_picture)):
        if run.leaving("model") and not (folder / file).is_file():
            generator = torch.Generator(device).manual_seed(derive_seed(seed, REPORT, file))
            circuit: Any = run.model(device)
            draw(folder / file, circuit, data, generator)

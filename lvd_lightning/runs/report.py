"""The report of a run: a table, pictures, summary.md for people and summary.json for scripts."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lvd_lightning.context import Data, VisibleData
from lvd_lightning.files import read_json, write_atomically, write_json
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.runs.data_record import left_out
from lvd_lightning.runs.page import write_page
from lvd_lightning.runs.perception import perception_table
from lvd_lightning.runs.pictures import cluster_picture, curve_picture, gap_picture, inpainting_picture, sample_picture
from lvd_lightning.runs.progress import Noted
from lvd_lightning.runs.run import Run
from lvd_lightning.runs.settings import REPORT
from lvd_lightning.seeds import generator_for
from lvd_lightning.units import Unit

__all__ = [
    "is_written",
    "plain_table",
    "print_table",
    "summarize",
    "table_rows",
    "worse_than_uniform",
    "write_report",
    "write_report_page",
]

Row = Mapping[str, Any]

_SPLITS = ("train", "val", "test")
_SAMPLES = ("samples", "redrawn", "completions", "perception")
_PICTURES = {
    "training.png": "Likelihood over time",
    "gap.png": "Teacher, LVD objective and student on the test images",
    "samples.png": "Samples",
    "inpainting.png": "Test images with one half missing: original, what is given, a sample of the rest, its mean",
    "clusters.png": "Training patches of clusters, one cluster a row, from the most to the least used",
}


def write_report(run: Run, data: Data, device: torch.device) -> None:
    """Write `report/` in the run directory, unless it is there with the stages that are finished; print its table."""
    folder = run.dir / REPORT
    folder.mkdir(exist_ok=True)
    summary, rows = summarize(run, data), table_rows(run, data.unit)
    if not is_written(run):
        _draw(run, data, device)
        write_atomically(folder / "summary.md", _markdown(run, rows, summary, data))
        write_report_page(run, data)
        write_json(folder / "summary.json", summary, indent=2)
    print_table(run.dir.name, rows, data)
    worse = worse_than_uniform(rows, data.unit)
    if worse:
        warnings.warn(worse, stacklevel=2)
    print(f"report: {folder}", flush=True)


def write_report_page(run: Run, data: Data) -> Path:
    """Write `report/index.html`, the report for a browser, from what the run and its report hold; the file."""
    facts = ", ".join(f"{key} {value}" for key, value in data.facts.items() if value is not False)
    title = f"{data.unit.title[0].upper()}{data.unit.title[1:]}{f' ({facts})' if facts else ''}."
    rows = [_cells(row, data) for row in table_rows(run, data.unit)]
    return write_page(run, run.dir / REPORT, title, data.unit.name, _columns(data.unit), rows, _PICTURES)


def is_written(run: Run) -> bool:
    """Whether the report is there, of all stages that are finished."""
    path = run.dir / REPORT / "summary.json"
    return path.is_file() and list(read_json(path).get("stages", {})) == list(run.stage_figures())


def summarize(run: Run, data: Data) -> dict[str, Any]:
    """What summary.json says; what a run has not is absent."""
    evaluation, unit = run.evaluation(), data.unit.name
    circuits = evaluation.get("circuits", {})
    titles = [stage.title for stage in run.leaving("model")]
    test = {
        unit: circuits.get(titles[-1], {}).get(f"test_{unit}") if titles else None,
        **{f"{title}_{unit}": circuits.get(title, {}).get(f"test_{unit}") for title in titles[:-1] or titles},
        f"lvd_objective_{unit}": circuits.get("lvd_objective", {}).get(f"test_{unit}"),
        f"teacher_elbo_{unit}": circuits.get("teacher_elbo", {}).get(f"test_{unit}"),
        f"{unit}_carried": circuits.get(titles[-1], {}).get(f"test_{unit}_carried") if titles else None,
        "num_parameters": evaluation.get("num_parameters"),
        "num_heads": evaluation.get("num_heads"),
        "num_draws": evaluation.get("num_draws"),
    }
    teacher = evaluation.get("teacher", {})
    summary: dict[str, Any] = {
        "stages": run.stage_figures(),
        "teacher": {unit: teacher[f"test_{unit}"], "num_parameters": teacher["num_parameters"]} if teacher else {},
        "test": {key: value for key, value in test.items() if value is not None},
        "baseline": {
            name: {key: figures[key] for key in (unit, "num_parameters", "seconds") if key in figures}
            for name, figures in run.baselines().items()
        },
        "reference": {
            name: {key: figures[key] for key in (unit, f"val_{unit}", "num_parameters", "seconds") if key in figures}
            for name, figures in run.references().items()
        },
        **{name: evaluation[name] for name in _SAMPLES if name in evaluation},
        "protocol": dict(data.facts),
    }
    summary["left_out"] = left_out(run.dir, [stage.name for stage in run.stages])
    return {key: value for key, value in summary.items() if value}


def table_rows(run: Run, unit: Unit) -> list[Row]:
    """One row per model: its likelihood on each split, parameters, and the seconds that led to it.

    is_bound: whether its figures are bounds of a likelihood and not one.
    """
    evaluation = run.evaluation()
    circuits = evaluation.get("circuits", {})
    rows: list[Row] = []
    teachers, models = run.leaving("features")[-1:], run.leaving("model")
    seconds = {stage.name: stage.figures().get("seconds", 0.0) for stage in run.stages if stage.kind.leaves}
    if "teacher" in evaluation:
        flow = evaluation["teacher"]
        rows.append(
            {
                "model": "teacher flow",
                **{split: flow[f"{split}_{unit.name}"] for split in _SPLITS},
                "is_bound": False,
                "parameters": flow["num_parameters"],
                "seconds": seconds[run.leaving("flow")[-1].name],
            }
        )
    for key, title, last in (
        *(("teacher_elbo", "teacher, ELBO", stage) for stage in teachers),
        *(("lvd_objective", "LVD objective, log p(x, z)", stage) for stage in models[:1]),
        *((stage.title, f"{stage.title} {stage.kind.model_noun}", stage) for stage in models),
    ):
        if key in circuits:
            figures = {split: circuits[key].get(f"{split}_{unit.name}") for split in _SPLITS}
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
    titles = {
        "em": "baseline, EM",
        "anemone": "baseline, Anemone",
        "random_em": "random beginning, EM",
        "random_anemone": "random beginning, Anemone",
    }
    titles |= {name: f"reference, {name.replace('_', ' ')}" for name in run.references()}
    for name, figures in [*run.baselines().items(), *run.references().items()]:
        rows.append(
            {
                "model": titles.get(name, f"baseline, {name}"),
                "is_bound": False,
                "train": figures.get(f"train_{unit.name}"),
                "val": figures.get(f"val_{unit.name}"),
                "test": figures.get(unit.name),
                "parameters": figures.get("num_parameters"),
                "seconds": figures.get("seconds"),
            }
        )
    return rows


def print_table(name: str, rows: Sequence[Row], data: Data) -> None:
    """The table on the terminal; nothing without rows."""
    if not rows:
        return
    table = Table(*_columns(data.unit), title=name)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*_cells(row, data))
    Console().print(table)


def worse_than_uniform(rows: Sequence[Row], unit: Unit) -> str:
    """One line about models whose validation figure says that guessing would do better; else empty."""
    known = [row for row in rows if row["val"] is not None and not row["is_bound"]]
    bad = [f"{row['model']} {row['val']:.4f}" for row in known if unit.is_worse_than_uniform(row["val"])]
    if not bad:
        return ""
    side = "above" if unit.lower_is_better else "below"
    return (
        f"validation {unit.name} {side} {unit.uniform:g}, worse than a uniform distribution: {', '.join(bad)}; train "
        "for longer, on more examples, or with another learning rate"
    )


def plain_table(run: Run, data: Data) -> tuple[list[str], list[list[Any]]]:
    """The table as columns and rows of numbers; None for what is not known."""
    keys = ["model", *_SPLITS, "parameters", "seconds"]
    return _columns(data.unit), [[row[key] for key in keys] for row in table_rows(run, data.unit)]


def _columns(unit: Unit) -> list[str]:
    return ["model", *(f"{split} {unit.label}" for split in _SPLITS), "parameters", "seconds"]


def _cells(row: Row, data: Data) -> list[str]:
    note = _note(data)
    figures = ["" if row[split] is None else f"{row[split]:.4f}{note}" for split in _SPLITS]
    parameters = "" if row["parameters"] is None else f"{row['parameters']:,}"
    return [row["model"], *figures, parameters, "" if row["seconds"] is None else f"{row['seconds']:,.0f}"]


def _note(data: Data) -> str:
    """What stands beside every likelihood."""
    return Noted(data.unit.name, data.protocol).beside(data.unit.name)


def _markdown(run: Run, rows: Sequence[Row], summary: Row, data: Data) -> str:
    unit, columns, folder = data.unit, _columns(data.unit), run.dir / REPORT
    facts = ", ".join(f"{key} {value}" for key, value in data.facts.items() if value is not False)
    lines = [f"# {run.dir.name}", "", f"{unit.title[0].upper()}{unit.title[1:]}{f' ({facts})' if facts else ''}."]
    if data.facts.get("lossy"):
        lines.append("The colour transform is lossy: no figure here can be compared with one for RGB images.")
    if rows:
        lines += ["", f"| {' | '.join(columns)} |", f"|{'---|' + '---:|' * (len(columns) - 1)}"]
        lines += [f"| {' | '.join(_cells(row, data))} |" for row in rows]
    if "left_out" in summary:
        listed = ", ".join(f"{count:,} {reason}" for reason, count in summary["left_out"].items())
        lines += ["", f"Of the data were left out: {listed}."]
    worse = worse_than_uniform(rows, unit)
    if worse:
        lines += ["", f"**{worse[0].upper()}{worse[1:]}.**"]
    evaluation = run.evaluation()
    carried = evaluation.get("circuits", {}).get(run.leaving("model")[-1].title, {}) if run.leaving("model") else {}
    if f"test_{unit.name}_carried" in carried:
        lines += [
            "",
            f"{unit.title[0].upper()}{unit.title[1:]} is told per window above: the first words of a window have no "
            "context. With the state carried over the whole text, which is another protocol and not to be compared "
            f"with it: {carried[f'val_{unit.name}_carried']:.4f} on validation, "
            f"{carried[f'test_{unit.name}_carried']:.4f} on test.",
        ]
    if "num_train" in evaluation:
        lines += [
            "",
            f"Train: over {evaluation['num_train']:,} training examples. Seconds: of all stages up to the model.",
        ]
    if "num_draws" in evaluation:
        lines += [
            "",
            f"Figures of flows are bounds, with draws of dequantisation noise: {evaluation['num_draws']} each.",
        ]
    if "gap" in evaluation:
        lines += ["", *_gap_table(evaluation["gap"], data)]
    if "samples" in evaluation:
        lines += ["", *_sample_table(evaluation)]
    if "perception" in evaluation:
        lines += ["", *perception_table(evaluation["perception"])]
    if summary.get("stages"):
        noted = Noted(unit.name, data.protocol)
        lines += ["", "| stage | seconds | figures |", "|---|---:|---|"]
        for stage, figures in summary["stages"].items():
            others = ", ".join(
                f"{key} {_number(value)}{noted.beside(key)}" for key, value in figures.items() if key != "seconds"
            )
            lines.append(f"| {stage} | {figures.get('seconds', 0.0):,.0f} | {others} |")
    for file, title in _PICTURES.items():
        if (folder / file).is_file():
            lines += ["", f"## {title}", "", f"![{title}]({file})"]
    return "\n".join(lines) + "\n"


def gap_rows(gaps: Mapping[str, Row], unit: Unit) -> list[tuple[str, str, float, float]]:
    """Title, whose latents, nats per test example and the unit's figure, for the teacher and every circuit."""
    rows = []
    for name, found in gaps.items():
        figures = {key: (values["nats"], values[unit.name]) for key, values in found.items()}
        if "teacher_elbo" in figures:
            latents = "the noise" if "teacher_few_bound" in figures else "the teacher's codes"
            rows.append(("teacher, ELBO", latents, *figures["teacher_elbo"]))
        for key, title in (("teacher_few_bound", "ELBO"), ("teacher_few_importance", "importance-weighted")):
            if key in figures:
                few = f"{found[key]['num_examples']} examples, {found[key]['num_draws']} draws"
                rows.append((f"teacher, {title}, {few}", "the noise", *figures[key]))
        given = "those given to the student"
        rows.append((f"{name}, LVD objective log p(x, z)", given, *figures["lvd_objective"]))
        rows.append((f"{name}, student log p(x)", "all, summed out", *figures["log_prob"]))
    return rows


def _gap_table(gaps: Mapping[str, Row], data: Data) -> list[str]:
    note = _note(data)
    lines = [f"| test examples | latents | nats per example | {data.unit.label} |", "|---|---|---:|---:|"]
    return lines + [
        f"| {title} | {latents} | {nats:,.1f} | {value:.4f}{note} |"
        for title, latents, nats, value in gap_rows(gaps, data.unit)
    ]


def _sample_table(evaluation: Row) -> list[str]:
    """What `sample_figures` found, with what it means."""
    samples, completions = evaluation["samples"], evaluation.get("completions", {})
    title = f"Of {evaluation['num_samples']:,} samples, beside the same of test images. "
    if completions:
        title = (
            f"Of {evaluation['num_samples']:,} samples, and of {evaluation['num_completions']:,} test images of which "
            "one half was drawn given the other (pixels that were drawn), beside the same of those test images. Drawn "
            "anew: all pixels given the latent values of test images, so that the prior has no part in it. "
        )
    lines = [
        f"{title}Isolated "
        "pixels differ from each neighbour by more than 60 of 256 levels of a channel. Border step: how much more the "
        "luma changes from pixel to pixel across the borders of patches than inside of them, where it changes by the "
        "inside step, in levels.",
        "",
        "| | isolated pixels | border step | inside step | pixels of no colour |",
        "|---|---:|---:|---:|---:|",
    ]
    for title, figures, ending in (
        ("samples", samples, ""),
        ("test images", samples, "_test"),
        ("test images, drawn anew", evaluation.get("redrawn", {}), ""),
        ("completions", completions, ""),
        ("test images, the same halves", completions, "_test"),
    ):
        if not figures:
            continue
        found = [
            f"{figures[name + ending] * scale:.2f}{sign}" if name + ending in figures else ""
            for name, scale, sign in (
                *(("isolated_pixels", 100, " %"), ("border_step", 1, "")),
                *(("inside_step", 1, ""), ("no_color", 100, " %")),
            )
        ]
        lines.append(f"| {title} | {' | '.join(found)} |")
    return lines


def _number(value: Any) -> str:
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _draw(run: Run, data: Data, device: torch.device) -> None:
    """The curves of all stages, and those pictures that are not there: they show the models, which stay as they are."""
    folder, seed = run.dir / REPORT, run.experiment.seed
    curve_picture(folder / "training.png", [stage for stage in run.stages if stage.is_finished], data)
    gaps = run.evaluation().get("gap", {})
    if gaps:
        gap_picture(folder / "gap.png", [(title, value) for title, _, _, value in gap_rows(gaps, data.unit)], data)
    if not isinstance(data, VisibleData):
        return
    assignments = assignments_folder(run)
    if assignments is not None and not (folder / "clusters.png").is_file():
        generator = generator_for(seed, REPORT, "clusters")
        cluster_picture(folder / "clusters.png", assignments, data, generator)
    for file, draw in (("samples.png", sample_picture), ("inpainting.png", inpainting_picture)):
        if run.leaving("model") and not (folder / file).is_file():
            generator = generator_for(seed, REPORT, file, device=device)
            circuit: Any = run.model(device)
            if file == "inpainting.png" and not hasattr(circuit, "inpaint"):
                continue
            draw(folder / file, circuit, data, generator)

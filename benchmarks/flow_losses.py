"""What each loss of distillation is worth: one teacher, then the small flow without it and with every loss, per seed.

    OMP_NUM_THREADS=1 python benchmarks/flow_losses.py runs/losses --config flow_tabular --seeds 0 1
    OMP_NUM_THREADS=1 python benchmarks/flow_losses.py runs/losses --config flow_tabular --data.table diabetes

Words that it does not know go to `train.py fit`. All flows of one seed have the same teacher and see the same batches.
Started again it goes on. It prints a table in Markdown; figures are those of the test split. Of images there is the
Frechet distance of samples from test images as well, in mean activations of the teacher's last coupling (it is no FID).
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

from lvd_lightning import Run
from lvd_lightning.cli import main as command
from lvd_lightning.files import read_json
from lvd_lightning.runs.frechet import frechet_distance
from lvd_lightning.seeds import generator_for
from lvd_lightning.teachers import ImageFlow, load_teacher

WEIGHTS = ("nll", "latent", "intermediate", "synthesis")
# Weights in the order above, and further settings of the student.
VARIANTS: dict[str, tuple[tuple[float, float, float, float], tuple[str, ...]]] = {
    "latent": ((0.9, 0.1, 0, 0), ()),
    "latent, weak": ((0.99, 0.01, 0, 0), ()),
    "latent, own permutations": ((0.9, 0.1, 0, 0), ("inherit_permutations=false",)),
    "intermediate": ((0.9, 0, 0.1, 0), ()),
    "synthesis, L1": ((0.9, 0, 0, 0.1), ("synthesis_examples=32",)),
    "synthesis, features": ((0.9, 0, 0, 0.1), ("synthesis_examples=32", "synthesis_distance=features")),
    "all, as published for tables": ((0.85, 0, 0.05, 0.1), ("synthesis_examples=32",)),
    "permutations alone": ((1, 0, 0, 0), ()),
    "permutations and weights": ((1, 0, 0, 0), ("inherit_weights=true", "hidden_size=null")),
    "latent, permutations and weights": ((0.9, 0.1, 0, 0), ("inherit_weights=true", "hidden_size=null")),
}


def fit(folder: Path, name: str, words: list[str]) -> dict[str, Any]:
    """The summary of a run, which is made or finished first."""
    if command(["fit", *words, f"--run_dir={folder}", f"--name={name}"]):
        raise SystemExit(f"the run {folder / name} failed")
    summary: dict[str, Any] = read_json(folder / name / "report" / "summary.json")
    return summary


def row(title: str, figures: dict[str, Any], stage: dict[str, Any], unit: str, distance: str) -> list[str]:
    speeds = [f"{stage[f'{what}_per_second']:,.0f}" for what in ("densities", "samples")]
    sizes = [f"{figures['num_parameters']:,.0f}", f"{stage['seconds']:,.0f}"]
    return [title, f"{figures[unit]:.4f}", *sizes, *speeds, distance]


@torch.no_grad()
def frechet(teacher: Path, folder: Path) -> str:
    """How far samples of the flow in a folder are from test images; nothing for tables."""
    seeing, flow = load_teacher(teacher), load_teacher(folder)
    if not isinstance(seeing, ImageFlow) or not isinstance(flow, ImageFlow):
        return ""
    data = Run.open(teacher.parent).data()
    images = data.batch("test", torch.arange(data.num_examples("test")))
    drawn = flow.sample(len(images), generator=generator_for("frechet"))
    highest = torch.tensor(data.parts.num_categories)[:, None, None] - 1
    seen = [seeing.activations(2 * part / highest - 1)[-2].mean(1) for part in (images, drawn)]
    return f"{frechet_distance(*seen):.3f}"


def measured(folder: Path, seed: int, words: list[str], variants: list[str]) -> list[list[str]]:
    """A row for every flow: title, figure, parameters, seconds, densities and samples per second, distance."""
    rows: list[list[str]] = []
    for variant in variants:
        weights, settings = VARIANTS[variant]
        name = f"{variant.replace(', ', '-').replace(' ', '_')}_{seed}"
        first = variant == variants[0]
        teacher = folder / f"{variants[0].replace(', ', '-').replace(' ', '_')}_{seed}" / "teacher"
        if not first and not (folder / name / "teacher").is_dir():
            shutil.copytree(teacher, folder / name / "teacher")
        student = [f"{loss}_weight={weight}" for loss, weight in zip(WEIGHTS, weights, strict=True)]
        arguments = [*words, f"--seed={seed}", *(f"--stages.student.model.{word}" for word in (*student, *settings))]
        if not first:
            kept = [word for word in arguments if not word.startswith("--stages.baseline.")]
            arguments = [*kept, "--stages.baseline=null"]
        summary = fit(folder, name, arguments)
        stages = summary["stages"]
        unit = next(unit for unit in ("bpd", "nats") if unit in summary["test"])
        if first:
            rows.append(row("teacher", summary["teacher"], stages["teacher"], unit, frechet(teacher, teacher)))
            undistilled, small = summary["baseline"]["undistilled"], folder / name / "baseline" / "undistilled"
            rows.append(row("undistilled", undistilled, stages["baseline"], unit, frechet(teacher, small)))
        distance = frechet(teacher, folder / name / "student")
        rows.append(row(variant, summary["test"], stages["student"], unit, distance))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    known, words = parser.parse_known_args()
    tables = {seed: measured(known.folder, seed, words, known.variants) for seed in known.seeds}
    print("| flow | seed | test | parameters | seconds | densities/s | samples/s | distance |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for rows in zip(*tables.values(), strict=True):
        for seed, (title, *cells) in zip(tables, rows, strict=True):
            print(f"| {title} | {seed} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

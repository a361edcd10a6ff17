"""What each loss on samples does to a finetuned circuit: likelihood, contrast, borders, distance for a teacher.

    python benchmarks/perceptual.py --config digits --seeds 0 1            # an hour on one core
    python benchmarks/perceptual.py --config folder --data PICTURES --quick # does it run
    python benchmarks/perceptual.py --config digits --picture docs/perceptual.png

One experiment for every seed is finetuned once, with a masked autoencoder as teacher, which has no part in it. Then a
copy of its run directory goes through stage `perceptual` for every loss and weight, and is evaluated on the test images
and on 5,000 samples. What is there is not done again. The first row is the finetuned circuit, the second the stage with
the likelihood alone, which the others have to be compared with: it trains as long as they do.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml
from PIL import Image
from torch import Tensor

from lvd_lightning import Run
from lvd_lightning.cli import main as train

#: By the names of rows: weights and, for some, other settings.
SETTINGS: dict[str, dict[str, Any]] = {
    "likelihood alone": {},
    **{f"mmd {weight}": {"mmd": float(weight)} for weight in (10, 100)},
    **{f"feature_mmd {weight}": {"feature_mmd": float(weight)} for weight in (10, 100)},
    **{f"adversarial {weight}": {"adversarial": weight} for weight in (0.1, 1.0)},
    **{f"autoencode {weight}": {"autoencode": float(weight)} for weight in (1, 10)},
    **{f"feature_distance {weight}": {"feature_distance": float(weight)} for weight in (1, 10)},
}
#: Of Adam in all rows: with the stage's own, a third of it, 70 steps on the digits change next to nothing.
STEPS = {"lr": 0.01, "final_lr": 0.001}
TEACHER = {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "decoder_hidden_size": 32, "num_pictures": 0}
COLUMNS = ("bpd", "std", "saturation", "step_distance", "border_step", "isolated_pixels", "frechet")


def overlay(folder: Path, settings: dict[str, Any] | None, epochs: int) -> Path:
    """A file that adds the teacher behind all other stages and, with settings, stage `perceptual`."""
    mae = {"class_path": "lvd_lightning.stages.MAETeacher", "init_args": TEACHER}
    stages: dict[str, Any] = {"baseline": None, "eyes": {"model": mae, "trainer": {"max_epochs": 20}}}
    if settings is not None:
        student = {"class_path": "lvd_lightning.stages.PerceptualStudent", "init_args": {**STEPS, **settings}}
        stages["perceptual"] = {"model": student, "trainer": {"max_epochs": epochs}}
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    return path


def fit(options: argparse.Namespace, name: str, seed: int, settings: dict[str, Any] | None) -> Path:
    """Train and evaluate a run unless it is there; its folder."""
    folder = Path(options.run_dir) / f"{options.config}_{name.replace(' ', '_')}_{seed}"
    base = Path(options.run_dir) / f"{options.config}_base_{seed}"
    if (folder / "report" / "summary.json").is_file():
        return folder
    if settings is not None and not folder.is_dir():
        shutil.copytree(base, folder)
    extra = ["--data.max_examples=200", "--stages.eyes.trainer.max_epochs=1"] if options.quick else []
    extra += [f"--data.path={options.data}"] if options.data else []
    path = overlay(folder.with_name(f"{folder.name}.overlays"), settings, 1 if options.quick else options.epochs)
    arguments = [f"--config={options.config}", f"--config={path}", f"--name={folder.name}", f"--seed={seed}"]
    code = train(["fit", *arguments, f"--run_dir={options.run_dir}", *extra, *options.arguments])
    if code:
        raise SystemExit(code)
    return folder


def figures(folder: Path, title: str) -> dict[str, float]:
    """What the evaluation says of a model."""
    found = json.loads((folder / "evaluate" / "done.json").read_text())
    bpd = found["circuits"][title]["test_bpd"] if title in found["circuits"] else float("nan")
    return {"bpd": bpd, **found["perception"][title]}


def told(values: list[dict[str, float]], column: str) -> str:
    """The figures of all seeds, side by side."""
    scale, digits = {"isolated_pixels": (100, 2), "std": (1, 1), "frechet": (1, 4), "bpd": (1, 4)}.get(column, (1, 3))
    shown = [f"{value[column] * scale:.{digits}f}" if column in value else "" for value in values]
    if column == "frechet" and "frechet_low" in values[0]:
        half = [(value["frechet_high"] - value["frechet_low"]) / 2 for value in values]
        shown = [f"{text} ± {width:.4f}" for text, width in zip(shown, half, strict=True)]
    return ", ".join(shown)


def sheet(rows: list[Tensor]) -> Image.Image:
    """Images uint8 (N, 3, H, W) of every row side by side, each four times as large."""
    lines = [row.permute(2, 0, 3, 1).flatten(1, 2) for row in rows]
    pixels = torch.cat([line for row in lines for line in (row, torch.full_like(row[:1], 255))])
    picture = Image.fromarray(pixels.numpy())
    return picture.resize((4 * picture.width, 4 * picture.height), Image.Resampling.NEAREST)


def draw(folders: dict[str, Path], path: Path) -> None:
    """Test images, samples of the finetuned circuit, then of every row, from the same noise."""
    first = Run.open(next(iter(folders.values())))
    data = first.data()
    rows = [data.to_rgb(data.batch("test", torch.arange(24)))]
    models = {"finetuned": first.stage("finetune").model(), **{n: Run.open(f).model() for n, f in folders.items()}}
    for model in models.values():
        rows.append(data.to_rgb(model.sample(24, generator=torch.Generator().manual_seed(0))))  # type: ignore[operator]
    sheet(rows).save(path)
    print(f"\n{path}: from above: test images, {', '.join(models)}")


def main() -> None:
    """Train what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="digits", help="an experiment without a stage `eyes` or `perceptual`")
    parser.add_argument("--data", help="where its data are")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=6, help="of stage `perceptual`")
    parser.add_argument("--run-dir", default="runs/perceptual")
    parser.add_argument("--rows", nargs="+", default=list(SETTINGS), help="some of the rows")
    parser.add_argument("--picture", type=Path, help="where samples of the first seed go, side by side")
    parser.add_argument("--quick", action="store_true", help="few images, one epoch: does it run")
    options, options.arguments = parser.parse_known_args()
    folders: dict[str, list[Path]] = {}
    for seed in options.seeds:
        fit(options, "base", seed, None)
        for name in options.rows:
            folders.setdefault(name, []).append(fit(options, name, seed, SETTINGS[name]))
    print(f"\n| | {' | '.join(COLUMNS)} |\n|---|{'---:|' * len(COLUMNS)}")
    some = next(iter(folders.values()))
    rows = {"test images": ("test images", some), "finetuned": ("finetuned", some)}
    rows |= {name: ("perceptual", found) for name, found in folders.items()}
    for name, (title, found) in rows.items():
        values = [figures(folder, title) for folder in found]
        print(f"| {name} | {' | '.join(told(values, column) for column in COLUMNS)} |")
    if options.picture:
        draw({name: found[0] for name, found in folders.items()}, options.picture)


if __name__ == "__main__":
    main()

"""How long the parts of LVD-PG take per 1,000 images, where the time goes, and what that comes to for ImageNet32.

    python benchmarks/growing.py      # 1,000 crops of photographs, 64 clusters that grow to 4 heads
    python benchmarks/growing.py --images 4000 --accelerator gpu --clusters 400

Runs `folder_pg`-like stages (VQ-VAE for one epoch, latents, three rounds of growing, prior, finetuning) on crops of
photographs, and reads the seconds of epochs and edits off their metrics.csv. The
projection is linear in the images: rates on this machine times the epochs of configs/imagenet32.yaml, with as many
latent values as were measured here; more of them cost more in the prior and in finetuning.
"""

from __future__ import annotations

import argparse
import cProfile
import csv
import io
import json
import platform
import pstats
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from lvd_lightning.cli import CONFIG_FOLDER, main

ROUND, ROUNDS = 1, 3
IMAGENET_IMAGES = 1_281_167
EDITS = ("Prune", "ReassignClusters", "GrowClusters")


def run(settings: argparse.Namespace, run_dir: Path) -> pstats.Stats:
    """Train, and the profile of the stages of the circuits."""
    callbacks = [
        {"class_path": "callbacks.Prune", "init_args": {"every_n_epochs": ROUND}},
        {"class_path": "callbacks.ReassignClusters", "init_args": {"every_n_epochs": ROUND}},
        {
            "class_path": "callbacks.GrowClusters",
            "init_args": {"target": 4, "every_n_epochs": ROUND, "last_epoch": ROUND * (ROUNDS - 1), "min_examples": 50},
        },
    ]
    trainer = {"accelerator": settings.accelerator, "devices": 1}
    arguments = [
        "fit",
        "--config=photos_pg",
        "--name=growing",
        f"--run_dir={run_dir}",
        f"--shared.num_clusters={settings.clusters}",
        f"--data.num_train={settings.images}",
        "--data.batch_size=256",
        f"--trainer={json.dumps(trainer)}",
        "--stages.teacher.trainer.max_epochs=1",
        "--stages.conditional.model.num_heads=2",
        f"--stages.conditional.model.round_epochs={ROUND}",
        f"--stages.conditional.trainer.max_epochs={ROUND * (ROUNDS + 1)}",
        f"--stages.conditional.trainer.callbacks={json.dumps(callbacks)}",
        "--stages.finetune.trainer.max_epochs=2",
    ]
    sys.path.insert(0, str(Path(__file__).parent.parent))  # for datamodules and callbacks, which are not installed
    profile = cProfile.Profile()
    for stage in ("teacher", "latents"):
        _call([*arguments, f"--stage={stage}"])
    profile.enable()
    for stage in ("conditional", "prior", "finetune"):
        _call([*arguments, f"--stage={stage}"])
    profile.disable()
    return pstats.Stats(profile, stream=io.StringIO())


def _call(arguments: list[str]) -> None:
    if main(arguments) != 0:
        raise SystemExit("the run failed")


def seconds_of_parts(stage: Path) -> dict[str, list[float]]:
    """Seconds of every edit (by its name) and of the training epochs ("epoch"), from a stage's metrics.csv."""
    parts: dict[str, list[float]] = {}
    before = 0.0
    with (stage / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            name = next((edit for edit in EDITS if any(value for key, value in row.items() if edit in key)), "epoch")
            now = float(row["seconds"])
            if name == "epoch" and not any(value for key, value in row.items() if key.startswith("val/")):
                continue  # the second row of an epoch: what was logged over its steps
            parts.setdefault(name, []).append(now - before)
            before = now
    return parts


def report(run_dir: Path, settings: argparse.Namespace, stats: pstats.Stats) -> list[str]:
    """A Markdown report."""
    thousands = settings.images / 1000
    config = yaml.safe_load((CONFIG_FOLDER / "imagenet32.yaml").read_text())["stages"]
    lines = ["| part | seconds per 1,000 images | times in imagenet32 | hours for ImageNet32 |", "|---|---:|---:|---:|"]
    conditional, finetune = (seconds_of_parts(run_dir / "growing" / stage) for stage in ("conditional", "finetune"))
    edits = 3  # rounds of configs/imagenet32.yaml that end with a prune
    rows = [
        ("training epoch of the conditionals", conditional["epoch"][1:], config["conditional"]["trainer"]["max_epochs"])
    ]
    rows += [(name, conditional[name], edits) for name in EDITS]
    rows += [("finetuning epoch", finetune["epoch"][-1:], config["finetune"]["trainer"]["max_epochs"])]
    total = 0.0
    for name, seconds, times in rows:
        rate = sum(seconds) / len(seconds) / thousands
        hours = rate * times * IMAGENET_IMAGES / 1000 / 3600
        total += hours
        lines.append(f"| {name} | {rate:.2f} | {times} | {hours:.1f} |")
    done = json.loads((run_dir / "growing" / "finetune" / "done.json").read_text())
    lines += [f"| all of these | | | {total:.1f} |", "", f"{done['num_parameters']:,} parameters in the end."]
    stats.sort_stats("tottime").print_stats(14)
    text = stats.stream.getvalue()  # type: ignore[attr-defined]
    table = [line.rstrip() for line in text[text.index("ncalls") :].splitlines() if line.strip()]
    return [*lines, "", "Where the time goes (conditional, prior, finetune), by function:", "", "```", *table, "```"]


def cli() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--clusters", type=int, default=64)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"), help="Markdown file to write")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stats = run(settings, Path(folder))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} threads"
        sizes = f"{settings.images} images, {settings.clusters} clusters"
        head = f"{platform.machine()}, torch {torch.__version__}, {device}; {sizes}"
        lines = ["# LVD-PG: seconds per 1,000 images", "", head, "", *report(Path(folder), settings, stats)]
    print("\n".join(lines))
    settings.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    cli()

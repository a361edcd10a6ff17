"""Whether a change moves a figure: two small experiments from teacher to finetuned circuit, every digit kept.

Before and after a change, on one machine, with the same number of threads:
    OMP_NUM_THREADS=1 python benchmarks/same_figures.py run before.json --archive cifar10_jpeg_a.zip
    OMP_NUM_THREADS=1 python benchmarks/same_figures.py run after.json --archive cifar10_jpeg_a.zip
    python benchmarks/same_figures.py compare before.json after.json

`photos_pg` grows circuits from a VQ-VAE's clusters; `cifar`, left out without an archive, has a masked autoencoder with
context, a counted prior and plain EM's baseline left away, whose length depends on the clock. What is kept of each: all
figures that the stages and the evaluation leave, and a digest of the tensors of every circuit file. Fifteen minutes on
one thread.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[1]
EPOCHS = {"teacher": 2, "conditional": 2, "prior": 2, "finetune": 2}


def commands(archive: Path | None, seed: int) -> dict[str, list[str]]:
    """The arguments of `train.py` of each experiment."""
    found = {"photos_pg": ["--config", "photos_pg"]}
    if archive is not None:
        epochs = [
            word for stage, count in EPOCHS.items() for word in (f"--stages.{stage}.trainer.max_epochs", str(count))
        ]
        sizes = ["--data.max_examples", "1500", "--shared.num_clusters", "16"]
        found["cifar"] = ["--config", "folder", "--data.path", str(archive.resolve()), *sizes, *epochs]
    return {name: [*words, "--seed", str(seed)] for name, words in found.items()}


def figures(run_dir: Path) -> dict[str, Any]:
    """What the stages and the evaluation of a run left, but for times, and digests of its circuits' tensors."""
    kept: dict[str, Any] = {}
    for path in sorted(run_dir.glob("*/done.json")):
        kept[path.parent.name] = without_times(json.loads(path.read_text()))
    for path in sorted(run_dir.glob("*/*.safetensors")):
        if path.parent.name in ("conditional", "prior", "finetune"):
            tensors = load_file(path).values()
            parts = sorted(hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for tensor in tensors)
            kept[f"{path.parent.name}/{path.stem}"] = hashlib.sha256("".join(parts).encode()).hexdigest()
    return kept


def without_times(values: Any) -> Any:
    """The same without entries named seconds."""
    if isinstance(values, dict):
        return {key: without_times(value) for key, value in values.items() if key != "seconds"}
    return values


def run(path: Path, archive: Path | None, seed: int) -> None:
    """Run the experiments in a temporary directory and write their figures."""
    kept = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(archive, seed).items():
            place = ["--run_dir", folder, "--name", name]
            subprocess.run([sys.executable, str(ROOT / "train.py"), "fit", *words, *place], check=True)
            kept[name] = figures(Path(folder) / name)
    path.write_text(json.dumps(kept, indent=2))


def differences(before: Any, after: Any, key: str = "") -> list[str]:
    """The dotted keys that differ, with their two values."""
    if isinstance(before, dict) and isinstance(after, dict):
        names = dict.fromkeys([*before, *after])
        return [
            line
            for name in names
            for line in differences(before.get(name), after.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [] if before == after else [f"{key}: {before} -> {after}"]


def compare(before: Path, after: Path) -> int:
    """Print what differs; 1 if anything does."""
    found = differences(json.loads(before.read_text()), json.loads(after.read_text()))
    print("\n".join(found) if found else "all figures are equal to the last digit")
    return int(bool(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    running = actions.add_parser("run")
    running.add_argument("path", type=Path)
    running.add_argument("--archive", type=Path, help="CIFAR-10 images as JPEG in a .zip")
    running.add_argument("--seed", type=int, default=0)
    comparing = actions.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    arguments = parser.parse_args()
    if arguments.action == "compare":
        return compare(arguments.before, arguments.after)
    run(arguments.path, arguments.archive, arguments.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())

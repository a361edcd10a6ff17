"""Kills runs at random moments, starts them again, and compares what they leave with a run that was left alone.

    OMP_NUM_THREADS=1 python benchmarks/soak.py FOLDER --kills 200
    OMP_NUM_THREADS=1 python benchmarks/soak.py FOLDER --kills 20 --ranks 2

Three small experiments take turns: LVD (masked autoencoder, five stages), LVD-PG (VQ-VAE, growing) and a hidden Markov
model of a text. Each is run to its end once; then again, while SIGKILL, SIGTERM and SIGUSR1 come at moments that are
drawn uniformly from the time that it took, to the whole job or (of several ranks) to one of them, until it is done.
Every file has to be that of the undisturbed run, but for times: to the last bit on one rank. A run that ends by itself
with another code than 0 or 75 counts as a fault. One line of JSON per kill goes to FOLDER/kills.jsonl, and the table of
docs/reliability.md is printed; called again, it goes on.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

MACHINE = "machine/"
ROOT = Path(__file__).resolve().parents[1]
SMALL = [
    "--data.image_size=8",
    "--data.num_train=64",
    "--data.num_val=16",
    "--data.num_test=16",
    "--data.batch_size=16",
]
MAE = {
    **{"hidden_size": 8, "num_layers": 1, "num_heads": 1, "intermediate_size": 8, "num_pictures": 0},
    **{"decoder_hidden_size": 8, "decoder_num_layers": 1, "decoder_num_heads": 1},
}
VQVAE = {
    **{"channels": 8, "num_features": 4, "codebook_size": 8, "num_components": 2, "num_pictures": 0},
    **{"prior_hidden_size": 8, "prior_num_layers": 1, "prior_num_heads": 1},
}
EXPERIMENTS = {
    "lvd": [
        *("--config=photos", "--shared.num_clusters=3", "--stages.baseline=null", *SMALL),
        *(f"--stages.teacher.model.{name}={value}" for name, value in MAE.items()),
        *(f"--stages.{name}.trainer.max_epochs=4" for name in ("teacher", "conditional", "prior", "finetune")),
        "--stages.conditional.model.num_units=2",
    ],
    "lvd_pg": [
        *("--config=photos_pg", "--shared.num_clusters=3", *SMALL),
        *(f"--stages.teacher.model.{name}={value}" for name, value in VQVAE.items()),
        *("--stages.conditional.model.num_units=2", "--stages.finetune.trainer.max_epochs=3"),
    ],
    "text": [
        *("--config=text", "--stages.teacher=null", "--stages.latents=null", "--stages.baseline=null"),
        *("--shared.length=6", "--data.max_examples=64", "--data.batch_size=16"),
        *("--stages.hmm.model.init=random", "--stages.hmm.model.num_states=4", "--stages.hmm.trainer.max_epochs=6"),
    ],
}
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1)
#: Nothing in these but times.
TIMES = (
    "spent.json",
    "summary.md",
    "summary.json",
    "training.png",
    "config.yaml",
    "index.html",
    "lock",
    "events.jsonl",
)


def command(name: str, folder: Path, run: str, ranks: int) -> list[str]:
    """What starts a run."""
    words = [*EXPERIMENTS[name], "--trainer.accelerator=cpu", f"--trainer.devices={ranks}", "--checkpoint_minutes=0.01"]
    words += [f"--run_dir={folder}", f"--name={run}"]
    if name == "text":
        words.append(f"--data.cache={folder / 'tokens'}")
    return [sys.executable, str(ROOT / "train.py"), "fit", *words]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A job in a session of its own, so that all of its processes can be told at once."""
    with log.open("ab") as file:
        return subprocess.Popen(words, cwd=ROOT, stdout=file, stderr=file, start_new_session=True)


def processes(job: subprocess.Popen[bytes]) -> list[int]:
    """The ranks of a job: the process that was started, and those that it has started with the same program."""
    found = [job.pid]
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(") ", 1)[1].split()
            is_rank = b"train.py" in (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[3]) == job.pid and is_rank and int(entry.parent.name) != job.pid:
            found.append(int(entry.parent.name))
    return found


def end(job: subprocess.Popen[bytes], number: int, one: bool, rng: random.Random) -> int:
    """Send a signal to all ranks of a job or to one of them; its exit code, once none of its processes is left."""
    ranks = processes(job)
    for pid in [rng.choice(ranks)] if one else ranks:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
    try:
        code = job.wait(timeout=300)
    except subprocess.TimeoutExpired:
        code = -999  # it hangs
    with contextlib.suppress(ProcessLookupError):
        os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    return code


def content(path: Path) -> Any:
    """What a file holds, without times."""
    if path.suffix == ".ckpt":
        kept = torch.load(path, weights_only=True)
        return plain({key: kept[key] for key in ("state_dict", "growing", "optimizer_states", "epoch") if key in kept})
    if path.suffix == ".json":
        return plain(json.loads(path.read_text()))
    if path.suffix == ".csv":
        with path.open() as file:
            return plain(list(csv.DictReader(file)))
    return path.read_bytes()


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if "second" not in str(key) and MACHINE not in str(key)}
        return {key: plain(item) for key, item in kept.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.tolist() if isinstance(value, torch.Tensor) else value


def differences(whole: Path, other: Path) -> list[str]:
    """The files that are in one run alone, or hold something else."""
    one, two = ({path.relative_to(run) for path in run.rglob("*") if path.is_file()} for run in (whole, other))
    kept = {path for path in one & two if path.name not in TIMES and ".tfevents" not in path.name}
    changed = [path for path in kept if content(whole / path) != content(other / path)]
    return sorted(map(str, (one ^ two) | set(changed)))


def finished(run: Path) -> bool:
    return (run / "report" / "summary.json").is_file()


def soak(folder: Path, kills: int, ranks: int, seed: int) -> None:
    """Kill until there are enough; see the module's docstring."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "kills.jsonl"
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
    rng = random.Random(f"{seed} {len(done)}")
    spent: dict[str, float] = {}
    while len(done) < kills:
        for name in EXPERIMENTS:
            if name not in spent:
                begun = time.monotonic()
                shutil.rmtree(folder / f"{name}_whole", ignore_errors=True)
                code = start(command(name, folder, f"{name}_whole", ranks), folder / f"{name}_whole.log").wait()
                if code:
                    raise RuntimeError(f"{name} ends with {code} when it is left alone: see {folder}/{name}_whole.log")
                spent[name] = time.monotonic() - begun
            run, faults, own = folder / name, [], []
            shutil.rmtree(run, ignore_errors=True)
            while True:
                job = start(command(name, folder, name, ranks), folder / f"{name}.log")
                number, one = rng.choice(SIGNALS), ranks > 1 and rng.random() < 0.5
                try:
                    code = job.wait(timeout=rng.uniform(0.2, 1.0) * spent[name])
                    was_killed = False
                except subprocess.TimeoutExpired:
                    stage = sum(1 for _ in run.glob("*/done.json"))
                    code, was_killed = end(job, number, one, rng), True
                    own.append({"experiment": name, "signal": signal.Signals(number).name, "one": one, "stage": stage})
                    is_right = code != -999 and (number == signal.SIGKILL or code in (0, 75))
                    if not is_right and not (one and ranks > 1 and code != -999):
                        faults.append(f"{signal.Signals(number).name}: exit code {code}")
                if not was_killed and code not in (0, 75):
                    faults.append(f"exit code {code} by itself")
                    break
                if code == 0 and finished(run):
                    break
            faults += differences(folder / f"{name}_whole", run) if finished(run) else ["not finished"]
            with record.open("a") as file:
                for entry in own:
                    entry["faults"] = faults
                    file.write(json.dumps(entry) + "\n")
            done += own
            print(f"{name}: {len(own)} kills, {faults or 'as if left alone'}; {len(done)} of {kills}", flush=True)


def table(folder: Path) -> str:
    """Kills by experiment and signal, and the runs that ended otherwise."""
    entries = [json.loads(line) for line in (folder / "kills.jsonl").read_text().splitlines()]
    count = Counter((entry["experiment"], entry["signal"]) for entry in entries)
    wrong = Counter(entry["experiment"] for entry in entries if entry["faults"])
    names = [found.name for found in SIGNALS]
    lines = [f"| experiment | {' | '.join(names)} | kills in runs with a fault |", "|---|---:|---:|---:|---:|"]
    for name in EXPERIMENTS:
        kills = " | ".join(str(count[name, found]) for found in names)
        lines.append(f"| {name} | {kills} | {wrong[name]} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    soak(chosen.folder.resolve(), chosen.kills, chosen.ranks, chosen.seed)
    print(table(chosen.folder))


if __name__ == "__main__":
    main()

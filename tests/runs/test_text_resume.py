"""A run over a text that is killed in each of its stages, and one by two processes; run as a script, it is that run."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.encoders import write_bert
from helpers.interrupting import kill_once
from helpers.processes import as_script, exit_codes
from helpers.run_content import content

from lvd_lightning.latents import load_assignments

PLACES = ("teacher", "features", "clusters", "hmm", "evaluate", "baseline")
# Nothing in these but times, or, in pictures, times drawn; a page has the name of its run.
TIMES = ("spent.json", "summary.md", "summary.json", "training.png", "config.yaml", "index.html")
ARGUMENTS = [
    *("fit", "--config=text", "--shared.num_clusters=3", "--shared.length=6", "--trainer.accelerator=cpu"),
    *("--data.max_examples=64", "--data.batch_size=16"),
    *("--stages.latents.model.batch_size=20", "--stages.hmm.model.optimizer=anemone"),
    *("--stages.hmm.trainer.max_epochs=3", "--stages.baseline.trainer.max_epochs=3"),
]


def around(module: Any, name: str, place: str, run_dir: Path, after: bool = False) -> None:
    """Have a function of a module kill the process before, or after, what it does."""
    function = getattr(module, name)

    def killing(*arguments: Any, **keywords: Any) -> Any:
        if not after:
            kill_once(run_dir, place)
        found = function(*arguments, **keywords)
        if after:
            kill_once(run_dir, place)
        return found

    setattr(module, name, killing)


def fit(run_dir: Path) -> int:
    from lvd_lightning import teachers
    from lvd_lightning.cli import main
    from lvd_lightning.latents import features
    from lvd_lightning.runs import pipeline
    from lvd_lightning.stages import latents

    torch.set_num_threads(1)
    features._SECONDS_BETWEEN_MARKS = 0.0
    around(teachers, "save_teacher", "teacher", run_dir)
    around(features._Mark, "move", "features", run_dir, after=True)
    around(latents, "write_clusters", "clusters", run_dir)
    around(pipeline, "evaluate_run", "evaluate", run_dir)
    callback = "--trainer.callbacks=[{class_path: helpers.interrupting.KillInSecondEpoch}]"
    return main([*arguments(run_dir, 1), callback])


def arguments(run_dir: Path, devices: int) -> list[str]:
    folder = run_dir.parent
    paths = [f"--data.cache={folder / 'tokens'}", f"--stages.teacher.model.encoder={folder / 'bert'}"]
    return [*ARGUMENTS, *paths, f"--trainer.devices={devices}", f"--name={run_dir.name}", f"--run_dir={folder}"]


def write_encoder(folder: Path) -> None:
    write_bert(folder / "bert", ["the", "king", "and", "of", "said", *"abcdefghijklmnopqrstuvwxyz,.:;"])


def test_run_over_a_text_that_is_killed_everywhere_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    write_encoder(tmp_path)
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {"killed": [-signal.SIGKILL] * len(PLACES) + [0], "whole": [0]}, result.stderr
    assert {path.name for path in tmp_path.glob("killed-*")} == {f"killed-killed-{place}" for place in PLACES}
    whole, killed = (
        {path.relative_to(tmp_path / name): path for path in sorted((tmp_path / name).rglob("*.*")) if path.is_file()}
        for name in ("whole", "killed")
    )
    assert list(whole) == list(killed)
    for name, path in whole.items():
        if name.name not in TIMES:
            assert content(path) == content(killed[name]), name


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """And end: whatever one of them asks of a metric, the other one is asked too."""
    write_encoder(tmp_path)
    root = Path(__file__).parents[2]
    for name, devices in (("one", 1), ("two", 2)):
        words = [sys.executable, str(root / "train.py"), *arguments(tmp_path / name, devices)]
        subprocess.run(words, cwd=root, check=True, timeout=200, env={**os.environ, "PYTHONPATH": str(root)})
    for split in ("train", "val", "test"):
        one, two = (load_assignments(tmp_path / name / "latents", split) for name in ("one", "two"))
        assert torch.equal(one, two)
    figures = [json.loads((tmp_path / name / "report" / "summary.json").read_text()) for name in ("one", "two")]
    first, second = ({**found["test"], **found["baseline"]["random_em"]} for found in figures)
    for name in ("ppl", "ppl_carried", "num_parameters"):
        assert first[name] == pytest.approx(second[name], rel=1e-4), name


if __name__ == "__main__":
    # This process imports everything and computes nothing, so that the forked ones can.
    import_module("lvd_lightning.runs.pipeline")
    runs = {name: exit_codes(partial(fit, Path(sys.argv[1]) / name), most=12) for name in ("whole", "killed")}
    print(json.dumps(runs))

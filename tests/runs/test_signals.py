"""SIGTERM and SIGUSR1 in every stage, of one process and of two; run as a script, it is these runs.

The run that was stopped everywhere, within epochs too, ends as one that was not.
"""

import json
import os
import signal
import sys
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.interrupting import signal_once
from helpers.processes import as_script, exit_codes, fork_ranks
from helpers.run_content import content, without_times

from lvd_lightning.events import events_path, read_events
from lvd_lightning.runs.metrics_file import read_metrics
from lvd_lightning.stopping import EXIT_CODE

CONFIG = """
shared: {num_clusters: 3}
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 60, num_val: 15, num_test: 10, batch_size: 16, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, max_epochs: 2,
  callbacks: [{class_path: helpers.interrupting.SignalInSecondEpoch}]}
stages:
  vqvae:
    model:
      class_path: lvd_lightning.stages.VQVAETeacher
      init_args: {channels: 8, num_residual_blocks: 1, num_features: 4, codebook_size: 8, num_components: 2,
        prior_hidden_size: 8, prior_num_layers: 1, prior_num_heads: 2, prior_dropout: 0.2, num_pictures: 0}
  mae:
    model:
      class_path: lvd_lightning.stages.MAETeacher
      init_args: {hidden_size: 8, num_layers: 1, num_heads: 1, intermediate_size: 8, num_pictures: 0,
        decoder_hidden_size: 8, decoder_num_layers: 1, decoder_num_heads: 1}
  latents:
    model:
      class_path: lvd_lightning.stages.Latents
      init_args: {num_clusters: "${shared.num_clusters}", pooled: true, batch_size: 16}
  conditional:
    model:
      class_path: lvd_lightning.stages.ConditionalStudent
      init_args: {num_units: 2, round_epochs: 1, val_images: 15}
    trainer:
      callbacks:
        - {class_path: helpers.interrupting.SignalInSecondEpoch}
        - {class_path: callbacks.Prune, init_args: {every_n_epochs: 1}}
  prior: {model: {class_path: lvd_lightning.stages.PriorStudent, init_args: {val_images: 15, num_units: 2}}}
  finetune: {model: {class_path: lvd_lightning.stages.FinetuneStudent, init_args: {val_images: 15, lr: 0.1}}}
  baseline: {model: {class_path: lvd_lightning.stages.CircuitBaseline, init_args: {num_units: 2, val_images: 15}}}
"""
TRAINED = ("vqvae", "mae", "conditional", "prior", "finetune", "baseline")
PLACES = (*TRAINED, "features", "clusters", "evidence", "editing", "evaluate", "between")
# Nothing in these but times, or, in pictures, times drawn; a page has the name of its run.
TIMES = ("spent.json", "summary.md", "summary.json", "training.png", "config.yaml", "index.html")
PLAN = {"parents": [-1, *range(191)], "num_units": 2, "seconds": 1.0, "steps": {"em": 9, "anemone": 9}}


def before(module: Any, name: str, place: str, run_dir: Path, number: int) -> None:
    """Have a function of a module be called with a signal on its way."""
    function = getattr(module, name)

    def signalled(*arguments: Any, **keywords: Any) -> Any:
        signal_once(run_dir, place, number)
        return function(*arguments, **keywords)

    setattr(module, name, signalled)


def fit(run_dir: Path, *arguments: str) -> int:
    from lvd_lightning.cli import main
    from lvd_lightning.growing import edits
    from lvd_lightning.latents import clusters, features
    from lvd_lightning.models import evidence
    from lvd_lightning.runs import pipeline

    torch.set_num_threads(1)
    before(features, "_check_finite", "features", run_dir, signal.SIGTERM)
    before(clusters, "fit_centroids", "clusters", run_dir, signal.SIGUSR1)
    before(evidence, "read_array", "evidence", run_dir, signal.SIGTERM)
    before(edits.pc, "Flows", "editing", run_dir, signal.SIGUSR1)
    before(pipeline, "evaluate_run", "evaluate", run_dir, signal.SIGTERM)
    before(pipeline, "mark_done", "between", run_dir, signal.SIGUSR1)
    (run_dir / "baseline").mkdir(parents=True, exist_ok=True)
    (run_dir / "baseline" / "plan.json").write_text(json.dumps(PLAN))
    config = f"--config={run_dir.parent / 'all.yaml'}"
    return main(["fit", config, f"--name={run_dir.name}", f"--run_dir={run_dir.parent}", *arguments])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[int]], str]:
    """A run that was not stopped, one that was in every place, and exit codes; what they have printed."""
    folder = tmp_path_factory.mktemp("signals")
    (folder / "all.yaml").write_text(CONFIG)
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return folder, json.loads(result.stdout.splitlines()[-1]), result.stderr


def test_every_signal_stops_at_the_next_boundary(runs: tuple[Path, dict[str, list[int]], str]) -> None:
    folder, codes, said = runs
    assert codes["whole"] == [0]
    assert {path.name for path in folder.glob("signal-*")} == {f"signal-stopped-{place}" for place in PLACES} | {
        "signal-stopped2-conditional"
    }
    assert codes["stopped"] == [EXIT_CODE] * len(PLACES) + [0], said
    for name in ("SIGTERM", "SIGUSR1"):
        assert f"stopped by {name}: the same command goes on from here" in said


def test_a_run_that_was_stopped_everywhere_ends_as_one_that_was_not(
    runs: tuple[Path, dict[str, list[int]], str],
) -> None:
    folder = runs[0]
    whole, stopped = (
        {path.relative_to(folder / name): path for path in sorted((folder / name).rglob("*.*")) if path.is_file()}
        for name in ("whole", "stopped")
    )
    assert list(whole) == list(stopped)
    for name, path in whole.items():
        if name.name not in TIMES:
            assert content(path) == content(stopped[name]), name


def test_what_happened_when_is_told(runs: tuple[Path, dict[str, list[int]], str]) -> None:
    told = read_events(events_path(runs[0] / "stopped"))
    count = Counter(line["event"] for line in told)
    assert count["start"] == len(PLACES) + 1
    assert count["signal"] == len(PLACES)
    assert count["end"] == 1
    assert count["report"] == 2  # before the baseline, and completed after it
    assert {line["signal"] for line in told if line["event"] == "signal"} == {"SIGTERM", "SIGUSR1"}
    assert {line["stage"] for line in told if line["event"] == "resume"} >= set(TRAINED) - {"baseline"}
    assert {line["edit"] for line in told if line["event"] == "edit"} == {"Prune"}
    saved = {(line["stage"], line["file"]) for line in told if line["event"] == "checkpoint"}
    assert {("conditional", "step.ckpt"), ("conditional", "best.ckpt"), ("mae", "step.ckpt")} <= saved
    epochs = [line["epoch"] for line in told if line["event"] == "epoch" and line["stage"] == "vqvae"]
    assert epochs == [0, 1]
    row = read_metrics(runs[0] / "whole" / "conditional" / "metrics.csv")[-1]
    assert "machine/step_seconds" in row


def test_a_signal_to_one_rank_stops_both_and_one_process_goes_on(
    runs: tuple[Path, dict[str, list[int]], str],
) -> None:
    folder, codes, said = runs
    assert codes["two ranks"] == [EXIT_CODE, 0], said
    one, two = (read_metrics(folder / name / "conditional" / "metrics.csv") for name in ("whole", "stopped2"))
    assert len(one) == len(two)
    for row, other in zip(one, two, strict=True):
        one_row, other_row = (
            {name: float(value) for name, value in found.items() if value} for found in map(without_times, (row, other))
        )
        assert other_row == pytest.approx(one_row, rel=1e-4)


def two_ranks(folder: Path) -> list[int]:
    """Conditionals of the first run again by two ranks, of which one is stopped; one process goes on."""
    run_dir = folder / "stopped2"
    run_dir.mkdir()
    for name in ("vqvae", "mae", "latents", "config.yaml"):
        (run_dir / name).symlink_to(folder / "whole" / name)
    for place in set(PLACES) - {"conditional"}:
        (folder / f"signal-stopped2-{place}").touch()
    stage = "--stage=conditional"

    def both(rank: int) -> None:
        os._exit(fit(run_dir, stage, "--trainer.devices=2"))

    codes = [fork_ranks(both), *exit_codes(partial(fit, run_dir, stage), most=1)]
    for place in set(PLACES) - {"conditional"}:
        (folder / f"signal-stopped2-{place}").unlink()
    return codes


if __name__ == "__main__":
    # This process imports everything and computes nothing, so that the forked ones can.
    import_module("lvd_lightning.runs.pipeline")
    where = Path(sys.argv[1])
    found = {name: exit_codes(partial(fit, where / name), most=len(PLACES) + 2) for name in ("whole", "stopped")}
    print(json.dumps({**found, "two ranks": two_ranks(where)}))

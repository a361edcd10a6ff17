"""A run that is killed in every round of growing; run as a script, it is that run."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lvd_lightning.bookkeeping import read_metrics

ROOT = Path(__file__).parents[2]
ROUNDS = (
    "{class_path: callbacks.Prune, init_args: {every_n_epochs: 1, threshold: 0.001}}",
    "{class_path: callbacks.ReassignClusters, init_args: {every_n_epochs: 1, last_epoch: 2}}",
    "{class_path: callbacks.GrowClusters, init_args: {target: 4, min_examples: 20, every_n_epochs: 1, last_epoch: 2}}",
    "{class_path: callbacks.LogGrowth, init_args: {every_n_epochs: 1}}",
    "{class_path: __main__.KillInEpoch}",
)
ARGUMENTS = [
    *("fit", "--config=photos_pg", "--config=overlays/pixels", "--shared.num_clusters=2"),
    *("--trainer.accelerator=cpu", "--trainer.devices=1", "--stages.conditional.trainer.max_epochs=4"),
    *("--data.image_size=8", "--data.num_train=64", "--data.num_val=16", "--data.num_test=16", "--data.batch_size=16"),
    *("--stages.conditional.model.num_latents=3", "--stages.conditional.model.min_examples=5"),
    f"--stages.conditional.trainer.callbacks=[{', '.join(ROUNDS)}]",
]


class KillInEpoch(Callback):
    """Kills the process in the middle of epochs 1 and 2, each once: after the edits that these begin with."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        run_dir = Path(trainer.default_root_dir).parent
        marker = run_dir.parent / f"killed-{trainer.current_epoch}"
        if run_dir.name == "killed" and trainer.current_epoch in (1, 2) and rest[-1] == 1 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


def fit(run_dir: Path) -> int:
    from lvd_lightning.cli import main

    torch.set_num_threads(1)
    arguments = [*ARGUMENTS, f"--name={run_dir.name}", f"--run_dir={run_dir.parent}"]
    return max(main([*arguments, f"--stage={stage}"]) for stage in ("latents", "conditional"))


def exit_codes(work: Callable[[], int]) -> list[int]:
    """Exit codes of forked processes that do the work, until one ends well."""
    codes: list[int] = []
    while not codes or (codes[-1] and len(codes) < 6):
        child = os.fork()
        if child == 0:
            code = work()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    return codes


def same(one: Any, other: Any) -> bool:
    """Whether plain values with tensors in them are equal, but for what a clock said."""
    if isinstance(one, dict):
        names = [name for name in one if "seconds" not in str(name)]
        return all(same(one[name], other[name]) for name in names) and one.keys() == other.keys()
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else bool(one == other)


def test_run_that_is_killed_in_every_round_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
    )
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {"killed": [-signal.SIGKILL] * 2 + [0], "whole": [0]}, result.stderr
    whole, killed = (tmp_path / name / "conditional" for name in ("whole", "killed"))
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (torch.load(folder / name, weights_only=True) for folder in (whole, killed))
        assert one["growing"]["round"] == (2 if name == "last.ckpt" else one["growing"]["round"])
        for key in ("state_dict", "growing", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
            assert same(one[key], other[key]), key
    rows, others = (read_metrics(folder / "metrics.csv") for folder in (whole, killed))
    assert sum(bool(row.get("GrowClusters/grown")) for row in rows) == 2
    assert same(rows, others)
    for name in ("assignments_train.npy", "assignments_val.npy", "assignments_test.npy"):
        assert np.array_equal(np.load(whole / name), np.load(killed / name))
    names = [path.name for path in sorted((whole / "pictures").iterdir())]
    assert names == [*(f"clusters_epoch_00{epoch}.png" for epoch in range(4)), "growth.png"]
    assert (killed / "pictures" / names[-1]).read_bytes() == (whole / "pictures" / names[-1]).read_bytes()
    circuits = [(folder / "conditional.safetensors").read_bytes() for folder in (whole, killed)]
    assert circuits[0] == circuits[1]


if __name__ == "__main__":
    # This process imports everything and computes nothing, so that the forked ones can.
    import_module("lvd_lightning.pipeline")
    runs = {name: exit_codes(lambda name=name: fit(Path(sys.argv[1]) / name)) for name in ("whole", "killed")}
    print(json.dumps(runs))

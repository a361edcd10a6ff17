"""A run that is killed in every round of growing; run as a script, it is that run."""

import json
import os
import signal
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers.processes import as_script, exit_codes
from helpers.run_content import content
from lightning.pytorch import Callback, LightningModule, Trainer

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
    *("--stages.conditional.model.num_units=3", "--stages.conditional.model.min_examples=5"),
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


def test_run_that_is_killed_in_every_round_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    codes = json.loads(result.stdout.splitlines()[-1])
    assert codes == {"killed": [-signal.SIGKILL] * 2 + [0], "whole": [0]}, result.stderr
    whole, killed = (tmp_path / name / "conditional" for name in ("whole", "killed"))
    for name in ("last.ckpt", "best.ckpt"):
        one, other = (content(folder / name) for folder in (whole, killed))
        assert {"state_dict", "growing", "optimizer_states", "lr_schedulers", "epoch", "global_step"} == set(one)
        assert one["growing"]["round"] == (2 if name == "last.ckpt" else one["growing"]["round"])
        for key, value in one.items():
            assert value == other[key], key
    rows, others = (content(folder / "metrics.csv") for folder in (whole, killed))
    assert sum(bool(row.get("GrowClusters/grown")) for row in rows) == 2
    assert rows == others
    for name in ("assignments_train.npy", "assignments_val.npy", "assignments_test.npy"):
        assert np.array_equal(np.load(whole / name), np.load(killed / name))
    names = [path.name for path in sorted((whole / "pictures").iterdir())]
    assert names == [*(f"clusters_epoch_00{epoch}.png" for epoch in range(4)), "growth.png"]
    assert (killed / "pictures" / names[-1]).read_bytes() == (whole / "pictures" / names[-1]).read_bytes()
    assert (killed / "heads.csv").read_text() == (whole / "heads.csv").read_text()
    circuits = [(folder / "conditional.safetensors").read_bytes() for folder in (whole, killed)]
    assert circuits[0] == circuits[1]


if __name__ == "__main__":
    # This process imports everything and computes nothing, so that the forked ones can.
    import_module("lvd_lightning.runs.pipeline")
    runs = {name: exit_codes(partial(fit, Path(sys.argv[1]) / name), most=6) for name in ("whole", "killed")}
    print(json.dumps(runs))

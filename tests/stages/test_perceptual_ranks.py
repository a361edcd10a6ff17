"""Stage "perceptual" on two processes: with the likelihood alone they end as one; run as a script, it is these runs."""

import json
import math
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.processes import as_script, fork_ranks

CONFIG = """
name: digits
run_dir: {folder}
data: {{class_path: datamodules.Digits, init_args: {{max_examples: 64, batch_size: 32}}}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 2, enable_progress_bar: false}}
stages:
  perceptual:
    model:
      class_path: lvd_lightning.stages.PerceptualStudent
      init_args: {{structure: hclt, num_units: 2, lr: 0.05, num_samples: 8, discriminator_channels: 4}}
"""
LOSSES = [f"--stages.perceptual.model.{name}=0.1" for name in ("mmd", "adversarial", "autoencode")]


def run(folder: Path, name: str, *arguments: str) -> None:
    from lvd_lightning.cli import main
    from lvd_lightning.runs import perception

    torch.set_num_threads(1)
    perception.NUM_SAMPLES = 120
    assert main(["fit", f"--config={folder / 'digits.yaml'}", f"--name={name}", *arguments]) == 0


def test_two_processes(tmp_path: Path) -> None:
    (tmp_path / "digits.yaml").write_text(CONFIG.format(folder=tmp_path))
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    names = ("one", "two", "losses")
    one, two, losses = (json.loads((tmp_path / n / "report" / "summary.json").read_text()) for n in names)
    assert two["test"]["bpd"] == pytest.approx(one["test"]["bpd"], rel=1e-4)
    assert two["perception"]["test images"] == one["perception"]["test images"]
    assert math.isfinite(losses["test"]["bpd"])
    assert losses["test"]["bpd"] != pytest.approx(two["test"]["bpd"], rel=1e-6)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("lvd_lightning.cli", "lvd_lightning.runs.pipeline", "lvd_lightning.stages.perceptual", "datamodules"):
        import_module(name)  # before processes are forked
    if not os.fork():
        run(folder, "one")
        os._exit(0)
    os.wait()
    codes = [fork_ranks(lambda rank: run(folder, "two", "--trainer.devices=2"))]
    codes.append(fork_ranks(lambda rank: run(folder, "losses", "--trainer.devices=2", *LOSSES)))
    sys.exit(max(codes))

"""Stage "perceptual" ends on two processes as on one, whatever it learns from; run as a script, it is these runs."""

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.processes import as_script, fork_ranks
from safetensors.torch import load_file

CONFIG = """
name: digits
run_dir: {folder}
data: {{class_path: datamodules.Digits, init_args: {{max_examples: 63, batch_size: 30}}}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 2, precision: 64-true, enable_progress_bar: false}}
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
    for name in ("nll", "losses"):
        one, two = (tmp_path / f"{name}-{size}" for size in (1, 2))
        figures = [json.loads((folder / "report" / "summary.json").read_text()) for folder in (one, two)]
        assert figures[1]["test"]["bpd"] == pytest.approx(figures[0]["test"]["bpd"], rel=1e-9)
        assert figures[1]["perception"] == figures[0]["perception"]
        for file in ("prior", "conditional"):
            first, second = (load_file(folder / "perceptual" / f"{file}.safetensors") for folder in (one, two))
            for key, tensor in first.items():
                if tensor.is_floating_point():
                    torch.testing.assert_close(second[key], tensor, rtol=0, atol=1e-8, msg=key)
    with_samples, without = (
        load_file(tmp_path / f"{name}-1" / "perceptual" / "conditional.safetensors") for name in ("losses", "nll")
    )
    assert any(not torch.equal(with_samples[key], without[key]) for key in without)  # samples do say something


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in ("lvd_lightning.cli", "lvd_lightning.runs.pipeline", "lvd_lightning.stages.perceptual", "datamodules"):
        import_module(name)  # before processes are forked
    worst = 0
    for name, more in (("nll", []), ("losses", LOSSES)):
        for size in (1, 2):
            words = [f"--trainer.devices={size}", *more]
            worst = max(worst, fork_ranks(lambda rank, n=f"{name}-{size}", w=words: run(folder, n, *w), size))
    sys.exit(worst)

"""Flows are trained and distilled on two processes as on one; run as a script, it is these runs."""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.processes import as_script, fork_ranks
from safetensors.torch import load_file

# 31 images in batches of 10: of the last one, of one image, one process has nothing.
CONFIG = """
name: one
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 31, num_val: 8, num_test: 6, batch_size: 10, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, precision: 64-true, max_epochs: 2}
stages:
  flow:
    model:
      class_path: lvd_lightning.stages.FlowTeacher
      init_args: {num_steps: 2, hidden_size: 4, num_levels: 2, num_pictures: 0, bound_examples: 0,
        dequantization: variational}
  student:
    model:
      class_path: lvd_lightning.stages.FlowStudent
      init_args: {num_steps: 1, latent_weight: 0.2, intermediate_weight: 0.1, synthesis_weight: 0.1,
        num_pictures: 0, bound_examples: 0}
"""
STAGES = ("flow", "student")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flows")
    (folder / "all.yaml").write_text(CONFIG)
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_a_flow_ends_alike_on_one_and_two_ranks(stage: str, folder: Path) -> None:
    """Gradients are averaged in another order, and Adam divides by their size."""
    one, two = (load_file(folder / name / stage / "teacher.safetensors") for name in ("one", f"two-{stage}"))
    assert one.keys() == two.keys()
    for key, tensor in one.items():
        if tensor.is_floating_point():
            scale = max(1.0, float(tensor.abs().max()))
            torch.testing.assert_close(two[key], tensor, rtol=0, atol=1e-8 * scale, msg=key)
        else:
            assert torch.equal(two[key], tensor), key


def run(folder: Path, name: str, *arguments: str) -> None:
    from lvd_lightning.cli import main

    torch.set_num_threads(1)
    words = [f"--config={folder / 'all.yaml'}", f"--run_dir={folder}", f"--name={name}", *arguments]
    assert main(["fit", *words]) == 0


def all_runs(folder: Path) -> int:
    codes = [fork_ranks(lambda rank, stage=stage: run(folder, "one", f"--stage={stage}"), 1) for stage in STAGES]
    for stage in STAGES:
        name = f"two-{stage}"
        (folder / name).mkdir()
        shutil.copy(folder / "one" / "config.yaml", folder / name)
        for earlier in STAGES[: STAGES.index(stage)]:
            shutil.copytree(folder / "one" / earlier, folder / name / earlier)
        words = [f"--stage={stage}", "--trainer.devices=2"]
        codes.append(fork_ranks(lambda rank, name=name, words=words: run(folder, name, *words)))
    return max(codes)


if __name__ == "__main__":
    for module in ("lvd_lightning.cli", "lvd_lightning.runs.pipeline", "lvd_lightning.stages.flow_student"):
        import_module(module)  # before processes are forked
    sys.exit(all_runs(Path(sys.argv[1])))

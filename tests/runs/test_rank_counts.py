"""Every stage, from the same artefacts, ends on one, two and four ranks alike; run as a script, it is these runs."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import as_script, fork_ranks
from safetensors.torch import load_file

from lvd_lightning.runs.metrics_file import read_metrics

# 59 images in batches of 14: shares are uneven, and of four ranks one has nothing of the last batch.
CONFIG = """
name: one
shared: {num_clusters: 3}
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 59, num_val: 15, num_test: 10, batch_size: 14, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, precision: 64-true, max_epochs: 2}
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
      init_args: {num_units: 3, num_heads: 2, round_epochs: 1, val_images: 15, slots: 0.7, min_examples: 5}
    trainer:
      callbacks:
        - {class_path: callbacks.Prune, init_args: {every_n_epochs: 1}}
        - {class_path: callbacks.ReassignClusters, init_args: {every_n_epochs: 1}}
        - {class_path: callbacks.GrowClusters, init_args: {target: 4, every_n_epochs: 1, min_examples: 20}}
  prior:
    model:
      class_path: lvd_lightning.stages.PriorStudent
      init_args: {candidates: 3, val_images: 15, num_units: 3, hard_epochs: 1, prune_threshold: 0.001}
  finetune:
    model: {class_path: lvd_lightning.stages.FinetuneStudent, init_args: {slots: 0.7, val_images: 15, lr: 0.1}}
"""
STAGES = ("vqvae", "mae", "latents", "conditional", "prior", "finetune")
#: Teachers' gradients are averaged in the order of the ranks, and Adam divides by their size.
LIMITS = {"vqvae": 1e-8, "mae": 1e-8} | dict.fromkeys(STAGES[2:], 1e-10)


#: Stages and numbers of ranks.
RUNS = [*((stage, 2) for stage in STAGES), ("conditional", 4)]


def run(folder: Path, name: str, *arguments: str) -> None:
    from lvd_lightning.cli import main

    torch.set_num_threads(1)
    words = [f"--config={folder / 'all.yaml'}", f"--run_dir={folder}", f"--name={name}", *arguments]
    assert main(["fit", *words]) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, and every stage of it again by two processes; some by four."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "all.yaml").write_text(CONFIG)
    result = as_script(__file__, str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All numbers that a stage leaves, by file and name."""
    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found |= {f"{path.name}/{name}": tensor for name, tensor in load_file(path).items()}
    for path in sorted(folder.rglob("*.npy")):
        found[path.name] = torch.from_numpy(np.load(path))
    return found


@pytest.mark.parametrize(("stage", "size"), RUNS, ids=str)
def test_a_stage_ends_alike_on_any_number_of_ranks(stage: str, size: int, folder: Path) -> None:
    one, other = tensors(folder / "one" / stage), tensors(folder / f"{stage}-{size}" / stage)
    assert one
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        if tensor.is_floating_point():
            scale = float(tensor.double().abs().max())
            torch.testing.assert_close(
                other[name].double(), tensor.double(), rtol=0, atol=LIMITS[stage] * max(1.0, scale), msg=name
            )
        else:
            assert torch.equal(tensor, other[name]), name


def test_circuits_in_float64_are_handed_on_in_float64(folder: Path) -> None:
    found = tensors(folder / "one" / "conditional")
    assert found["conditional.safetensors/params.float64"].dtype == torch.float64


def test_structures_are_the_same(folder: Path) -> None:
    one, two = (json.loads((folder / name / "conditional" / "done.json").read_text()) for name in NAMES)
    for name in ("num_heads", "num_parameters"):
        assert one[name] == two[name]
    grown = [
        int(float(row["GrowClusters/grown"] or 0))
        for row in read_metrics(folder / NAMES[1] / "conditional" / "metrics.csv")
    ]
    assert max(grown) > 0


NAMES = ("one", "conditional-2")


def stages_again(folder: Path, sizes: Sequence[tuple[str, int]]) -> int:
    code = 0
    for stage, size in sizes:
        name = f"{stage}-{size}"
        for earlier in STAGES[: STAGES.index(stage)]:
            shutil.copytree(folder / "one" / earlier, folder / name / earlier)
        (folder / name).mkdir(exist_ok=True)
        shutil.copy(folder / "one" / "config.yaml", folder / name)
        words = [f"--stage={stage}", f"--trainer.devices={size}"]
        code = max(code, fork_ranks(lambda rank, name=name, words=words: run(folder, name, *words), size))
    return code


if __name__ == "__main__":
    for name in (
        "lvd_lightning.cli",
        "lvd_lightning.runs.pipeline",
        "lvd_lightning.stages.finetune",
        "lvd_lightning.stages.vqvae_teacher",
        "callbacks",
        "datamodules.photos",
    ):
        import_module(name)  # before processes are forked
    where = Path(sys.argv[1])
    if not os.fork():
        run(where, "one")
        os._exit(0)
    os.wait()
    sys.exit(stages_again(where, RUNS))

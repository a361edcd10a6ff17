"""Circuits divided over ranks end as those that all ranks have; run as a script, it is these runs."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import as_script, fork_ranks
from safetensors.torch import load_file

from lvd_lightning.cli import main
from lvd_lightning.models.members import balanced_owners
from lvd_lightning.runs.metrics_file import read_metrics
from lvd_lightning.traffic import TRAFFIC

# 59 images in batches of 14: of the last one, of three, four ranks have no example each.
CONFIG = """
name: one
shared: {num_clusters: 5}
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 59, num_val: 15, num_test: 10, batch_size: 14, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, precision: 64-true, max_epochs: 3}
stages:
  latents:
    model:
      class_path: lvd_lightning.stages.Latents
      init_args: {num_clusters: "${shared.num_clusters}", pooled: true, batch_size: 16}
  conditional:
    model:
      class_path: lvd_lightning.stages.ConditionalStudent
      init_args: {num_units: 3, num_heads: 2, round_epochs: 1, val_images: 15, slots: 0.7, min_examples: 5,
        leaf: lvd_lightning.circuits.DiscretizedLogistic}
    trainer:
      callbacks:
        - {class_path: callbacks.Prune, init_args: {every_n_epochs: 1}}
        - {class_path: callbacks.ReassignClusters, init_args: {every_n_epochs: 1}}
        - class_path: callbacks.GrowClusters
          init_args: {target: 4, every_n_epochs: 1, last_epoch: 1, min_examples: 20}
"""
UNTIED = ["--stages.conditional.model.tied=false", "--stages.conditional.model.num_heads=1"]
UNTIED += ["--stages.conditional.trainer.callbacks=null", "--shared.num_clusters=2", "--trainer.max_epochs=1"]
SETTINGS = {"untied": UNTIED, "single": ["--trainer.precision=32-true", "--trainer.max_epochs=1"]}
CIRCUITS = "--stages.conditional.model.sharding=circuits"
#: Name, the run of one process that it is compared with, ranks, sharding, and the run that it goes on from.
RUNS = [
    ("circuits-2", "one", 2, True, None),
    ("on-from-one", "one", 4, True, "one"),
    ("on-from-two", "one", 1, False, "circuits-2"),
    ("untied-2", "untied-1", 2, True, None),
    ("single-2", "single-1", 2, True, None),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "all.yaml").write_text(CONFIG)
    for name in dict.fromkeys([like for _, like, *_ in RUNS] + [name for name, *_ in RUNS]):
        result = as_script(__file__, str(folder), name)
        assert result.returncode == 0, result.stderr
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "conditional" / "conditional.safetensors")


@pytest.mark.parametrize(("name", "like"), [run[:2] for run in RUNS])
def test_the_circuits_are_the_same(name: str, like: str, folder: Path) -> None:
    one, other = tensors(folder / like), tensors(folder / name)
    assert one
    assert one.keys() == other.keys()
    limit = 1e-5 if name.startswith("single") else 1e-10
    for key, tensor in one.items():
        assert tensor.shape == other[key].shape, key
        scale = max(1.0, float(tensor.double().abs().max()))
        torch.testing.assert_close(other[key].double(), tensor.double(), rtol=0, atol=limit * scale, msg=key)


@pytest.mark.parametrize(("name", "like"), [run[:2] for run in RUNS])
def test_so_are_the_logged_figures(name: str, like: str, folder: Path) -> None:
    def figures(run: str) -> dict[tuple[str, str], float]:
        rows = read_metrics(folder / run / "conditional" / "metrics.csv")
        found = {(row["epoch"], key): value for row in rows for key, value in row.items() if value not in ("", None)}
        of_model = ("train/", "val/", "Prune/", "ReassignClusters/", "GrowClusters/")
        return {place: float(value) for place, value in found.items() if place[1].startswith(of_model)}

    one, other = figures(like), figures(name)
    assert len(other) >= 3
    limit = 1e-4 if "single" in name else 1e-7
    for place, value in other.items():
        assert value == pytest.approx(one[place], rel=limit), place


def test_circuits_grew_and_moved(folder: Path) -> None:
    seen = json.loads((folder / "seen-circuits-2.json").read_text())
    assert seen["grown"] > 0
    whole = sum(tensor.numel() for key, tensor in tensors(folder / "one").items() if key.startswith("params"))
    # Every rank held part of the numbers, and the parts are all.
    shares = [json.loads((folder / f"seen-circuits-2-{rank}.json").read_text())["params"] for rank in range(2)]
    assert sum(shares) == whole
    assert max(shares) < 0.7 * whole


def test_a_step_sends_nothing(folder: Path) -> None:
    assert json.loads((folder / "seen-circuits-2.json").read_text())["sent"] == 0


def test_checkpoints_are_those_of_one_process(folder: Path) -> None:
    one, two = (
        torch.load(folder / f"kept-{name}" / "last.ckpt", map_location="cpu", weights_only=True)
        for name in ("one", "circuits-2")
    )
    assert one["state_dict"].keys() == two["state_dict"].keys()
    for key, tensor in one["state_dict"].items():
        assert tensor.shape == two["state_dict"][key].shape, key
    (first,), (second,) = one["optimizer_states"], two["optimizer_states"]
    assert first["state"].keys() == second["state"].keys()
    for number, state in first["state"].items():
        assert state["step"] == second["state"][number]["step"]
        torch.testing.assert_close(second["state"][number]["flow"], state["flow"], rtol=1e-9, atol=1e-9)


def test_more_ranks_than_circuits_are_refused() -> None:
    with pytest.raises(ValueError, match="5 circuits do not go round 6 ranks: use fewer ranks, or sharding: data"):
        balanced_owners([1.0] * 5, 6)


def test_samples_cannot_be_drawn_of_part_of_the_circuits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "all.yaml").write_text(CONFIG)
    more = [CIRCUITS, "--stages.conditional.trainer.callbacks=[{class_path: callbacks.LogSamples}]"]
    assert main(["fit", f"--config={tmp_path / 'all.yaml'}", f"--run_dir={tmp_path}", *more]) == 2
    assert "LogSamples: under sharding: circuits no process has all circuits" in capsys.readouterr().err


def run(folder: Path, name: str, rank: int = 0, *more: str) -> None:
    """A run, whose files after its first epoch are kept; what the first rank saw of it is noted."""
    from lvd_lightning.circuits import em
    from lvd_lightning.runs.checkpoint import EpochCheckpoint

    torch.set_num_threads(1)
    save, step = EpochCheckpoint.on_train_epoch_end, em.Anemone.step
    seen: dict[str, float] = {"sent": 0, "params": 0, "grown": 0}

    def kept(self: Any, trainer: Any, module: Any) -> None:
        save(self, trainer, module)
        conditional = module.assembled.conditional
        graphs = conditional.to_graph()
        inputs = {id(node.params): node.params.numel() for g in graphs for node in g.nodes if node.params is not None}
        seen["params"] = sum(inputs.values())
        if rank == 0 and trainer.current_epoch == 0:
            shutil.copytree(self.folder, folder / f"kept-{name}", dirs_exist_ok=True)

    def counted(self: Any, closure: Any = None) -> Any:
        before = TRAFFIC.num_bytes
        found = step(self, closure)
        seen["sent"] += TRAFFIC.num_bytes - before
        return found

    EpochCheckpoint.on_train_epoch_end = kept  # type: ignore[method-assign]
    em.Anemone.step = counted  # type: ignore[method-assign]
    words = [f"--config={folder / 'all.yaml'}", f"--run_dir={folder}", f"--name={name}", *more]
    assert main(["fit", "--stage=conditional", *words]) == 0
    rows = read_metrics(folder / name / "conditional" / "metrics.csv")
    seen["grown"] = sum(float(row.get("GrowClusters/grown") or 0) for row in rows)
    (folder / f"seen-{name}-{rank}.json").write_text(json.dumps(seen))
    if rank == 0:
        (folder / f"seen-{name}.json").write_text(json.dumps(seen))


def one_run(folder: Path, name: str) -> int:
    """A run of one process, with its latents, or one that is compared with it."""
    more = SETTINGS.get(name.split("-")[0], [])
    found = next((chosen for chosen in RUNS if chosen[0] == name), None)
    if found is None:
        words = ["fit", "--stage=latents", f"--config={folder / 'all.yaml'}", f"--run_dir={folder}", f"--name={name}"]
        code = fork_ranks(lambda rank: main([*words, *more]), 1)
        return max(code, fork_ranks(lambda rank: run(folder, name, rank, *more), 1))
    _, like, size, sharded, before = found
    shutil.copytree(folder / like / "latents", folder / name / "latents")
    shutil.copy(folder / like / "config.yaml", folder / name)
    if before is not None:
        shutil.copytree(folder / f"kept-{before}", folder / name / "conditional")
    given = [*more, f"--trainer.devices={size}", *([CIRCUITS] if sharded else [])]
    return fork_ranks(lambda rank: run(folder, name, rank, *given), size)


if __name__ == "__main__":
    sys.exit(one_run(Path(sys.argv[1]), sys.argv[2]))

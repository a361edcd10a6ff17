"""What a plan says is what a small run on two ranks allocates, sends and writes; run as a script, it is that run."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.processes import as_script, fork_ranks
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from lvd_lightning.cli import main, parse
from lvd_lightning.planning import StagePlan
from lvd_lightning.runs.configuration import experiment_from
from lvd_lightning.runs.plan import make_plan
from lvd_lightning.runs.rates import Rates
from lvd_lightning.traffic import TRAFFIC

CONFIG = """
name: planned
shared: {num_clusters: 3}
data:
  class_path: datamodules.Photos
  init_args: {image_size: 8, num_train: 59, num_val: 15, num_test: 10, batch_size: 14, patch_size: 4}
trainer: {accelerator: cpu, devices: 1, precision: 32-true, max_epochs: 1}
stages:
  teacher:
    model:
      class_path: lvd_lightning.stages.VQVAETeacher
      init_args: {channels: 8, num_residual_blocks: 1, num_features: 4, codebook_size: 8, num_components: 2,
        prior_hidden_size: 8, prior_num_layers: 1, prior_num_heads: 2, num_pictures: 0}
  latents:
    model:
      class_path: lvd_lightning.stages.Latents
      init_args: {num_clusters: "${shared.num_clusters}", pooled: true, batch_size: 16}
  conditional:
    model:
      class_path: lvd_lightning.stages.ConditionalStudent
      init_args: {num_units: 6, num_heads: 2, val_images: 15, min_examples: 2,
        leaf: lvd_lightning.circuits.DiscretizedLogistic}
  prior:
    model: {class_path: lvd_lightning.stages.PriorStudent, init_args: {candidates: 3, val_images: 15}}
  finetune:
    model: {class_path: lvd_lightning.stages.FinetuneStudent, init_args: {val_images: 15}}
"""
STAGES = ("teacher", "latents", "conditional", "prior", "finetune")
TRAINED = ("teacher", "conditional", "prior", "finetune")


def words(folder: Path, *more: str) -> list[str]:
    return [f"--config={folder / 'all.yaml'}", f"--run_dir={folder}", *more]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the configuration alone."""
    planned = tmp_path_factory.mktemp("planned")
    (planned / "all.yaml").write_text(CONFIG)
    return planned


@pytest.fixture(scope="module")
def folder(planned: Path) -> Path:
    """The run of two ranks, with what the first of them had in every stage's steps."""
    result = as_script(__file__, str(planned))
    assert result.returncode == 0, result.stderr
    return planned


@pytest.fixture(scope="module")
def plans(folder: Path) -> dict[str, StagePlan]:
    _, config, _ = parse(["plan", *words(folder)])
    found = {stage.name: stage.plan for stage in make_plan(experiment_from(config), 2).stages}
    assert all(plan is not None for plan in found.values())
    return found  # type: ignore[return-value]


@pytest.fixture(scope="module")
def seen(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "seen.json").read_text())


def test_all_stages_are_planned(plans: dict[str, StagePlan]) -> None:
    assert tuple(plans) == STAGES


@pytest.mark.parametrize("stage", TRAINED)
def test_memory_is_what_is_allocated(stage: str, plans: dict[str, StagePlan], seen: dict[str, Any]) -> None:
    memory = plans[stage].memory
    gradients = memory["gradients" if stage == "teacher" else "flows"]
    assert gradients == seen[stage]["gradients"]
    averages = memory["averages of Adam" if stage == "teacher" else "averages of flows"]
    # Adam keeps the number of steps of every parameter, a number each.
    assert 0 <= seen[stage]["averages"] - averages <= 0.02 * averages
    assert memory["parameters"] == seen[stage]["parameters"]


@pytest.mark.parametrize("stage", TRAINED)
def test_steps_and_what_they_send(stage: str, plans: dict[str, StagePlan], seen: dict[str, Any]) -> None:
    plan = plans[stage]
    assert plan.epochs * plan.steps_per_epoch == seen[stage]["steps"]
    if stage == "teacher":  # DDP's own messages, which nobody counts, are its gradients
        assert plan.sent_per_step > seen[stage]["gradients"]
    else:  # beside flows there are four bytes by which ranks agree who takes part
        assert 0 <= seen[stage]["sent"] - plan.sent_per_step <= 16


@pytest.mark.parametrize("stage", STAGES)
def test_files_have_the_sizes_that_were_said(stage: str, plans: dict[str, StagePlan], folder: Path) -> None:
    written = {path.name: path.stat().st_size for path in (folder / "planned" / stage).rglob("*") if path.is_file()}
    kinds = {"assignments": "assignments_", "features": "features_", "evidence of training images": None}
    for name, size in plans[stage].files.items():
        if name.startswith("evidence"):
            split = "train" if "training" in name else "val"
            folder_of = folder / "planned" / stage / "evidence" / split
            real = sum(path.stat().st_size for path in folder_of.glob("*.npy"))
        else:
            start = kinds.get(name) or name
            real = sum(size for found, size in written.items() if found.startswith(start))
        # Headers, and in checkpoints what Lightning notes beside tensors: less than 40 kB in each.
        assert size <= real * 1.02, (name, size, real)
        assert real - size < 40_000 + 0.1 * size, (name, size, real)


@pytest.mark.parametrize("stage", ["teacher", "conditional", "prior", "finetune"])
def test_parameters_are_those_of_the_figures(stage: str, plans: dict[str, StagePlan], folder: Path) -> None:
    figures = json.loads((folder / "planned" / stage / "done.json").read_text())
    assert plans[stage].parameters == figures["num_parameters"]


def test_one_rank_sends_nothing_and_holds_as_much(planned: Path) -> None:
    _, config, _ = parse(["plan", *words(planned)])
    found = make_plan(experiment_from(config), 1)
    assert all(stage.plan is not None and stage.plan.sent == 0 for stage in found.stages)


def test_rates_of_a_run_give_back_its_seconds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = folder / "rates.yaml"
    assert main(["plan", *words(folder, "--ranks=2", f"--write_rates={rates}")]) == 0
    table = Rates.read(rates)
    _, config, _ = parse(["plan", *words(folder)])
    for stage in make_plan(experiment_from(config), 2).stages:
        assert stage.plan is not None
        spent = json.loads((folder / "planned" / stage.name / "done.json").read_text())["seconds"]
        alone = Rates(work_per_second=table.work_per_second, bandwidth=1e30)
        assert alone.seconds(stage.kind, stage.plan, 2) == pytest.approx(spent)
    capsys.readouterr()
    rates.write_text(rates.read_text().replace("bandwidth_gb_per_second: null", "bandwidth_gb_per_second: 2"))
    assert main(["plan", *words(folder, "--ranks=2", f"--rates={rates}")]) == 0
    assert re.search(r"^conditional .* 0\.0\d$", capsys.readouterr().out, re.M)


def test_without_a_rate_hours_are_unknown(planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rates = planned / "few.yaml"
    rates.write_text("work_per_second: {PriorStudent: 1e6}\n")
    assert main(["plan", *words(planned, f"--rates={rates}")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^conditional .* unknown$", printed, re.M)
    assert "messages:" not in printed  # nobody has said at which bandwidth
    assert re.search(r"^prior .* 0\.0\d$", printed, re.M)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--ranks=15"], "--ranks: 15 ranks do not share batches of 14 examples"),
        (["--ranks=0"], "ranks: got 0, expected"),
        (["--rates=nowhere.yaml"], "--rates nowhere.yaml: there is no such file"),
        (
            ["--stages.conditional", "null"],
            "stages.prior: needs latents, conditionals, which no stage before it leaves",
        ),
        (["--write_rates=there.yaml", "--name=other"], "--write_rates: no stage of"),
    ],
    ids=str,
)
def test_mistakes_are_one_line(more: list[str], said: str, planned: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *words(planned, *more)]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert said in printed


@pytest.mark.parametrize("wrong", ["- 1", "work_per_second: {PriorStudent: fast}", "work_per_second: {}\nspeed: 3"])
def test_a_file_that_is_no_table_of_rates(wrong: str, tmp_path: Path) -> None:
    path = tmp_path / "rates.yaml"
    path.write_text(wrong)
    with pytest.raises(ValueError, match=f"--rates {path}: "):
        Rates.read(path)


def test_published_data_need_not_be_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data of which the sizes are known, and a text whose encoder is known, are planned without either."""
    assert main(["plan", "--config=wikitext2", f"--data.path={tmp_path / 'wikitext-2'}", "--ranks=16"]) == 0
    printed = capsys.readouterr().out
    assert "65,269 train, 6,801 val, 7,674 test (published, not read)" in printed
    assert "1,379,479,999" in printed  # parameters of the published model
    assert "features 3.92 GB" in printed


def test_growth_is_planned_for(planned: Path) -> None:
    """With a callback that grows, the figures are those of the largest circuits, and say so."""
    grow = {"class_path": "callbacks.GrowClusters", "init_args": {"target": 4, "every_n_epochs": 1}}
    content = yaml.safe_load(CONFIG)
    content["stages"]["conditional"]["trainer"] = {"max_epochs": 3, "callbacks": [grow]}
    (planned / "growing.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    plain, growing = (
        make_plan(experiment_from(parse(["plan", f"--config={planned / name}"])[1])).stages[2].plan
        for name in ("all.yaml", "growing.yaml")
    )
    assert plain is not None
    assert growing is not None
    assert 1.2 * plain.parameters < growing.parameters < 4 * plain.parameters  # type: ignore[operator]
    assert growing.leaves["conditionals"].num_states == 12
    assert "grown to 4 heads" in growing.notes[0]


def run(folder: Path, rank: int) -> None:
    """On one rank: all stages, with what optimizers find in every step."""
    from lvd_lightning.runs.pipeline import Pipeline

    torch.set_num_threads(1)
    seen: dict[str, dict[str, int]] = {}
    current, before = [""], [0]
    run_stage = Pipeline._run_stage

    def noted(self: Pipeline, stage: Any) -> None:
        current[0] = stage.name
        run_stage(self, stage)

    def begin(optimizer: Any, *_: object) -> None:
        before[0] = TRAFFIC.num_bytes

    def end(optimizer: Any, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        found = seen.setdefault(current[0], {"steps": 0})
        found["steps"] += 1
        found["sent"] = TRAFFIC.num_bytes - before[0]
        found["parameters"] = sum(p.nbytes for p in parameters)
        sums = [t for circuit in getattr(optimizer, "circuits", ()) for t in circuit.engine.statistics.values()]
        found["gradients"] = sum(p.grad.nbytes for p in parameters) + sum(t.nbytes for t in sums)
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        found["averages"] = sum(t.nbytes for t in states)

    Pipeline._run_stage = noted  # type: ignore[method-assign]
    register_optimizer_step_pre_hook(begin)
    register_optimizer_step_post_hook(end)
    assert main(["fit", *words(folder, "--trainer.devices=2")]) == 0
    if rank == 0:
        (folder / "seen.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    where = Path(sys.argv[1])
    sys.exit(fork_ranks(lambda rank: run(where, rank)))

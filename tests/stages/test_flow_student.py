"""A flow that is distilled, and the same without a teacher: losses, what is inherited, resuming, the report."""

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers.pages import ROOT, blocks
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lvd_lightning import Run
from lvd_lightning.cli import main
from lvd_lightning.context import StageContext
from lvd_lightning.stages import FlowBaseline, FlowStudent, FlowTeacher
from lvd_lightning.stages.flow_student import interpolations
from lvd_lightning.teachers import ImageFlow, TableFlow, load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

COMMON: dict[str, Any] = {"lr": 1e-2, "ema_decay": 0.5, "num_pictures": 0, "bound_examples": 0}
STUDENT: dict[str, Any] = {**COMMON, "num_steps": 2}
ALL_LOSSES: dict[str, Any] = {
    **{"nll_weight": 0.5, "latent_weight": 0.2, "intermediate_weight": 0.2, "synthesis_weight": 0.1},
    **{"synthesis_examples": 4},
}


class Killed(Exception):
    """What stands for a lost machine."""


class KillAtEpoch(Callback):
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            raise Killed


def finished(run: Any, stage: str, kinds: dict[str, tuple[str, ...]]) -> StageContext:
    """The context of a stage after others, by what they leave."""
    return StageContext(run.folder, stage, run.seed, run.data, {}, kinds)


@pytest.fixture
def after_teacher(run: Any) -> StageContext:
    """The context of a student whose teacher is trained for an epoch."""
    run.complete("teacher", FlowTeacher(**COMMON, num_steps=3, num_levels=1, hidden_size=8))
    return finished(run, "student", {"teacher": FlowTeacher.leaves})


@pytest.mark.parametrize(
    ("name", "distance"), [("latent", "l1"), ("intermediate", "l1"), ("synthesis", "l1"), ("synthesis", "features")]
)
def test_a_distance_that_is_minimised_falls(
    name: str, distance: Literal["l1", "features"], run: Any, after_teacher: StageContext
) -> None:
    weights = dict.fromkeys(("nll_weight", "latent_weight", "intermediate_weight", "synthesis_weight"), 0.0)
    module = FlowStudent(**STUDENT, **weights | {f"{name}_weight": 1.0}, synthesis_distance=distance)
    found = []
    for epochs in (1, 5):
        module.begin_stage(after_teacher)
        trainer = run.trainer("student", epochs)
        trainer.fit(module, datamodule=run.data)
        found.append(float(trainer.callback_metrics[f"train/{name}"]))
    assert found[1] < 0.95 * found[0]
    assert {"train/bpd", "val/bpd"} < set(trainer.callback_metrics)


def test_the_loss_is_the_weighted_sum(run: Any, after_teacher: StageContext) -> None:
    x, losses = run.data.splits["train"][:8], {}
    for name in ("nll", "latent", "intermediate", "synthesis"):
        weights = {f"{other}_weight": float(other == name) for other in ("nll", "latent", "intermediate", "synthesis")}
        module = FlowStudent(**STUDENT, **weights)
        module.begin_stage(after_teacher)
        module.log = lambda *_, **__: None  # type: ignore[method-assign]
        generator = torch.Generator().manual_seed(0)
        # Before the latents that are synthesised the noise of the examples is drawn.
        losses[name] = module.loss(x, generator)[0].item()
    module = FlowStudent(**STUDENT, **ALL_LOSSES | {"synthesis_examples": None})
    module.begin_stage(after_teacher)
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    total = module.loss(x, torch.Generator().manual_seed(0))[0].item()
    assert total == pytest.approx(sum(ALL_LOSSES[f"{name}_weight"] * losses[name] for name in losses), rel=1e-5)


def test_a_student_with_its_teachers_steps_that_inherits_everything_begins_as_its_teacher(
    run: Any, after_teacher: StageContext
) -> None:
    module = FlowStudent(**STUDENT | {"num_steps": 3}, inherit_weights=True)
    module.begin_stage(after_teacher)
    images = run.data.splits["val"]
    assert torch.equal(module.averaged.log_prob(images), module.teacher.log_prob(images))
    other = FlowStudent(**STUDENT | {"num_steps": 3}, inherit_permutations=False)
    other.begin_stage(after_teacher)
    theirs, same, others = (
        flow.flow.level_steps(0)[0].convolution.permutation for flow in (module.teacher, module.model, other.model)
    )
    assert torch.equal(theirs, same)
    assert not torch.equal(theirs, others)


def test_training_leaves_the_teacher_as_it_was_and_out_of_checkpoints(run: Any, after_teacher: StageContext) -> None:
    module = FlowStudent(**STUDENT, **ALL_LOSSES)
    module.begin_stage(after_teacher)
    before = {name: tensor.clone() for name, tensor in module.teacher.state_dict().items()}
    run.trainer("student", 1).fit(module, datamodule=run.data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.teacher.state_dict().items())
    assert all(name.startswith(("model.", "average.", "train_", "val_")) for name in module.state_dict())


def test_an_interrupted_student_ends_like_an_uninterrupted_one(run: Any, after_teacher: StageContext) -> None:
    def fit(module: FlowStudent, name: str, checkpoint: Path | None = None, *callbacks: Callback) -> None:
        module.begin_stage(after_teacher)
        saving = ModelCheckpoint(run.folder / name, filename="{epoch}", save_top_k=-1)
        trainer = run.trainer("student", 2, enable_checkpointing=True, callbacks=[saving, *callbacks])
        trainer.fit(module, datamodule=run.data, ckpt_path=checkpoint)

    whole, module = FlowStudent(**STUDENT, **ALL_LOSSES), FlowStudent(**STUDENT, **ALL_LOSSES)
    fit(whole, "whole")
    with pytest.raises(Killed):
        fit(module, "parts", None, KillAtEpoch())
    module = FlowStudent(**STUDENT, **ALL_LOSSES)
    fit(module, "parts", run.folder / "parts" / "epoch=0.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name


def test_the_baseline_has_the_students_size_and_not_its_permutations(run: Any, after_teacher: StageContext) -> None:
    student = FlowStudent(**STUDENT)
    student.begin_stage(after_teacher)
    after_teacher.dir.mkdir()
    figures = student.finish_stage(after_teacher)
    run.finish("student", figures)
    baseline = FlowBaseline(**COMMON)
    context = finished(run, "baseline", {"teacher": FlowTeacher.leaves, "student": FlowStudent.leaves})
    context.dir.mkdir()
    baseline.begin_stage(context)
    trainer = run.trainer("baseline", 2)
    trainer.fit(baseline, datamodule=run.data)
    baseline.finish_stage(context)
    assert baseline.monitor == "val/undistilled_bpd"
    assert baseline.monitor in trainer.callback_metrics
    found = json.loads((context.dir / "baseline.json").read_text())["undistilled"]
    assert found["num_parameters"] == figures["num_parameters"]
    assert found["seconds"] > 0
    kept = load_teacher(context.dir / "undistilled")
    assert isinstance(kept, ImageFlow)
    assert kept.init_args == student.model.init_args
    ours, theirs = (flow.flow.level_steps(0)[1].convolution.permutation for flow in (kept, student.model))
    assert not torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="is no flow: put a FlowStudent before this stage"):
        FlowBaseline().begin_stage(finished(run, "baseline", {"latents": ("model",)}))


def test_interpolations_begin_and_end_at_their_images(after_teacher: StageContext, run: Any) -> None:
    flow = load_teacher(after_teacher.required("flow"))
    assert isinstance(flow, ImageFlow)
    images = run.data.splits["val"][:4]
    rows = interpolations(flow, images, 5)
    assert rows.shape == (2, 5, 3, 4, 4)
    for end, first in ((0, 0), (-1, 1)):
        assert (rows[:, end].int() - images[first::2].int()).abs().max() <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"inherit_permutations": False, "inherit_weights": True}, "inherit_weights: got True without"),
        ({"nll_weight": 0.0, "latent_weight": 0.0}, "nll_weight, .* all are 0"),
        ({"synthesis_distance": "l2"}, "synthesis_distance: got 'l2', expected one of l1, features"),
        ({"latent_weight": -1.0}, "latent_weight: got -1.0, expected at least 0"),
    ],
)
def test_settings_that_contradict_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlowStudent(**settings)


def test_a_student_of_more_steps_than_its_teacher_is_refused(after_teacher: StageContext) -> None:
    with pytest.raises(ValueError, match="num_steps: got 4 for a student of a flow of 3 steps"):
        FlowStudent(num_steps=4).begin_stage(after_teacher)


def test_a_run_on_a_table_reports_all_three_flows_and_the_page_opens_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "fit",
        "--config=flow_tabular",
        "--run_dir=runs",
        "--trainer.accelerator=cpu",
        "--data.table=wine",
    ]
    epochs = [f"--stages.{name}.trainer.max_epochs=2" for name in ("teacher", "student", "baseline")]
    assert main([*arguments, *epochs, "--stages.student.model.synthesis_examples=4"]) == 0
    run = Run.open("runs/flow_tabular")
    figures = run.figures()
    model = run.model()
    assert isinstance(model, TableFlow)
    rows = run.data().batch("test", torch.arange(18))
    assert figures["test"]["nats"] == pytest.approx(model.log_prob(rows).mean().item(), rel=1e-4)
    teacher = load_teacher(run.dir / "teacher")
    assert figures["teacher"]["nats"] == pytest.approx(teacher.log_prob(rows).mean().item(), rel=1e-4)
    undistilled = load_teacher(run.dir / "baseline" / "undistilled")
    assert figures["baseline"]["undistilled"]["nats"] == pytest.approx(
        undistilled.log_prob(rows).mean().item(), rel=1e-4
    )
    assert figures["teacher"]["num_parameters"] > figures["test"]["num_parameters"]
    assert model.init_args["orders"] == [teacher.init_args["orders"][step] for step in (0, 2, 4)]
    assert "num_draws" not in figures["test"]
    markdown = (run.dir / "report" / "summary.md").read_text()
    assert "| teacher flow |" in markdown
    assert "| student flow |" in markdown
    assert "| baseline, undistilled |" in markdown
    for code in blocks("python", ROOT / "docs" / "flows.md"):
        exec(compile(code, "flows.md", "exec"), {})

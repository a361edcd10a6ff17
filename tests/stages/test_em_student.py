"""What the circuit students share: checked settings, a falling step size, assignments that fit the data."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.small_runs import Run, SmallImages
from lightning.pytorch import Callback, LightningModule, Trainer

import lvd_lightning.circuits as pc
from lvd_lightning.latents import load_assignments
from lvd_lightning.latents.assignments import (
    assignments_folder,
    read_assignments,
    read_clusters,
    write_assignments,
)
from lvd_lightning.stages import CircuitBaseline, ConditionalStudent, FinetuneStudent, PriorStudent
from lvd_lightning.stages.em_student import EMStudent, make_optimizer, step_factor

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


class StepSizes(Callback):
    """What the optimizer is given in every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_a_student_without_circuits_to_train_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract.*trained"):
        EMStudent()  # type: ignore[abstract]


def test_the_step_size_falls_linearly(run: Any) -> None:
    steps = StepSizes()
    run.train("conditional", ConditionalStudent(2, lr=0.5, final_lr=0.1, val_images=1), 2, callbacks=[steps])
    assert steps.seen == pytest.approx(torch.linspace(0.5, 0.1, 6).tolist())


def test_the_step_size_falls_anew_in_every_round() -> None:
    """Rounds of four steps, the last one shorter: each begins at 1 and ends at the ratio."""
    found = [step_factor(step, 10, 0.1, 4.0) for step in range(10)]
    assert found == pytest.approx([1.0, 0.7, 0.4, 0.1, 1.0, 0.7, 0.4, 0.1, 1.0, 0.1])
    assert [step_factor(step, 4, 0.1, 4.0) for step in range(4)] == [step_factor(step, 4, 0.1) for step in range(4)]
    assert step_factor(20, 10, 0.1) == pytest.approx(0.1)


def test_an_endless_trainer_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="stage conditional: set max_epochs"):
        run.train("conditional", ConditionalStudent(2), -1)


def test_the_step_generator_is_a_function_of_epoch_and_batch(run: Any) -> None:
    module = run.begin("conditional", ConditionalStudent(2))
    module.trainer = run.trainer("conditional")
    drawn = [torch.rand(3, generator=module.step_generator(number)) for number in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_settings_are_kept() -> None:
    module = ConditionalStudent(num_units=5, lr=0.25)
    assert module.hparams["num_units"] == 5
    assert (module.hparams["lr"], module.hparams["final_lr"]) == (0.25, 0.03)


@pytest.mark.parametrize("student", [ConditionalStudent, PriorStudent, FinetuneStudent])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: got 'adam', expected one of anemone, em"),
        ({"lr": -0.1}, "lr: got -0.1, expected a step size"),
        ({"lr": 1.5}, "lr: got 1.5"),
        ({"lr": float("nan")}, "lr: got nan"),
        ({"final_lr": 0.0}, "final_lr: got 0.0, expected a step size above 0"),
        ({"lr": 0.1, "final_lr": 0.2}, "final_lr: got 0.2, .* at most lr, which is 0.1"),
        ({"momentum": 1.0}, "momentum: got 1.0"),
        ({"pseudocount": -1.0}, "pseudocount: got -1.0, expected at least 0"),
        ({"val_images": 0}, "val_images: got 0, expected a whole number of at least 1"),
    ],
)
def test_wrong_settings_are_named(student: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student(**settings)


@pytest.mark.parametrize(
    ("student", "settings", "message"),
    [
        (ConditionalStudent, {"init": "zeros"}, "init: got 'zeros'"),
        (ConditionalStudent, {"slots": 0}, "slots: got 0"),
        (ConditionalStudent, {"num_units": 0}, "num_units: got 0"),
        (ConditionalStudent, {"max_examples": 0}, "max_examples: got 0"),
        (PriorStudent, {"candidates": 0}, "candidates: got 0"),
        (PriorStudent, {"num_units": 0}, "num_units: got 0"),
        (PriorStudent, {"hard_epochs": -1}, "hard_epochs: got -1"),
        (PriorStudent, {"counts_pseudocount": 0}, "counts_pseudocount: got 0"),
        (FinetuneStudent, {"margin": 0}, "margin: got 0"),
        (FinetuneStudent, {"posterior_floor": 1}, "posterior_floor: got 1"),
        (FinetuneStudent, {"slots": -1}, "slots: got -1"),
        (CircuitBaseline, {"structure": "rat"}, "structure: got 'rat'"),
        (CircuitBaseline, {"init": "zeros"}, "init: got 'zeros'"),
        (CircuitBaseline, {"em_lr": 2.0}, "em_lr: got 2.0"),
        (CircuitBaseline, {"anemone_lr": 0.0}, "anemone_lr: got 0.0"),
        (CircuitBaseline, {"momentum": -0.5}, "momentum: got -0.5"),
        (CircuitBaseline, {"em_pseudocount": -1}, "em_pseudocount: got -1"),
        (CircuitBaseline, {"batch_size": 0}, "batch_size: got 0"),
        (CircuitBaseline, {"num_units": 0}, "num_units: got 0"),
        (CircuitBaseline, {"seconds": -1.0}, "seconds: got -1.0"),
    ],
)
def test_wrong_settings_of_one_student_are_named(student: type[Any], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student(**settings)


def test_a_step_that_is_refused_says_where_it_was(run: Any) -> None:
    class Explodes(ConditionalStudent):
        def em_step(self, *losses: torch.Tensor) -> None:
            bad = torch.nan if self.global_step == 2 else 1.0
            super().em_step(*(loss * bad for loss in losses))

    with pytest.raises(ValueError, match=r"^stage conditional, epoch 1, step 2: Anemone: the step is refused"):
        run.train("conditional", Explodes(num_units=2, tied=True))


def test_optimizers_by_name() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3)))
    anemone, em = (make_optimizer(rule, circuit, 0.3, 0.5, 0.1) for rule in ("anemone", "em"))
    assert isinstance(anemone, pc.Anemone)
    assert isinstance(em, pc.CircuitEM)
    assert (anemone.defaults["lr"], anemone.defaults["momentum"], anemone.defaults["pseudocount"]) == (0.3, 0.5, 0.1)
    with pytest.raises(ValueError, match="optimizer: got 'sgd', expected one of anemone, em"):
        make_optimizer("sgd", circuit, 0.3, 0.5, 0.1)  # type: ignore[arg-type]


def test_assignments_that_do_not_fit_the_data_are_named(run: Any) -> None:
    context = run.context("conditional")
    z, num_states = read_assignments(context)
    assert num_states == 3
    assert torch.equal(z["val"], run.data.z["val"])
    run.data.splits["val"] = run.data.splits["val"][:-1]
    with pytest.raises(ValueError, match=r"holds latents of \(24, 4\) .* for val, the data have \(23, 4\)"):
        read_assignments(context)


@pytest.mark.parametrize("student", [ConditionalStudent, PriorStudent])
def test_patches_that_do_not_tile_the_images_are_named(run: Any, student: type[Any]) -> None:
    (run.folder / "conditional").mkdir()
    run.finish("conditional", {})
    run.data.patch_size = 3
    with pytest.raises(ValueError, match="patch_size: 3 does not tile images of 4 x 4"):
        student().begin_stage(run.context("prior"))


@pytest.mark.parametrize(
    ("stage", "student", "missing"),
    [
        ("conditional", ConditionalStudent, "latents"),
        ("prior", PriorStudent, "latents"),
        ("finetune", FinetuneStudent, "model"),
    ],
)
def test_missing_stages_are_named(run: Any, stage: str, student: type[Any], missing: str) -> None:
    shutil.rmtree(run.folder / "latents")
    with pytest.raises(ValueError, match=f"stage '{stage}' needs {missing}; no stage before it"):
        run.begin(stage, student())


def test_damaged_assignments_are_named(run: Any) -> None:
    np.save(run.folder / "latents" / "assignments_train.npy", np.full((120, 4), 7, np.int32))
    with pytest.raises(ValueError, match="holds 7..7, expected 0..2"):
        run.begin("conditional", ConditionalStudent())


def test_assignments_of_the_conditional_go_before_clusters(run: Any) -> None:
    """Later stages read the heads that stage conditional grew; its own begin_stage reads the clusters."""
    folder, context = run.folder / "conditional", run.context("prior")
    folder.mkdir()
    assert assignments_folder(context) == run.folder / "latents"
    heads = {split: 2 * z + 1 for split, z in run.data.z.items()}
    write_assignments(folder, heads, 6)
    assert torch.equal(read_assignments(context)[0]["train"], run.data.z["train"])  # not finished
    run.finish("conditional", {})
    context = run.context("prior")
    found, num_states = read_assignments(context)
    assert num_states == 6
    assert torch.equal(found["train"], heads["train"])
    assert torch.equal(load_assignments(folder, "test"), heads["test"])
    assert assignments_folder(context) == folder
    clusters, num_clusters = read_clusters(context, "test")
    assert (num_clusters, list(clusters)) == (3, ["test"])
    assert torch.equal(clusters["test"], run.data.z["test"])


def test_without_assignments_there_is_no_folder(run: Any) -> None:
    shutil.rmtree(run.folder / "latents")
    assert assignments_folder(run.context("prior")) is None


def test_flows_of_several_batches_make_one_step(tmp_path: Path) -> None:
    """Three batches of 40 images are as good as one of 120, and so is a rest at the end of an epoch."""
    found = {}
    for name, batch_size, batches in (("one", 120, 1), ("three", 40, 3), ("rest", 40, 5)):
        run = Run(tmp_path / name, SmallImages(batch_size=batch_size))
        run.complete("conditional", ConditionalStudent(num_units=2, init="random"), 1)
        run.data = SmallImages(batch_size=batch_size)
        module = PriorStudent(num_units=2, hard_epochs=2)
        module.batches_per_step = batches
        trainer = run.train("prior", module, 2)
        assert trainer.global_step == 2
        found[name] = [table.detach().clone() for table in module.assembled.prior.tables]
    for name in ("three", "rest"):
        for one, other in zip(found["one"], found[name], strict=True):
            torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)

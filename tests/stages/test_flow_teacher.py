"""The stage of a flow: it learns, resumes exactly, averages, guards, hands on what it learned."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from datamodules import SklearnTable
from lvd_lightning.context import StageContext
from lvd_lightning.stages import FlowTeacher
from lvd_lightning.stages.flow_stage import picture_rows
from lvd_lightning.teachers import ImageFlow, TableFlow, load_teacher

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

SMALL: dict[str, Any] = {
    **{"num_steps": 2, "num_levels": 1, "hidden_size": 8, "lr": 1e-2, "ema_decay": 0.9, "num_pictures": 3},
    **{"bound_examples": 2},
}


class Killed(Exception):
    """What stands for a lost machine."""


class KillAtEpoch(Callback):
    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            raise Killed


def test_the_bound_gets_better_and_the_teacher_is_handed_on(run: Any) -> None:
    module = FlowTeacher(**SMALL)
    run.begin("teacher", module)
    context = run.context("teacher")
    before = module.figures(context)
    trainer = run.train("teacher", module, epochs=6)
    figures = module.finish_stage(context)
    assert figures["val_bpd"] < before["val_bpd"] - 0.3
    assert figures["val_bpd"] == pytest.approx(trainer.callback_metrics["val/bpd"].item(), abs=0.02)  # other draws
    assert figures["few_importance_bpd"] < figures["few_bound_bpd"]
    assert figures["num_draws"] == 1
    assert min(figures["densities_per_second"], figures["samples_per_second"]) > 0
    loaded = load_teacher(context.dir)
    assert isinstance(loaded, ImageFlow)
    images = run.data.splits["val"]
    assert torch.equal(loaded.log_prob(images), module.averaged.log_prob(images))
    assert loaded.features(images).shape == (24, 4, 12)
    assert (context.dir / "pictures" / "epoch_005.png").is_file()


def test_an_interrupted_run_ends_like_an_uninterrupted_one(run: Any) -> None:
    def trainer(name: str, *callbacks: Callback) -> Trainer:
        saving = ModelCheckpoint(run.folder / name, filename="{epoch}", save_top_k=-1)
        return run.trainer("teacher", 3, enable_checkpointing=True, callbacks=[saving, *callbacks])

    settings = SMALL | {"dequantization": "variational", "num_pictures": 0}
    whole, module = FlowTeacher(**settings), FlowTeacher(**settings)
    trainer("whole").fit(run.begin("teacher", whole), datamodule=run.data)
    with pytest.raises(Killed):
        trainer("parts", KillAtEpoch(2)).fit(run.begin("teacher", module), datamodule=run.data)
    torch.manual_seed(99)
    module = FlowTeacher(**settings)
    checkpoint = run.folder / "parts" / "epoch=1.ckpt"
    torch.load(checkpoint, weights_only=True)
    trainer("parts").fit(run.begin("teacher", module), datamodule=run.data, ckpt_path=checkpoint)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, module.state_dict()[name]), name
    assert not torch.equal(
        whole.model.flow.levels[0].steps[0].norm.shift, whole.averaged.flow.levels[0].steps[0].norm.shift
    )


def test_the_seed_decides(make_run: Any, tmp_path: Path) -> None:
    found = []
    for number, seed in enumerate([0, 0, 1]):
        module = FlowTeacher(**SMALL)
        make_run(tmp_path / str(number), seed=seed).train("teacher", module)
        found.append(module.averaged.flow.levels[0].steps[1].coupling.last.weight)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_gradient_that_is_not_finite_names_the_layer_and_changes_nothing(run: Any) -> None:
    class Breaks(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 1:
                pl_module.model.flow.level_steps(0)[1].coupling.body[2].weight.data[0] = float("nan")
                self.kept = pl_module.model.flow.level_steps(0)[0].norm.shift.clone()

    module, breaks = FlowTeacher(**SMALL), Breaks()
    with pytest.raises(
        ValueError, match=r"epoch 1, step 2: .* flow.levels.0.steps.1.coupling.body.2 gives NaN"
    ) as error:
        run.train("teacher", module, callbacks=[breaks])
    assert "lower lr" in str(error.value)
    assert torch.equal(module.model.flow.level_steps(0)[0].norm.shift, breaks.kept)


def test_gradients_are_cut_to_a_norm_that_the_trainer_may_set(run: Any) -> None:
    norms = []

    class Looks(Callback):
        def on_before_zero_grad(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
            gradients = [p.grad for p in pl_module.model.parameters() if p.grad is not None]
            if gradients:
                norms.append(float(torch.nn.utils.get_total_norm(gradients)))

    run.train("teacher", FlowTeacher(**SMALL, clip_norm=1e-3), callbacks=[Looks()])
    run.train("teacher", FlowTeacher(**SMALL), callbacks=[Looks()], gradient_clip_val=1e-4)
    assert norms
    assert [round(norm, 5) for norm in norms] == [1e-3] * (len(norms) // 2) + [1e-4] * (len(norms) // 2)


def test_without_a_decay_the_average_is_the_model(run: Any) -> None:
    module = FlowTeacher(**SMALL | {"ema_decay": 0.0})
    run.train("teacher", module)
    for trained, averaged in zip(module.model.parameters(), module.averaged.parameters(), strict=True):
        assert torch.equal(trained, averaged)


def test_a_flow_trains_in_double_precision(run: Any) -> None:
    module = FlowTeacher(**SMALL)
    run.train("teacher", module, precision="64-true")
    assert next(module.model.parameters()).dtype == torch.float64


@pytest.mark.parametrize("flow", ["maf", "nsf", "realnvp"])
def test_a_flow_of_a_table_gets_better(flow: str, tmp_path: Path, make_run: Any) -> None:
    data = SklearnTable("wine", batch_size=48)
    data.setup()
    context = StageContext(tmp_path, "teacher", 0, data)
    module = FlowTeacher(flow=flow, num_steps=2, hidden_size=8, num_hidden_layers=1, lr=1e-2, ema_decay=0.5)
    module.begin_stage(context)
    before = module.figures(context)["val_nats"]
    make_run(tmp_path).trainer("teacher", 10).fit(module, datamodule=data)
    context.dir.mkdir(exist_ok=True)
    figures = module.finish_stage(context)
    assert figures["val_nats"] > before + 1
    assert "num_draws" not in figures
    loaded = load_teacher(context.dir)
    assert isinstance(loaded, TableFlow)
    assert loaded.init_args["kind"] == flow


def test_a_flow_of_other_data_and_settings_out_of_range_are_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="flow: got 'maf' for data of ImagePatches, expected glow, or null"):
        FlowTeacher(flow="maf").check_data(run.data)
    with pytest.raises(
        ValueError, match="flow: got 'glow' for data of Columns, expected maf or nsf or realnvp, or null"
    ):
        FlowTeacher(flow="glow").check_data(SklearnTable())
    for settings, message in (
        ({"lr": 0.0}, "lr: got 0.0, expected more than 0"),
        ({"final_lr": 1.0}, "final_lr: got 1.0, expected 0 to 0.0005"),
        ({"ema_decay": 1.0}, "ema_decay: got 1.0, expected at least 0 and less than 1"),
        ({"optimizer": "sgd"}, "optimizer: got 'sgd', expected one of adam, adamax"),
        ({"num_steps": 0}, "num_steps: got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            FlowTeacher(**settings)


def test_pictures_stand_in_rows() -> None:
    images = torch.arange(3, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    assert picture_rows(images, 2)[:, :, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 0, 0]] * 2

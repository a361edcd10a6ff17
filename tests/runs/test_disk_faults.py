"""Disks that are full, cannot be written or go away, a clock that jumps: one line, and the last good state stays."""

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.full_disk import full_disk
from lightning.pytorch import LightningModule, Trainer

from lvd_lightning import cli
from lvd_lightning.events import events_path, read_events
from lvd_lightning.runs.checkpoint import EpochCheckpoint
from lvd_lightning.runs.step_checkpoint import StepCheckpoint
from lvd_lightning.runs.still_there import StillThere
from lvd_lightning.runs.stopwatch import Stopwatch

TINY = [
    *("--config=photos", "--stage=teacher", "--trainer.accelerator=cpu", "--trainer.devices=1"),
    *("--data.image_size=8", "--data.num_train=32", "--data.num_val=8", "--data.num_test=8", "--data.batch_size=16"),
    *("--stages.teacher.trainer.max_epochs=2", "--stages.teacher.model.num_pictures=0"),
    *(f"--stages.teacher.model.{name}=8" for name in ("hidden_size", "intermediate_size", "decoder_hidden_size")),
    *(f"--stages.teacher.model.{name}=1" for name in ("num_layers", "num_heads", "decoder_num_layers")),
    "--stages.teacher.model.decoder_num_heads=1",
]


@pytest.fixture
def trainer() -> Trainer:
    found = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=False)
    module = LightningModule()
    module.weight = torch.nn.Parameter(torch.zeros(5000))
    found.strategy.connect(module)
    return found


@pytest.mark.parametrize("kind", ["epoch", "step"])
def test_a_full_disk_names_the_checkpoint_and_leaves_the_last_one(trainer: Trainer, tmp_path: Path, kind: str) -> None:
    epochs, steps = EpochCheckpoint(tmp_path, "val/bpd"), StepCheckpoint(tmp_path, None)

    def save() -> None:
        if kind == "epoch":
            epochs.on_train_epoch_end(trainer, trainer.lightning_module)
        else:
            steps._save(trainer)

    name = "last.ckpt" if kind == "epoch" else "step.ckpt"
    save()
    before = (tmp_path / name).read_bytes()
    with pytest.raises(OSError, match=name) as raised, full_disk():
        save()
    assert raised.value.errno
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_bytes() == before
    assert torch.load(tmp_path / name, weights_only=True)["state_dict"]["weight"].shape == (5000,)


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "runs").write_text("a file, where the folder of runs should be")
    assert cli.main(["fit", *TINY, f"--run_dir={tmp_path / 'runs'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert f"{tmp_path / 'runs'}" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("fault", ["vanishes", "full"])
def test_a_disk_that_fails_in_training_is_one_line_and_the_run_goes_on_from_before(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, away = tmp_path / "photos" / "teacher", tmp_path / "away"
    save = EpochCheckpoint.on_train_epoch_end

    def fails(self: EpochCheckpoint, trainer: Trainer, module: LightningModule) -> None:
        if fault == "full" and trainer.current_epoch == 1:
            with full_disk():
                save(self, trainer, module)
        save(self, trainer, module)
        if fault == "vanishes":
            stage.parent.rename(away)

    clock = time.time
    with monkeypatch.context() as patch:
        patch.setattr(EpochCheckpoint, "on_train_epoch_end", fails)
        patch.setattr(time, "time", lambda: clock() - 86_400 * (time.monotonic_ns() % 2))  # a clock that jumps by days
        assert cli.main(["fit", *TINY, f"--run_dir={tmp_path}"]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert str(stage) in said[0]
    if fault == "vanishes":
        assert "was removed, or its disk is gone" in said[0] or "No such file or directory" in said[0]
        assert not stage.exists()
        away.rename(stage.parent)
    else:
        assert "best.ckpt" in said[0] or "last.ckpt" in said[0]
    assert cli.main(["fit", *TINY, f"--run_dir={tmp_path}"]) == 0
    assert "teacher: goes on after epoch 1" in capsys.readouterr().out
    events = [line["event"] for line in read_events(events_path(stage.parent))]
    assert events.count("start") == 2
    assert ("error" in events) == (fault == "full")  # where there was a disk to write it on
    seconds = [line["uptime"] for line in read_events(events_path(stage.parent))]
    assert seconds == sorted(seconds)


def test_a_stage_whose_folder_is_a_new_one_does_not_go_on(trainer: Trainer, tmp_path: Path) -> None:
    look, module = StillThere(tmp_path / "teacher"), trainer.lightning_module
    (tmp_path / "teacher" / "pictures").mkdir(parents=True)
    with pytest.raises(ValueError, match="teacher was removed"):
        look.on_train_epoch_start(trainer, module)
    (tmp_path / "teacher" / "config.yaml").touch()
    look.on_train_epoch_end(trainer, module)
    shutil.rmtree(tmp_path / "teacher")
    with pytest.raises(ValueError, match="teacher was removed"):
        look.on_train_epoch_end(trainer, module)


def test_seconds_are_those_of_no_clock_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    watch: Any = Stopwatch()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before = watch.seconds
    assert 0 <= before <= watch.seconds < 60

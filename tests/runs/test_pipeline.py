"""Tests of the stage pipeline with small stages; run as a script, it is a run that is killed and restarted."""

import csv
import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import as_script, exit_codes
from helpers.run_content import without_times
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, TensorDataset
from torchmetrics import MeanMetric

from lvd_lightning import circuits as pc
from lvd_lightning.context import StageContext
from lvd_lightning.events import events_path, read_events
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.checkpoint import EpochCheckpoint
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.metrics_file import MetricsFile, read_metrics
from lvd_lightning.runs.pipeline import Pipeline, load_best
from lvd_lightning.runs.resuming import Resumption, where_to_resume
from lvd_lightning.runs.run_directory import check_trained_with, record_stage
from lvd_lightning.runs.step_checkpoint import STEP_CHECKPOINT, WITHIN
from lvd_lightning.seeds import derive_seed
from lvd_lightning.stages.stage import PlainStage, StageModule
from lvd_lightning.units import BitsPerDimension

KILLS = (("teacher", "batch"), ("codes", "function"), ("student", "between"), ("tuned", "finish"))


class ShuffledBatches(Sampler[int]):
    """An order that is a function of the epoch alone."""

    epoch = 0

    def __init__(self, num_examples: int) -> None:
        self.num_examples = num_examples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed("order", self.epoch))
        return iter(torch.randperm(self.num_examples, generator=generator).tolist())

    def __len__(self) -> int:
        return self.num_examples


class Lines(LightningDataModule):
    """Points of a noisy plane. Making it draws from the global generator, as careless datamodules do."""

    unit, protocol, facts = BitsPerDimension(), "", {}

    def setup(self, stage: str) -> None:
        torch.randn(3)
        x = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
        self.points = TensorDataset(x, x @ torch.tensor([1.0, -2.0]) + 0.5)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.points, batch_size=8, sampler=ShuffledBatches(24))

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.points, batch_size=24)


class Plane(StageModule):
    """A regression with dropout and momentum, so that lost random or optimizer state would show."""

    leaves = ("plane",)

    def __init__(self, kill: "KillOnce | None" = None) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.final = MeanMetric()
        self.kill = kill

    def begin_stage(self, context: StageContext) -> None:
        earlier = context.artefact("shift")
        self.shift = 0.0 if earlier is None else float((earlier / "shift.txt").read_text())

    def _loss(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return (torch.nn.functional.dropout(self.layer(x)[:, 0], 0.2, self.training) - y - self.shift).square().mean()

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/bpd", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/bpd", self._loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=3)]

    def finish_stage(self, context: StageContext) -> dict[str, float]:
        if self.kill is not None:
            self.kill("finish")
        torch.save(self.layer.state_dict(), context.dir / "layer.pt")
        self.final.update(self._loss(list(context.data.points[:])).detach())
        return {"val_bpd": float(self.final.compute())}


class KillOnce:
    """Kills this process the first time a point of a stage is reached; a file remembers that it did."""

    def __init__(self, folder: Path, stage: str, armed: bool) -> None:
        self.marker = folder / f"killed-{stage}"
        self.point = dict(KILLS)[stage] if armed else ""

    def __call__(self, point: str) -> None:
        if point == self.point and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KillInTraining(Callback):
    """Calls `kill` in the middle of the second epoch and, by way of the checkpoint, between its two files."""

    def __init__(self, kill: KillOnce) -> None:
        self.kill = kill

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *rest: Any) -> None:
        if trainer.current_epoch == 1 and rest[-1] == 1:
            self.kill("batch")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checkpoint = next(c for c in trainer.callbacks if isinstance(c, EpochCheckpoint))
        # The best file of this epoch is there, the last one is still that of the epoch before.
        if trainer.current_epoch == 1 and self.kill.point == "between" and not self.kill.marker.exists():
            checkpoint.best_score = float("inf")
            trainer.save_checkpoint(checkpoint.best_path)
            self.kill("between")


class Shift(PlainStage):
    """Hands on a random number."""

    leaves = ("shift",)

    def __init__(self, kill: KillOnce) -> None:
        self.kill = kill

    def run(self, context: StageContext) -> dict[str, float]:
        self.kill("function")
        shift = float(torch.rand((), generator=context.generator("shift")))
        (context.dir / "shift.txt").write_text(str(shift))
        return {"shift": shift}


def experiment(run_dir: Path, kill: bool = False, epochs: int = 3, seed: int = 0, devices: int = 1) -> Experiment:
    """Four stages: a module, a plain stage, and two modules that read what the plain one wrote."""

    def stage(name: str) -> PlannedStage:
        killer = KillOnce(run_dir.parent, name, kill)
        config = {"seed": seed, "epochs": epochs}
        if name == "codes":
            return PlannedStage(name, Shift, config, Lines, partial(Shift, killer))
        return PlannedStage(name, Plane, config, Lines, partial(Plane, killer), trainer=partial(arguments, killer))

    def arguments(killer: KillOnce, folder: Path) -> dict[str, Any]:
        return {"max_epochs": epochs, "callbacks": [KillInTraining(killer)], "log_every_n_steps": 1}

    stages = tuple(stage(name) for name, _ in KILLS)
    return Experiment("toy", run_dir, seed, Lines, stages, devices={"accelerator": "cpu", "devices": devices})


def run(settings: Experiment, **options: Any) -> None:
    ranks = Ranks(settings.devices)
    Pipeline(settings, ranks).run(**options)
    ranks.close()


def record(run_dir: Path) -> dict[str, Any]:
    """Everything a run leaves behind but its times."""
    found: dict[str, Any] = {}
    for path in sorted(run_dir.rglob("*.*")):
        key = str(path.relative_to(run_dir))
        if key.startswith("report"):
            found[key] = path.name  # all about times here
            continue
        if path.name == "done.json":
            found[key] = {name: value for name, value in json.loads(path.read_text()).items() if name != "seconds"}
        elif path.name == "metrics.csv":
            found[key] = without_times(read_metrics(path))
        elif path.suffix == ".jsonl":
            continue  # what happened when
        elif path.suffix in (".ckpt", ".pt"):
            content = torch.load(path, weights_only=True)
            found[key] = {name: value.tolist() for name, value in content.get("state_dict", content).items()}
        else:
            found[key] = path.read_text()
    return found


@pytest.fixture
def quiet_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("quiet_threads")
class TestOneProcess:
    def test_stages_hand_on_files_and_finished_ones_are_skipped(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run(experiment(tmp_path / "run"))
        first = record(tmp_path / "run")
        assert first["student/done.json"]["val_bpd"] != first["teacher/done.json"]["val_bpd"]
        assert [row["epoch"] for row in first["student/metrics.csv"] if row["val/bpd"]] == ["0", "1", "2"]
        capsys.readouterr()
        run(experiment(tmp_path / "run"))
        assert capsys.readouterr().out.count("finished before, skipped") == 4
        assert record(tmp_path / "run") == first

    def test_best_epoch_is_handed_on(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        rows = read_metrics(tmp_path / "run/teacher/metrics.csv")
        best = min(float(row["val/bpd"]) for row in rows if row["val/bpd"])
        result = json.loads((tmp_path / "run/teacher/done.json").read_text())
        assert result["val_bpd"] == pytest.approx(best, rel=1e-5)
        assert result["seconds"] >= float(rows[-1]["seconds"]) > 0

    def test_one_stage_needs_the_stages_before(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="run stage 'codes' first"):
            run(experiment(tmp_path / "run"), only="student")
        with pytest.raises(ValueError, match="has no stage 'studnet'; its stages are teacher, codes"):
            run(experiment(tmp_path / "run"), only="studnet")

    def test_unreadable_checkpoint_starts_the_stage_again(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        whole = record(tmp_path / "run")
        last = tmp_path / "run/teacher/last.ckpt"
        content = last.read_bytes()
        last.unlink()
        last.write_bytes(content[: len(content) // 2])
        (tmp_path / "run/teacher/done.json").unlink()
        with pytest.warns(
            UserWarning, match="not a complete checkpoint: an earlier one is taken, or the stage starts again"
        ):
            run(experiment(tmp_path / "run"), only="teacher")
        assert record(tmp_path / "run") == whole

    def test_moved_run_directory_goes_on(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        whole = record(tmp_path / "run")
        (tmp_path / "run/teacher/done.json").unlink()
        (tmp_path / "run").rename(tmp_path / "moved")
        run(experiment(tmp_path / "moved"), only="teacher")
        assert record(tmp_path / "moved") == whole


class Interrupt(Callback):
    """Ctrl-C in the second epoch."""

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("quiet_threads")
def test_an_interruption_is_one_and_the_run_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = experiment(tmp_path / "run")
    teacher = settings.stages[0]
    interrupted = dataclasses.replace(teacher, trainer=lambda _: {"max_epochs": 3, "callbacks": [Interrupt()]})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(dataclasses.replace(settings, stages=(interrupted,)))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    run(settings, only="teacher")
    assert "teacher: goes on after epoch 1" in capsys.readouterr().out


def test_evaluation_on_other_data_is_refused(tmp_path: Path) -> None:
    def made(path: str, batch_size: int, color: str) -> Experiment:
        arguments = {"path": path, "batch_size": batch_size, "color": color}
        config = {"seed": 0, "shared": {"color": color}, "data": {"class_path": "Folder", "init_args": arguments}}
        return Experiment("toy", tmp_path / "run", 0, Lines, (PlannedStage("tuned", Plane, config, Lines, Plane),))

    trained = made("here", 4, "rgb")
    record_stage(trained, trained.stages[0])
    check_trained_with(made("there", 8, "rgb"), "tuned")
    with pytest.raises(ValueError, match=r"trained with other settings \(data.init_args"):
        check_trained_with(made("here", 4, "ycocg_r"), "tuned")


@pytest.mark.usefixtures("quiet_threads")
class TestChangedConfiguration:
    def test_results_do_not_outlive_what_they_were_made_of(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        run(experiment(tmp_path / "run"), only="codes")
        shutil.rmtree(tmp_path / "run/teacher")
        with pytest.raises(ValueError, match=r"stage 'teacher' has no result there\), and 'codes' has a result"):
            run(experiment(tmp_path / "run"))
        run(experiment(tmp_path / "run"), only="teacher", changed="restart")
        assert not (tmp_path / "run/codes").exists()

    def test_is_refused_with_the_keys(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        with pytest.raises(ValueError, match=r"teacher: epochs 3 -> 2\).*--name.*--changed restart"):
            run(experiment(tmp_path / "run", epochs=2), only="teacher")

    def test_restart_does_the_changed_stage_again(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        run(experiment(tmp_path / "run", epochs=2), only="teacher", changed="restart")
        assert max(float(row["epoch"]) for row in read_metrics(tmp_path / "run/teacher/metrics.csv")) == 1

    def test_continue_keeps_it(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        run(experiment(tmp_path / "run", epochs=2), only="codes", changed="continue")
        run(experiment(tmp_path / "run", epochs=2), only="student")
        assert max(float(row["epoch"]) for row in read_metrics(tmp_path / "run/teacher/metrics.csv")) == 2
        assert max(float(row["epoch"]) for row in read_metrics(tmp_path / "run/student/metrics.csv")) == 1

    def test_stage_that_was_not_begun_may_change(self, tmp_path: Path) -> None:
        run(experiment(tmp_path / "run"), only="teacher")
        changed = experiment(tmp_path / "run", epochs=2)
        stages = (experiment(tmp_path / "run").stages[0], *changed.stages[1:])
        run(Experiment("toy", tmp_path / "run", 0, Lines, stages, devices=changed.devices), only="codes")
        assert (tmp_path / "run/codes/done.json").is_file()


class TestMetricsFile:
    def test_new_columns_and_restarts_keep_earlier_rows(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.csv"
        MetricsFile(path, lambda: 1.0).log_metrics({"epoch": 0, "val/bpd": 2.0}, 5)
        again = MetricsFile(path, lambda: 2.0)
        again.log_metrics({"epoch": 1, "train/bpd": 3.0}, 6)
        with path.open() as file:
            rows = list(csv.DictReader(file))
        assert [row["seconds"] for row in rows] == ["1.0", "2.0"]
        assert [row["train/bpd"] for row in rows] == ["", "3.0"]
        assert rows[0]["val/bpd"] == "2.0"

    def test_keep_drops_later_epochs_and_torn_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "metrics.csv"
        log = MetricsFile(path, lambda: 1.0)
        for epoch in range(3):
            log.log_metrics({"epoch": epoch, "loss": epoch}, epoch)
        with path.open("a") as file:
            file.write("1,3")
        MetricsFile(path, lambda: 1.0).keep(1)
        assert [row["epoch"] for row in read_metrics(path)] == ["0", "1"]


def test_a_start_clears_what_an_earlier_attempt_left(tmp_path: Path) -> None:
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    checkpoint.best_path.write_bytes(b"of another attempt")
    assert where_to_resume(checkpoint) == Resumption()
    assert not checkpoint.best_path.exists()


def test_of_damaged_checkpoints_the_one_before_is_taken(tmp_path: Path) -> None:
    """Within an epoch, of the last epoch, of the best one; each is cut short in its turn."""
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    torch.save({"epoch": 1, "global_step": 8}, checkpoint.best_path)
    torch.save({"epoch": 2, "global_step": 12}, checkpoint.last_path)
    within = tmp_path / STEP_CHECKPOINT
    torch.save({"epoch": 3, "global_step": 14, WITHIN: {}}, within)
    assert where_to_resume(checkpoint) == Resumption(2, within, 14)
    within.write_bytes(within.read_bytes()[:200])
    with pytest.warns(UserWarning, match=r"step\.ckpt .*an earlier one is taken"):
        assert where_to_resume(checkpoint) == Resumption(2, checkpoint.last_path)
    assert not within.exists()
    content = bytearray(checkpoint.last_path.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    checkpoint.last_path.write_bytes(content)
    with pytest.warns(UserWarning, match=r"last\.ckpt .*an earlier one is taken"):
        assert where_to_resume(checkpoint) == Resumption(1, checkpoint.last_path)
    assert checkpoint.last_path.read_bytes() == checkpoint.best_path.read_bytes()


def test_a_checkpoint_that_speaks_of_several_disks_is_damaged(tmp_path: Path) -> None:
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    torch.save({"epoch": 1, "global_step": 1}, checkpoint.last_path)
    content = checkpoint.last_path.read_bytes()
    end = content.rindex(b"PK\x05\x06")
    locator = b"PK\x06\x07" + bytes(12) + b"\x09\x00\x00\x00"
    checkpoint.last_path.write_bytes(content[:end] + locator + content[end:])
    with pytest.warns(UserWarning, match=r"last\.ckpt is not a complete checkpoint"):
        assert where_to_resume(checkpoint) == Resumption()


def test_a_checkpoint_within_an_epoch_that_is_done_is_of_no_use(tmp_path: Path) -> None:
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    torch.save({"epoch": 2, "global_step": 12}, checkpoint.last_path)
    torch.save({"epoch": 2, "global_step": 10, WITHIN: {}}, tmp_path / STEP_CHECKPOINT)
    assert where_to_resume(checkpoint) == Resumption(2, checkpoint.last_path)
    assert not (tmp_path / STEP_CHECKPOINT).exists()


def test_scores_that_are_not_numbers_are_never_best(tmp_path: Path) -> None:
    lowest = EpochCheckpoint(tmp_path, "val/bpd")
    assert not lowest.is_better(None)
    assert not lowest.is_better(float("nan"))
    assert lowest.is_better(3.0)
    lowest.best_score = 3.0
    assert not lowest.is_better(3.0)
    highest = EpochCheckpoint(tmp_path, "accuracy", "max")
    highest.best_score = 3.0
    assert highest.is_better(4.0)


class TestFaultsAreNotSaved:
    """Neither as the best nor as the last epoch."""

    @pytest.fixture
    def trainer(self) -> Trainer:
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, barebones=False)

    def save(self, trainer: Trainer, module: LightningModule, folder: Path) -> None:
        trainer.strategy.connect(module)
        EpochCheckpoint(folder, "val/bpd").on_train_epoch_end(trainer, module)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_parameters(self, trainer: Trainer, tmp_path: Path, value: float) -> None:
        module = LightningModule()
        module.network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
        self.save(trainer, module, tmp_path)
        before = (tmp_path / "last.ckpt").read_bytes()
        with torch.no_grad():
            module.network[1].bias[1] = value
        with pytest.raises(ValueError, match=r"^epoch 1 is not saved: NaN or infinity .* first in network\.1\.bias"):
            self.save(trainer, module, tmp_path)
        assert (tmp_path / "last.ckpt").read_bytes() == before
        assert len(list(tmp_path.iterdir())) == 1

    def test_what_a_gpu_tells_late(self, trainer: Trainer, tmp_path: Path) -> None:
        module = LightningModule()
        module.circuit = pc.Circuit(pc.hclt([-1, 0], 2, pc.Categorical(3)))
        module.circuit.engine.checks.add(0, [torch.tensor(True)])
        with pytest.raises(ValueError, match=r"^epoch 1 is not saved: x: Categorical.* outside its support"):
            self.save(trainer, module, tmp_path)
        assert not list(tmp_path.iterdir())


RATE = "machine/examples_per_second"


def test_two_processes_make_one_run(tmp_path: Path) -> None:
    first = as_script(__file__, str(tmp_path), "two processes")
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("done in") == len(KILLS)
    assert all((tmp_path / "run" / name / "done.json").is_file() for name, _ in KILLS)
    assert [row["epoch"] for row in read_metrics(tmp_path / "run/tuned/metrics.csv") if row["val/bpd"]] == list("012")
    (row,) = [row for row in read_metrics(tmp_path / "run/tuned/metrics.csv") if row["epoch"] == "2" and row[RATE]]
    assert float(row[RATE]) > 0
    assert float(row["machine/memory_mib"]) > 1
    assert float(row["machine/communication_share"]) > 0  # of gradients that torch averages
    for rank in (0, 1):
        told = read_events(events_path(tmp_path / "run", rank))
        assert {line["rank"] for line in told} == {rank}
        assert [line["stage"] for line in told if line["event"] == "stage_ends"] == [name for name, _ in KILLS]
        assert told[-1]["event"] == "end"
    (tmp_path / "run/tuned/done.json").unlink()
    again = as_script(__file__, str(tmp_path), "two processes")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished before, skipped") == len(KILLS) - 1
    assert "tuned: goes on after epoch 3" in again.stdout


def test_killed_in_every_stage_equals_uninterrupted(tmp_path: Path) -> None:
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {"killed": [-signal.SIGKILL] * len(KILLS) + [0], "whole": [0]}
    whole, killed = record(tmp_path / "whole/run"), record(tmp_path / "killed/run")
    assert len(list((tmp_path / "killed").glob("killed-*"))) == len(KILLS)
    events = [line["event"] for line in read_events(events_path(tmp_path / "killed/run"))]
    assert events.count("start") == len(KILLS) + 1
    assert events.count("end") == events.count("report") == 1
    assert events.count("resume") > 0
    assert list(whole) == list(killed)
    for name in whole:
        assert whole[name] == killed[name], name


@pytest.mark.parametrize("kept", [0, 40, 0.5, 0.99])
def test_a_damaged_best_checkpoint_is_named(tmp_path: Path, kept: float) -> None:
    """Cut after so many bytes, or at such a share of its length."""
    checkpoint = EpochCheckpoint(tmp_path, "val/bpd")
    torch.save({"state_dict": {"weight": torch.zeros(1000)}}, checkpoint.best_path)
    size = checkpoint.best_path.stat().st_size
    os.truncate(checkpoint.best_path, int(kept * size) if 0 < kept < 1 else int(kept))
    module: Any = None  # nothing gets as far as the module
    with pytest.raises(ValueError, match=r"best\.ckpt: cannot be read"):
        load_best(module, checkpoint)


if __name__ == "__main__":
    if sys.argv[2:]:
        run(experiment(Path(sys.argv[1]) / "run", devices=2))
        sys.exit()
    # One process imports everything and forks the runs: it computes nothing itself, so its children can.
    folder = Path(sys.argv[1])
    (folder / "whole").mkdir()
    (folder / "killed").mkdir()
    kinds = {"killed": True, "whole": False}
    ends = {}
    for kind, kill in kinds.items():
        settings = experiment(folder / kind / "run", kill)
        ends[kind] = exit_codes(lambda settings=settings: run(settings) or 0, most=len(KILLS) + 1)
    print(json.dumps(ends))

"""Tests of the lock on a run directory: one process at a time, free as soon as that process has ended."""

import errno
import fcntl
import os
import signal
import time
from pathlib import Path

import pytest

from lvd_lightning.ranks import Ranks
from lvd_lightning.runs import lock as run_lock
from lvd_lightning.runs.experiment import Experiment
from lvd_lightning.runs.lock import LOCK, locked
from lvd_lightning.runs.pipeline import Pipeline


def test_another_holder_is_named(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "run"),
        pytest.raises(ValueError, match=rf"working on {tmp_path}/run \(process {os.getpid()} on .*--name"),
        locked(tmp_path / "run"),
    ):
        pass
    with locked(tmp_path / "run"), locked(tmp_path / "other"):
        pass  # let go of after the first, and other runs are free


def test_an_error_lets_go(tmp_path: Path) -> None:
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_a_killed_holder_lets_go_at_once_though_its_workers_live(tmp_path: Path) -> None:
    """A data loader's workers are forked with all open files, and outlive the process that forked them."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            worker = os.fork()
            if worker == 0:
                time.sleep(60)
            os.write(write, f"{worker}\n".encode())
            time.sleep(60)
        os._exit(0)
    worker = int(os.read(read, 100))
    try:
        with pytest.raises(ValueError, match=f"process {child} on"), locked(tmp_path):
            pass
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.kill(worker, 0)  # lives
        with locked(tmp_path):
            assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")
    finally:
        os.kill(worker, signal.SIGKILL)


def test_a_file_system_without_locks_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .No locks available"), locked(tmp_path):
        pass


def test_an_operating_system_without_locks_is_worth_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "fcntl", None)
    with pytest.warns(UserWarning, match="no such locks"), locked(tmp_path):
        pass


def test_the_pipeline_holds_it_while_it_runs_and_not_to_read(tmp_path: Path) -> None:
    experiment = Experiment("run", tmp_path / "run", 0, data=lambda: None, stages=())  # type: ignore[arg-type,return-value]
    pipeline = Pipeline(experiment, Ranks({"accelerator": "cpu", "devices": 1}))
    with locked(tmp_path / "run"):
        with pytest.raises(ValueError, match="another process is working on"):
            pipeline.run()
        with pytest.raises(ValueError, match="holds no trained model"):
            pipeline.print_likelihood("test")
    held: list[bool] = []

    def try_lock() -> None:
        with pytest.raises(ValueError, match="another process"), locked(tmp_path / "run"):
            pass
        held.append(True)
        raise RuntimeError("a datamodule that cannot be made")

    reading = Experiment("run", tmp_path / "run", 0, data=try_lock, stages=())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="cannot be made"):
        Pipeline(reading, pipeline.ranks).run()
    assert held == [True]
    with locked(tmp_path / "run"):
        pass

"""Jobs under SLURM: who asks for another turn, and the scripts that start them."""

import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from lvd_lightning.runs.slurm import job_number, requeue_after

SCRIPTS = sorted((Path(__file__).parents[2] / "examples" / "slurm").glob("*.sbatch"))


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `scontrol` that writes down what it is asked for, in this file."""
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    script = tmp_path / "scontrol"
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexit "${{SCONTROL_CODE:-0}}"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "calls"


def test_a_job_is_queued_again_after_sigusr1_alone(calls: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requeue_after(signal.SIGTERM)
    assert not calls.exists()
    requeue_after(signal.SIGUSR1)
    assert calls.read_text() == "requeue 17\n"
    assert capsys.readouterr().err == "job 17: requeued\n"


def test_a_task_of_an_array_is_queued_by_its_own_number(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "16")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue_after(signal.SIGUSR1)
    assert calls.read_text() == "requeue 16_3\n"


def test_what_hinders_it_is_told(
    calls: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SCONTROL_CODE", "1")
    requeue_after(signal.SIGUSR1)
    assert "job 17: could not be requeued" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(calls.parent / "nowhere"))
    requeue_after(signal.SIGUSR1)
    assert "there is no scontrol here; submit it again" in capsys.readouterr().err


def test_outside_of_slurm_nothing_happens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(name, raising=False)
    assert job_number() is None
    requeue_after(signal.SIGUSR1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_understood(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert "#SBATCH --signal=SIGUSR1@" in text
    assert "#SBATCH --requeue" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    subprocess.run(["shellcheck", str(script)], check=True)


def test_a_script_starts_what_its_comment_says(tmp_path: Path) -> None:
    """With an srun that prints its arguments."""
    srun = tmp_path / "srun"
    srun.write_text('#!/bin/sh\necho "$@"\n')
    srun.chmod(0o755)
    settings = {
        **{"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"},
        "SLURM_ARRAY_TASK_ID": "3",
    }
    found = {
        path.stem: subprocess.run(
            ["bash", str(path), "--config", "photos_pg", "--name", "seeds"],
            env=settings,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for path in SCRIPTS
    }
    whole = "--kill-on-bad-exit=1 python train.py fit --config photos_pg --name seeds"
    assert found["fit"] == f"{whole} --trainer.devices 8 --trainer.num_nodes 2\n"
    assert found["array"] == "python train.py fit --config photos_pg --name seeds_3 --seed 3\n"

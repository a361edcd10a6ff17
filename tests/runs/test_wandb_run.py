"""One W&B run per experiment, read back from its offline files; and TensorBoard, read by its own reader."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.tiny_experiments import TINY, TINY_TEACHER
from helpers.wandb_files import Recorded, read_back

from lvd_lightning.cli import main
from lvd_lightning.runs import pipeline
from lvd_lightning.runs.wandb_run import STATE, WandbRun

SMALL = [*TINY, *TINY_TEACHER, "--stages.baseline=null", "--trainer.log_every_n_steps=2"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorded]:
    """A run that was interrupted after its first stages and continued, without an account."""
    pytest.importorskip("wandb")
    run_dir = tmp_path_factory.mktemp("runs")
    logger = "--trainer.logger={class_path: lightning.pytorch.loggers.WandbLogger, init_args: {log_model: true}}"
    arguments = ["fit", *SMALL, "--config=overlays/wandb", logger, f"--run_dir={run_dir}"]
    done = pipeline.mark_done

    def interrupt(folder: Path, results: dict[str, Any]) -> None:
        if folder.name == "conditional":
            raise KeyboardInterrupt
        done(folder, results)

    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
            patch.delenv(name, raising=False)
        # Where wandb would put what it stages and caches, were it not told otherwise.
        for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(run_dir / "of_wandb"))
        patch.setattr(pipeline, "mark_done", interrupt)
        assert main(arguments) == 130
        patch.setattr(pipeline, "mark_done", done)
        assert main(arguments) == 0
        folders = list(run_dir.glob("photos/wandb/offline-run-*"))
        assert main(arguments) == 0  # finished: nothing is opened
    assert sorted(run_dir.glob("photos/wandb/offline-run-*")) == sorted(folders)
    return run_dir / "photos", read_back(run_dir / "photos")


def test_all_stages_and_processes_are_one_run(interrupted: tuple[Path, Recorded]) -> None:
    folder, found = interrupted
    assert found.ids == {json.loads((folder / STATE).read_text())["id"]}
    assert found.exits == [1, 0]
    steps = [row["_step"] for row in found.history]
    assert steps == sorted(set(steps))


def test_names_of_stages_are_prefixes_over_their_own_steps(interrupted: tuple[Path, Recorded]) -> None:
    found = interrupted[1]
    for stage, metric in (("teacher", "val/loss"), ("conditional", "val/bpd"), ("prior", "val/bpd")):
        rows = [row for row in found.history if f"{stage}/{metric}" in row]
        assert rows
        assert all(row[f"{stage}/step"] >= 0 for row in rows)
        assert found.axes[f"{stage}/*"] == f"{stage}/step"
    prefixes = {name.split("/")[0] for row in found.history for name in row if not name.startswith("_")}
    assert prefixes == {"teacher", "conditional", "prior", "finetune", "report"}


def test_it_has_the_config_the_pictures_and_the_final_table(interrupted: tuple[Path, Recorded]) -> None:
    folder, found = interrupted
    assert found.config["shared"]["num_clusters"] == 3
    assert found.config["stages"]["conditional"]["model"]["init_args"]["num_units"] == 2
    names = {
        path.relative_to(path.parents[2]).as_posix().rsplit("_", 2)[0] for path in found.files if path.suffix == ".png"
    }
    assert names == {
        "images/teacher/reconstructions",
        *(f"images/report/{name}" for name in ("clusters", "gap", "inpainting", "samples", "training")),
    }
    tables = [path for path in found.files if path.name.endswith(".table.json")]
    table = json.loads(tables[0].read_text())
    assert table["columns"] == ["model", "train bpd", "val bpd", "test bpd", "parameters", "seconds"]
    test = json.loads((folder / "report" / "summary.json").read_text())["test"]["bpd"]
    assert table["data"][-1][3] == pytest.approx(test)
    assert found.summary["test/bpd"] == pytest.approx(test)
    assert found.summary["latents/seconds"] > 0


def test_the_best_checkpoints_are_artifacts_if_wanted(interrupted: tuple[Path, Recorded]) -> None:
    names = [name for name in interrupted[1].artifacts if name.startswith("photos-")]
    assert sorted(set(names)) == [f"photos-{stage}" for stage in ("conditional", "finetune", "prior", "teacher")]


@pytest.mark.parametrize("found", ['{"id": "../../x", "step": 1}', '{"id": 3, "step": 1}', '{"id": "a"}', "[]", "{"])
def test_a_stored_id_is_not_trusted(tmp_path: Path, found: str) -> None:
    pytest.importorskip("wandb")
    (tmp_path / STATE).write_text(found)
    with pytest.raises(ValueError, match=STATE):
        WandbRun(tmp_path, {"offline": True}, {}).log({"x": 1.0})
    assert not (tmp_path / "wandb").exists()


def test_tensorboard_has_a_log_per_stage(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = "--trainer.logger=lightning.pytorch.loggers.TensorBoardLogger"
    assert main(["fit", *SMALL, logger, "--stage=teacher", f"--run_dir={tmp_path}"]) == 0
    (file,) = (tmp_path / "photos" / "teacher").rglob("events.out.tfevents*")
    found = reading.EventAccumulator(str(file.parent))
    found.Reload()
    (value,) = found.Scalars("val/loss")
    rows = (tmp_path / "photos" / "teacher" / "metrics.csv").read_text()
    assert str(value.value)[:6] in rows

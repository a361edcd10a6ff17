"""A run directory knows the data that its stages were begun with."""

import json
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningDataModule

from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs import pipeline
from lvd_lightning.runs.data_record import check_same_data, left_out
from lvd_lightning.runs.experiment import Experiment, PlannedStage
from lvd_lightning.runs.pipeline import Pipeline
from lvd_lightning.stages.stage import PlainStage


class Named(LightningDataModule):
    """Data with a given identity."""

    color, region, lossy = "rgb", "whole", False

    def __init__(self, train: str = "a", test: str = "b") -> None:
        super().__init__()
        self.identity = {"train": train, "test": test}
        self.left_out = {".avif files": 3}


class Count(PlainStage):
    """Counts its starts in a file of the run directory; breaks while there is a file called break."""

    leaves = ("count",)

    def run(self, context: StageContext) -> dict[str, float]:
        with (context.run_dir / f"starts-{context.stage}").open("a") as file:
            file.write("x")
        if (context.run_dir / "break").exists() and context.stage == "second":
            raise ValueError("broken")
        return {}


def fit(run_dir: Path, changed: str = "refuse", only: str | None = None, data: Any = Named, **values: str) -> None:
    def make() -> LightningDataModule:
        return data(**values)

    stages = tuple(PlannedStage(name, Count, {"name": name}, make, Count) for name in ("first", "second"))
    ranks = Ranks({"accelerator": "cpu", "devices": 1})
    Pipeline(Experiment("toy", run_dir, 0, make, stages), ranks).run(only, changed)


def starts(run_dir: Path) -> list[int]:
    return [len((run_dir / f"starts-{name}").read_text()) for name in ("first", "second")]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run whose second stage was interrupted, without evaluation."""
    monkeypatch.setattr(pipeline.Pipeline, "_evaluate", lambda *_, **__: None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "break").touch()
    with pytest.raises(ValueError, match="broken"):
        fit(tmp_path / "run")
    (tmp_path / "run" / "break").unlink()
    return tmp_path / "run"


def test_the_same_data_go_on(run_dir: Path) -> None:
    fit(run_dir)
    assert starts(run_dir) == [1, 2]
    assert json.loads((run_dir / "first" / "data.json").read_text()) == {
        "identity": {"train": "a", "test": "b"},
        "left_out": {".avif files": 3},
    }
    assert left_out(run_dir, ["zeroth", "first"]) == {".avif files": 3}


@pytest.mark.parametrize(
    ("values", "splits"), [({"train": "x"}, "train"), ({"train": "x", "test": "y"}, "train, test")]
)
@pytest.mark.parametrize("only", [None, "second"])
def test_other_data_are_refused(run_dir: Path, values: dict[str, str], splits: str, only: str | None) -> None:
    message = (
        rf"was begun with other data \(first: the examples of {splits} are others, .*order\): give this one another "
        "--name, or say --changed restart to do stage 'first' .* or --changed continue"
    )
    with pytest.raises(ValueError, match=message):
        fit(run_dir, only=only, **values)
    assert starts(run_dir) == [1, 1]


def test_restart_does_all_again_and_continue_keeps_what_there_is(run_dir: Path) -> None:
    (run_dir / "evaluate").mkdir()
    fit(run_dir, "continue", train="x")
    assert starts(run_dir) == [1, 2]
    assert not (run_dir / "evaluate").exists()
    fit(run_dir, train="x")  # that is what it is made of from now on
    fit(run_dir, "restart", train="y")
    assert starts(run_dir) == [2, 3]
    assert json.loads((run_dir / "second" / "data.json").read_text())["identity"]["train"] == "y"


def test_data_or_runs_that_say_nothing_are_taken_as_they_are(run_dir: Path) -> None:
    fit(run_dir, data=LightningDataModule)
    for name in ("first", "second"):
        (run_dir / name / "data.json").unlink()
        assert (run_dir / name / DONE_MARKER).is_file()
    fit(run_dir, train="x")
    assert starts(run_dir) == [1, 2]


def test_evaluation_on_other_data_is_refused(run_dir: Path) -> None:
    experiment = Experiment("toy", run_dir, 0, Named, ())
    check_same_data(experiment, "first", Named())
    with pytest.raises(ValueError, match=r"was trained with other data \(first: the examples of test are others"):
        check_same_data(experiment, "first", Named(test="z"))

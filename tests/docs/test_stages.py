"""What the page on stages says of run directories holds for a small run, and its code runs as it stands."""

import re
import sys
from pathlib import Path

import pytest
from helpers.pages import ROOT, blocks
from helpers.tiny_experiments import TINY_TEACHER, fit

from lvd_lightning import Run, stages
from lvd_lightning.cli import main

PAGE = ROOT / "docs" / "stages.md"
OPENED, OWN_STAGE = blocks("python", PAGE)
KINDS = {"features", "latents", "conditionals", "prior", "model", "flow"}


def rows() -> list[list[str]]:
    """The table of stages: classes, needs, leaves, files."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def names(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the page's own stage at its end."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "counting.py").write_text(OWN_STAGE)
    (overlay,) = blocks("yaml", PAGE)
    (folder / "count.yaml").write_text(overlay)
    sys.path.insert(0, str(folder))
    try:
        small = (
            "--stages.baseline.model.num_units=2",
            "--stages.baseline.model.seconds=1",
            "--stages.baseline.trainer.max_epochs=1",
        )
        return fit(folder / "runs", f"--config={folder / 'count.yaml'}", *TINY_TEACHER, *small)
    finally:
        sys.path.remove(str(folder))


def test_the_table_has_every_stage() -> None:
    mentioned = {name for row in rows() for name in names(row[0])}
    assert mentioned == set(stages.__all__) - {"Stage", "PlainStage", "StageModule"}


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_needs_and_leaves(row: list[str]) -> None:
    for name in names(row[0]):
        stage = getattr(stages, name)
        assert [kind for kind in row[2].split(", ") if kind] == list(stage.leaves)
        if isinstance(stage.needs, tuple) and stage.needs:
            assert row[1].split(", ") == list(stage.needs)
        assert set(re.findall(r"[a-z]+", row[1])) & KINDS or not row[1]


def test_files(run_dir: Path) -> None:
    """Every file in the table is in the folder of the last stage of its class; those of texts are tested with them."""
    folders = {stage.kind.__name__: stage.folder for stage in Run.open(run_dir).stages}
    rows_here = [row for row in rows() if any(name in folders for name in names(row[0]))]
    assert len(rows_here) >= 6
    for classes, _, _, files in rows_here:
        (folder,) = [folders[name] for name in names(classes) if name in folders]
        several_heads = files.find("with several heads")
        for name in names(files[:several_heads] if several_heads > 0 else files):
            for split in ("train", "val", "test"):
                assert (folder / name.replace("SPLIT", split)).exists(), name


def test_the_tree_of_a_run_directory(run_dir: Path) -> None:
    (tree,) = [block for block in blocks("", PAGE) if block.startswith("config.yaml")]
    stage = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if name == "STAGE/":
            stage = "teacher/"
            continue
        if not line.startswith(" "):
            stage = ""
        assert (run_dir / stage / name).exists() == (name not in ("error.txt", "step.ckpt")), name


def test_a_finished_run(run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(run_dir.parents[1])
    monkeypatch.syspath_prepend(str(run_dir.parents[1]))
    found: dict = {}
    exec(compile(OPENED, str(PAGE), "exec"), found)
    assert found["log_p"].shape == (4,)
    assert (found["log_p"] < 0).all()
    assert "bpd" in capsys.readouterr().out
    assert not (found["distilled"].log_prob(found["images"]) == found["log_p"]).all()
    assert main(["test", "--run", "runs/photos"]) == 0
    assert f"test/bpd {found['run'].figures()['test']['bpd']:.4f}" in capsys.readouterr().out


def test_the_stage_of_the_page(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(run_dir.parents[1]))
    assert 1 <= Run.open(run_dir).stage("count").figures()["values_per_position"] <= 3

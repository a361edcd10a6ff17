"""Every recipe of the page is written into the files that it names, and learns on tiny data."""

import csv
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.pages import ROOT, blocks
from helpers.tiny_experiments import fit

import lvd_lightning.circuits as pc
from lvd_lightning import Run
from lvd_lightning.cli import main
from lvd_lightning.teachers import load_teacher

PAGE = ROOT / "docs" / "extending.md"
MODULES = ("stripes", "autoencoder", "ordered", "naive", "sizes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's files, where Python finds them; overlays are named after their modules."""
    folder = tmp_path_factory.mktemp("extending")
    for name, code, overlay in zip(MODULES, blocks("python", PAGE), blocks("yaml", PAGE), strict=True):
        assert name in overlay
        (folder / f"{name}.py").write_text(code)
        (folder / f"{name}.yaml").write_text(overlay)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in MODULES:
        sys.modules.pop(name, None)


def learn(folder: Path, name: str, *overlays: str) -> Run:
    """An experiment on stripes with some recipes laid over it."""
    files = [f"--config={folder / found}.yaml" for found in ("stripes", *overlays)]
    quick = ("--trainer.accelerator=cpu", "--trainer.devices=1", f"--name={name}", f"--run_dir={folder / 'runs'}")
    assert main(["fit", *files, *quick]) == 0
    return Run.open(folder / "runs" / name)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Run:
    return learn(folder, "plain")


@pytest.fixture(scope="module")
def extended(folder: Path) -> Run:
    return learn(folder, "extended", "ordered", "naive", "sizes")


def test_the_page_names_its_files() -> None:
    named = re.findall(r"`(\w+)\.py`:", PAGE.read_text())
    assert tuple(named) == MODULES


def test_datamodule(plain: Run) -> None:
    data = plain.data()
    assert data.batch("train", torch.arange(3)).shape == (3, 1, 8, 8)
    assert data.num_examples("test") == 100
    assert 2 < plain.figures()["test"]["bpd"] < 3  # log2(16) = 4 at chance; noise of two bits cannot be learnt


def test_leaf_family(extended: Run) -> None:
    graphs = pc.load(extended.stage("finetune").folder / "conditional").to_graph()
    leaves = {node.distribution for graph in graphs for node in graph.nodes if node.kind == "input"}
    assert [(type(leaf).__name__, leaf.num_categories) for leaf in leaves] == [("SmoothStart", 16)]


def test_structure(extended: Run) -> None:
    for graph in pc.load(extended.stage("finetune").folder / "conditional").to_graph():
        assert [node.kind for node in graph.nodes] == ["input"] * 16 + ["product", "sum"]
        assert graph.nodes[0].num_units == 8
    assert extended.figures()["test"]["bpd"] < 3.5


def test_callback(extended: Run) -> None:
    with (extended.stage("finetune").folder / "metrics.csv").open() as file:
        found = [float(row["num_parameters"]) for row in csv.DictReader(file) if row["num_parameters"]]
    assert found == [extended.model().num_parameters]


def test_teacher(folder: Path) -> None:
    run = Run.open(fit(folder / "runs", f"--config={folder / 'autoencoder.yaml'}", "--stages.baseline=null"))
    teacher = load_teacher(run.stage("teacher").folder)
    assert type(teacher).__name__ == "Autoencoder"
    images = run.data().batch("train", torch.arange(5))
    assert teacher.features(images).shape == (5, 4, 8)
    assert 0 < run.figures()["test"]["bpd"] < 20

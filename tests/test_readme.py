"""What the README and the pages behind it show is run: Python as it stands, commands up to their experiment."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.pages import ROOT, blocks, commands

import lvd_lightning.circuits as pc
from lvd_lightning.cli import CONFIG_FOLDER, parse
from lvd_lightning.runs.configuration import experiment_from

README = ROOT / "README.md"
EXPERIMENTS, LIBRARY = ROOT / "docs" / "experiments.md", ROOT / "docs" / "circuits.md"


def test_python() -> None:
    torch.manual_seed(0)
    graphs = [pc.hclt(torch.tensor([-1, 0, 1]), 4, pc.Categorical(8)) for _ in range(2)]
    names = {"x": torch.randint(256, (300, 6)), "mask": torch.rand(8, 6) < 0.5}
    names |= {"graph_0": graphs[0], "graph_1": graphs[1]}
    (code,) = blocks("python", LIBRARY)
    exec(compile(code, str(LIBRARY), "exec"), names)
    assert names["larger"].num_heads == 2


@pytest.mark.parametrize("command", commands(EXPERIMENTS))
def test_commands(command: str) -> None:
    _, _, *arguments = shlex.split(command)
    if "--run" in arguments:  # docs/test_stages.py does that with a run
        assert (CONFIG_FOLDER / Path(arguments[-1]).name).with_suffix(".yaml").is_file()
        return
    if "--print_config" in arguments:
        with pytest.raises(SystemExit, match="0"):
            parse(arguments)
        return
    assert experiment_from(parse(arguments)[1]).stages


def test_there_are_commands() -> None:
    assert len(commands(EXPERIMENTS)) >= 8
    assert any("--stage " in command for command in commands(EXPERIMENTS))


def test_the_map_names_every_folder() -> None:
    """And nothing that is not there. Folders of the library are two spaces in, those of circuits four."""
    (text,) = [block for block in blocks("", ROOT / "CONTRIBUTING.md") if "train.py" in block]
    named: set[str] = set()
    above: list[str] = []
    for line in text.splitlines():
        depth, name = (len(line) - len(line.lstrip())) // 2, line.split()[0]
        above = [*above[:depth], name]
        if "*" not in name:
            named.add("".join(above))
    assert [name for name in named if not (ROOT / name).exists()] == []
    for folder in ("", "lvd_lightning/", "lvd_lightning/circuits/"):
        found = {f"{folder}{path.parent.name}/" for path in (ROOT / folder).glob("*/__init__.py")}
        assert found <= named


def test_headline_figures_are_those_of_the_results() -> None:
    rows = re.findall(r"\| \**(\d\.\d+)\** \| ([\d,]+) \|$", README.read_text(), re.MULTILINE)
    assert len(rows) == 4
    results = (ROOT / "docs" / "results.md").read_text()
    for figure, seconds in rows:
        assert re.search(rf"^\|.*\| \**{figure}\** \| {seconds} \|$", results, re.MULTILINE)


def test_installation(tmp_path: Path) -> None:
    """It puts the whole library in its place, and the library alone; dependencies are left out here."""
    (line,) = [line for block in blocks("sh", LIBRARY) for line in block.splitlines() if line.startswith("pip ")]
    copy, site = tmp_path / "copy", tmp_path / "site"
    for name in ("lvd_lightning", "callbacks", "datamodules"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(site), "--quiet"]
    subprocess.run([sys.executable, "-m", *shlex.split(line), *options], cwd=copy, check=True)
    assert {path.name for path in site.iterdir() if path.suffix != ".dist-info"} == {"lvd_lightning"}
    for suffix in ("py", "c"):
        files = [
            {path.relative_to(place) for path in (place / "lvd_lightning").rglob(f"*.{suffix}")}
            for place in (copy, site)
        ]
        assert files[0] == files[1] != set()


def test_it_is_a_screen_and_a_table() -> None:
    """All else is on pages that it leads to."""
    lines = README.read_text().splitlines()
    assert len([line for line in lines if not line.startswith("|")]) <= 50
    assert {"docs/use.md", "docs/experiments.md", "docs/circuits.md"} <= set(
        re.findall(r"\]\(([^)]+)\)", README.read_text())
    )

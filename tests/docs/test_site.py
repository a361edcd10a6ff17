"""The site: every page has its place, and the pages of the papers name code and commands that there are."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.pages import ROOT

from lvd_lightning.cli import parse
from lvd_lightning.runs.configuration import experiment_from

DOCS = ROOT / "docs"
PAPERS = sorted(DOCS.glob("papers/*.md"))
LIBRARY = ROOT / "lvd_lightning"


def files(nav: Any) -> list[str]:
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    return [name for entry in (nav.values() if isinstance(nav, dict) else nav) for name in files(entry)]


def test_every_page_is_in_the_navigation() -> None:
    (text,) = re.findall(r"^nav:\n(?:[ ]+.*\n)+", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    named = files(yaml.safe_load(text)["nav"])
    assert len(named) == len(set(named))
    inside = {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")}
    outside = {name.removeprefix("repository/") for name in named if name.startswith("repository/")}
    assert inside == {name for name in named if not name.startswith("repository/")}
    assert all((ROOT / name).is_file() for name in outside)


def test_the_start_page_has_a_picture_and_two_commands() -> None:
    text = (DOCS / "index.md").read_text()
    assert len(re.findall(r"!\[", text)) == 1
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    assert len(block.strip().splitlines()) == 2


def test_there_is_a_page_for_every_paper() -> None:
    assert [path.stem for path in PAPERS] == ["flows", "hmm", "lvd", "lvd_pg", "perceptual"]
    for page in PAPERS:
        text = page.read_text()
        assert "## Which equation is where" in text
        assert re.search(r"## Which (figure|table) is which command", text)
        assert "## What differs, and why" in text


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.stem)
def test_code_that_a_paper_is_found_in_exists(page: Path) -> None:
    """Files below the library or the repository, and the names of what stands in them."""
    quoted = re.findall(r"`([^`]+)`", page.read_text())
    named = [name for name in quoted if re.fullmatch(r"[\w/]+\.py|[\w/]+/", name)]
    assert named
    sources = ""
    for name in named:
        found = [path for folder in (LIBRARY, ROOT) for path in [folder / name] if path.exists()]
        found = found or list(LIBRARY.rglob(name))
        assert found, name
        sources += "".join(path.read_text() for path in found if path.is_file())
    for table in re.findall(r"## Which equation is where\n(.*?)\n## ", page.read_text(), re.DOTALL):
        for name in set(re.findall(r"`([^`]+)`", table)) - set(named):
            for word in re.findall(r"^\w+(?!\w*\.png)", name):
                assert re.search(rf"\b{word}\b", sources), name


@pytest.mark.parametrize("page", PAPERS, ids=lambda page: page.stem)
def test_commands_of_a_paper_are_understood(page: Path) -> None:
    text = page.read_text()
    commands = re.findall(r"`(python train\.py fit [^`]+)`", text)
    assert commands
    for command in commands:
        _, _, *arguments = shlex.split(command)
        assert experiment_from(parse(arguments)[1]).stages
    for overlay in re.findall(r"`--config (overlays/\w+)`", text):
        assert (ROOT / "configs" / f"{overlay}.yaml").is_file()
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).is_file()

"""The notebooks in examples/ run from their first cell to the last, one after the other in one folder."""

import json
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    torch.manual_seed(0)
    names: dict[str, object] = {}
    for number, cell in enumerate(cells(path)):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"{path.name}, cell {number}", "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_shows_what_comes_out_and_no_error(path: Path) -> None:
    outputs = [output for cell in cells(path) for output in cell.get("outputs", [])]
    assert outputs
    assert all(output["output_type"] != "error" for output in outputs)
    assert "/home/" not in path.read_text()


def test_there_are_five() -> None:
    assert len(NOTEBOOKS) == 5


def cells(path: Path) -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = json.loads(path.read_text())["cells"]
    return found

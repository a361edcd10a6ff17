"""What the README shows is run: its Python as it stands, its commands up to the experiment that they describe."""

import re
import shlex
from pathlib import Path

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.cli import parse
from lvd_lightning.configuration import experiment_from

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


def commands() -> list[str]:
    lines = [line.split(" #")[0].strip() for block in blocks("sh") for line in block.splitlines()]
    return [line for line in lines if line.startswith("python train.py ")]


def test_python() -> None:
    torch.manual_seed(0)
    graphs = [pc.hclt(torch.tensor([-1, 0, 1]), 4, pc.Categorical(8)) for _ in range(2)]
    names = {"x": torch.randint(256, (300, 6)), "mask": torch.rand(8, 6) < 0.5}
    names |= {"graph_0": graphs[0], "graph_1": graphs[1]}
    (code,) = blocks("python")
    exec(compile(code, str(README), "exec"), names)
    assert names["larger"].num_heads == 2


@pytest.mark.parametrize("command", commands())
def test_commands(command: str) -> None:
    _, _, *arguments = shlex.split(command)
    if "--print_config" in arguments:
        with pytest.raises(SystemExit, match="0"):
            parse(arguments)
        return
    assert experiment_from(parse(arguments)[1]).stages


def test_there_are_commands() -> None:
    assert len(commands()) > 8
    assert any("--stage " in command for command in commands())


def test_pictures_and_links() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    missing = [target for target in targets if "://" not in target and not (README.parent / target).is_file()]
    assert not missing

"""What the README shows is run: its Python as it stands, its commands up to the experiment that they describe."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.cli import parse
from lvd_lightning.runs.configuration import experiment_from

README = Path(__file__).parents[1] / "README.md"
STRUCTURES = README.parent / "docs" / "structures.md"


def blocks(language: str, page: Path = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


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


def test_larger_circuit_of_the_page_on_structures() -> None:
    """It is the sum over the latents: of p(z_0) p(z_1 | z_0) p(z_2 | z_0) and a head of every leaf."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    (code,) = blocks("python", STRUCTURES)
    exec(compile(code, str(STRUCTURES), "exec"), names)
    x = torch.randint(8, (6, 12))
    root, first, second = (names[name] / names[name].sum(1, keepdim=True) for name in ("p_root", "p_first", "p_second"))
    given = [pc.Circuit(leaf).log_prob(x[:, 4 * i : 4 * i + 4]).exp() for i, leaf in enumerate(names["leaves"])]
    expected = torch.einsum("bi,bj,bk,i,ij,ik->b", *given, root[0], first, second)
    torch.testing.assert_close(names["circuit"].log_prob(x)[:, 0], expected.log())


def test_structures_in_a_config(tmp_path: Path) -> None:
    (text,) = blocks("yaml", STRUCTURES)
    (tmp_path / "over.yaml").write_text(text)
    stages = parse(["fit", "--config", "photos", "--config", str(tmp_path / "over.yaml")])[1]["stages"]
    assert stages["conditional"]["model"]["init_args"]["structure"] == "rat_spn"
    experiment_from(parse(["fit", "--config", "photos", "--config", str(tmp_path / "over.yaml")])[1])


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

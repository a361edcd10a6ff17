"""What the pages in docs/ show is run, the commands of the results are understood, and links lead somewhere."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pages import PAGES, ROOT, blocks, commands, missing_links

import lvd_lightning.circuits as pc
from datamodules import Synthesized
from lvd_lightning.cli import main, parse
from lvd_lightning.runs import perception
from lvd_lightning.runs.configuration import experiment_from

DOCS = ROOT / "docs"
STRUCTURES = DOCS / "structures.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures(page: Path) -> None:
    assert missing_links(page) == []


@pytest.mark.parametrize("command", [*commands(DOCS / "results.md"), *commands(DOCS / "flows.md")])
def test_commands_of_the_results_and_of_flows(command: str) -> None:
    """With one of the values that a row has where the page says LEAF, EPOCHS and EVERY."""
    for name, value in (("LEAF", "Binomial"), ("EPOCHS", "6"), ("EVERY", "2")):
        command = re.sub(rf"\b{name}\b", value, command)
    _, _, *arguments = shlex.split(command)
    assert experiment_from(parse(arguments)[1]).stages


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


def test_samples_of_a_flow_in_a_config(tmp_path: Path) -> None:
    (text,) = blocks("yaml", DOCS / "flows.md")
    (tmp_path / "over.yaml").write_text(text)
    experiment = experiment_from(parse(["fit", "--config", "photos", "--config", str(tmp_path / "over.yaml")])[1])
    assert isinstance(experiment.data(), Synthesized)


def test_words_of_the_page_on_queries() -> None:
    """All of it runs; the words that have to occur do."""
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    for code in blocks("python", DOCS / "queries.md"):
        exec(compile(code, str(DOCS / "queries.md"), "exec"), names)
    assert names["loss"] < 6  # 12 at random
    assert names["given"][0, 0] == 3
    assert names["given"][1, 1:].tolist() == [5, 1]
    assert names["states"].shape == (1, 3, 4)
    assert names["drawn"].tokens_NL.shape == (100, 3)
    said = " ".join(map(str, names["said"][0, 2:].tolist()))
    assert "7" in said.split()
    assert "11 12" in said


def test_the_page_on_texts() -> None:
    """Its code runs, and its commands are understood."""
    names: dict[str, Any] = {}
    (code,) = blocks("python", DOCS / "language.md")
    exec(compile(code, str(DOCS / "language.md"), "exec"), names)
    assert (len(names["words"]), names["numbers"]) == (16, names["data"].vocabulary.encode(["the", "king", "said"]))
    for command in commands(DOCS / "language.md"):
        _, _, *arguments = shlex.split(command)
        if arguments[0] == "fit":
            assert experiment_from(parse(arguments)[1]).stages


def test_the_page_on_losses_on_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are understood, and its experiment from scratch runs."""
    page = DOCS / "perceptual.md"
    for command in commands(page):
        _, _, *arguments = shlex.split(command)
        assert "perceptual" in [stage.name for stage in experiment_from(parse(arguments)[1]).stages]
    monkeypatch.setattr(perception, "NUM_SAMPLES", 60)
    (text,) = blocks("yaml", page)
    (tmp_path / "scratch.yaml").write_text(text)
    small = ["--data.max_examples=40", "--stages.perceptual.trainer.max_epochs=1", "--trainer.accelerator=cpu"]
    config = f"--config={tmp_path / 'scratch.yaml'}"
    assert main(["fit", config, *small, "--stages.perceptual.model.num_units=2", f"--run_dir={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "scratch" / "report" / "summary.json").read_text())
    assert 1 < summary["test"]["bpd"] < 5

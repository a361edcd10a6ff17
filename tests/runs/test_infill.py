"""The command that fills in words, on a small run over a text file."""

import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lvd_lightning import Run
from lvd_lightning.cli import main
from lvd_lightning.runs.infill import completions

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's advice on small loaders

CONFIG = """
name: text
run_dir: {folder}/runs
data:
  class_path: datamodules.Text
  init_args: {{path: {folder}/lines.txt, length: 8, batch_size: 40, block_lines: 5, cache: {folder}/cache}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 6, enable_progress_bar: false}}
stages:
  hmm:
    model:
      class_path: lvd_lightning.stages.HMMStudent
      init_args: {{init: random, num_states: 8, homogeneous: {homogeneous}, lr: 0.5}}
"""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run over sentences of one form."""
    folder = tmp_path_factory.mktemp("infill")
    draw = random.Random(0)
    who, verb = ("king", "queen", "servant"), ("went", "spake", "fled")
    lines = [f"the {draw.choice(who)} {draw.choice(verb)} unto the land" for _ in range(900)]
    (folder / "lines.txt").write_text("\n".join(lines) + "\n")
    (folder / "text.yaml").write_text(CONFIG.format(folder=folder, homogeneous="true"))
    assert main(["fit", "--config", str(folder / "text.yaml")]) == 0
    return folder / "runs" / "text"


def test_a_table_of_completions(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infill", "--run", str(run_dir), "--samples", "4", "the king <mask> unto <mask> land"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("the king ") == 5
    assert "best" in printed
    assert MASKED not in printed


MASKED = "<mask>"


def test_completions_and_how_likely_they_are(run_dir: Path) -> None:
    run = Run.open(run_dir)
    model, vocabulary = run.model(), run.data().vocabulary
    best, *drawn = completions(run, "the king <mask> unto <mask> land", num_samples=3, seed=1)
    assert (best.how, [found.how for found in drawn]) == ("best", ["sample"] * 3)
    for found in (best, *drawn):
        assert found.words[:2] + found.words[3:4] == ["the", "king", "unto"]
        x = torch.tensor([vocabulary.encode(found.words)])
        given = torch.tensor([[True, True, False, True, False, True]])
        with torch.no_grad():
            wanted = float(model.log_prob(x) - model.log_prob(x, given))  # type: ignore[operator]
        assert found.log_prob == pytest.approx(wanted, abs=1e-5)
    again = list(completions(run, "the king <mask> unto <mask> land", num_samples=3, seed=1))
    assert again == [best, *drawn]
    assert math.exp(best.log_prob) > 0.05  # a guess would have 1 in 144


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("the pope <mask> unto the moon", "not in the vocabulary of .* words: 'pope', 'moon'"),
        ("the king went", "expected <mask> for every word that is to be filled in"),
        ("the king went unto the land the king <mask>", "text: has 9 words, expected at most the 8 of a window"),
    ],
)
def test_mistakes_are_one_line(run_dir: Path, capsys: pytest.CaptureFixture[str], text: str, message: str) -> None:
    assert main(["infill", "--run", str(run_dir), text]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(error)


def test_other_mistakes(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infill", "--run", "nowhere", "a <mask>"]) == 2
    assert "nowhere is no run directory" in capsys.readouterr().err
    assert main(["infill", "--run", str(run_dir), "--samples", "0", "the <mask>"]) == 2
    assert "num_samples: got 0" in capsys.readouterr().err
    assert main(["infill", "a <mask>"]) == 2
    assert "--run" in capsys.readouterr().err

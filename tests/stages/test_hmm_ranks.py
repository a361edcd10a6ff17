"""A run over a text on two processes ends as one on a single process; run as a script, it is these runs."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from helpers.processes import as_script, fork_ranks

CONFIG = """
name: text
run_dir: {folder}
data:
  class_path: datamodules.Text
  init_args: {{path: {folder}/lines.txt, length: 8, batch_size: 40, block_lines: 5, cache: {folder}/cache}}
trainer: {{accelerator: cpu, devices: 1, max_epochs: 2, enable_progress_bar: false}}
stages:
  hmm:
    model:
      class_path: lvd_lightning.stages.HMMStudent
      init_args: {{init: random, num_states: 5, homogeneous: true}}
  baseline: {{model: {{class_path: lvd_lightning.stages.HMMBaseline}}}}
  ngrams: {{model: {{class_path: lvd_lightning.stages.NGramReference}}}}
"""


def run(folder: Path, name: str, *arguments: str) -> None:
    from lvd_lightning.cli import main

    torch.set_num_threads(1)
    assert main(["fit", f"--config={folder / 'text.yaml'}", f"--name={name}", *arguments]) == 0


def test_two_processes_end_as_one(tmp_path: Path) -> None:
    lines = [f"the {('king', 'queen')[n % 2]} {('went', 'spake', 'fled')[n % 3]} unto the land" for n in range(400)]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "text.yaml").write_text(CONFIG.format(folder=tmp_path))
    result = as_script(__file__, str(tmp_path))
    assert result.returncode == 0, result.stderr
    one, two = (json.loads((tmp_path / name / "report" / "summary.json").read_text()) for name in ("one", "two"))
    for part in (("test",), ("baseline", "random_em"), ("baseline", "random_anemone"), ("reference", "kneser_ney")):
        found = []
        for summary in (one, two):
            for key in part:
                summary = summary[key]
            found.append({key: value for key, value in summary.items() if "ppl" in key})
        assert found[0], part
        assert found[1] == pytest.approx(found[0], rel=1e-4)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in (
        "lvd_lightning.cli",
        "lvd_lightning.runs.pipeline",
        "lvd_lightning.stages.hmm_baseline",
        "datamodules",
    ):
        import_module(name)  # before processes are forked
    if not os.fork():
        run(folder, "one")
        os._exit(0)
    os.wait()
    sys.exit(fork_ranks(lambda rank: run(folder, "two", "--trainer.devices=2")))

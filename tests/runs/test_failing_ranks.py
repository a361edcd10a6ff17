"""A rank that fails, dies or hangs ends the others, within a bounded time; run as a script, it is these two ranks."""

import json
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import as_script, fork_ranks
from lightning.pytorch import Callback

CONFIG = """
run_dir: {folder}
data: {{class_path: datamodules.Digits, init_args: {{batch_size: 400, max_examples: 800}}}}
trainer:
  {{accelerator: cpu, devices: 2, max_epochs: 2, callbacks: [{{class_path: test_failing_ranks.{what}}}]}}
timeout_minutes: 0.1
stages:
  baseline:
    model:
      class_path: lvd_lightning.stages.CircuitBaseline
      init_args: {{num_units: 2, seconds: 0.1, val_images: 20}}
"""


class Fail(Callback):
    """The second rank finds something wrong."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            raise ValueError("something is wrong on one rank")


class Die(Callback):
    """The second rank is killed."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Hang(Callback):
    """The second rank goes on with something else."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.global_rank == 1:
            time.sleep(3600)


@pytest.mark.parametrize("what", ["Fail", "Die", "Hang"])
def test_both_ranks_end_and_the_message_of_the_one_that_failed_is_the_last(what: str, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(CONFIG.format(folder=tmp_path, what=what))
    result = as_script(__file__, str(tmp_path))
    codes = json.loads((tmp_path / "codes.json").read_text())
    assert len(codes) == 2, result.stderr
    assert all(codes), codes
    if what == "Fail":
        assert codes == [2, 2]
        said = [line for line in result.stderr.splitlines() if line.strip()]
        assert said[-1].startswith("error: something is wrong on one rank (stage baseline, details in ")
        assert (tmp_path / "toy" / "baseline" / "error_rank1.txt").is_file()


def run(folder: Path, rank: int) -> None:
    from lvd_lightning.cli import main

    code = main(["fit", f"--config={folder / 'toy.yaml'}", "--name=toy"])
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    for name in ("lvd_lightning.runs.pipeline", "lvd_lightning.stages.baseline", "datamodules", "test_failing_ranks"):
        import_module(name)
    where = Path(sys.argv[1])
    ended: list[int] = []
    fork_ranks(lambda rank: run(where, rank), ended=ended)
    (where / "codes.json").write_text(json.dumps(ended))

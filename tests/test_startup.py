"""What is imported before anything is done: nobody waits for a library that the answer does not need."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("transformers", "sklearn", "matplotlib", "wandb", "torchvision")


@cache
def fresh(code: str) -> list[str]:
    """The modules that a fresh process has imported when it is done with `code`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = f"import sys\n{code}\nimport json\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return list(json.loads(result.stdout.splitlines()[-1]))


def command(*words: str) -> str:
    return f"from lvd_lightning.cli import main\ntry: main({list(words)!r})\nexcept SystemExit: pass"


def packages(modules: list[str]) -> set[str]:
    return {module.split(".")[0] for module in modules}


@pytest.mark.parametrize("code", ["import lvd_lightning", "import lvd_lightning.circuits"])
def test_circuits_need_neither_lightning_nor_a_teacher(code: str) -> None:
    assert packages(fresh(code)).isdisjoint({*HEAVY, "lightning", "jsonargparse", "torchmetrics"})


@pytest.mark.parametrize(
    "words", [(), ("--help",), ("train",), ("fit", "--config", "nowhere"), ("test", "--run", "nowhere")]
)
def test_answers_that_need_no_library(words: tuple[str, ...]) -> None:
    assert packages(fresh(command(*words))).isdisjoint({*HEAVY, "torch", "lightning", "jsonargparse", "torchmetrics"})


@pytest.mark.parametrize(
    "words",
    [
        ("fit", "--config", "photos", "--print_config"),
        ("fit", "--config", "photos_pg", "--stages.conditional.trainer.max_epoch=3"),
        ("fit", "--config", "cifar10", "--stages.conditional.model.lr=fast"),
    ],
)
def test_a_configuration_is_read_without_what_training_needs(words: tuple[str, ...]) -> None:
    """Lightning itself imports parts of some of these libraries, by way of torchmetrics; no more of them is."""
    with_lightning = fresh("import lightning.pytorch")
    assert packages([name for name in fresh(command(*words)) if name not in with_lightning]).isdisjoint(HEAVY)

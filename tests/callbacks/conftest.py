"""Small runs of the circuit students, as the module tests have them."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch


def small_runs() -> ModuleType:
    """The fixtures of the module tests as a module."""
    name = "small_runs_of_callbacks"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "modules" / "conftest.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Any]:
    """A run with finished latents whose patches are of five kinds, in two clusters: 0 and 1, and 2, 3 and 4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    kind = small_runs()
    data = kind.SmallImages(160, num_states=5)
    data.z = {split: (z >= 2).long() for split, z in data.z.items()}
    yield kind.Run(tmp_path / "run", data, 2)
    torch.set_num_threads(threads)

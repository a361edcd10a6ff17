"""Small runs of the circuit students, as the module tests have them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.small_runs import Run, SmallImages


@pytest.fixture
def coarse(tmp_path: Path) -> Iterator[Any]:
    """A run with finished latents whose patches are of five kinds, in two clusters: 0 and 1, and 2, 3 and 4."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    data = SmallImages(160, num_states=5)
    data.z = {split: (z >= 2).long() for split, z in data.z.items()}
    yield Run(tmp_path / "run", data, 2)
    torch.set_num_threads(threads)

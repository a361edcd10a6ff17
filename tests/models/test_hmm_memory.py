"""The plan of memory says what tables take, and is kept."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.hmm_memory import HMMMemory, machine_memory
from lvd_lightning.models.sparse_hmm import SparseHMM


@pytest.mark.parametrize("homogeneous", [False, True])
def test_tables_are_those_of_the_model(homogeneous: bool) -> None:
    memory = HMMMemory(4, 3, 100, homogeneous, 2, "anemone")
    model = SparseHMM(random_tables(4, 3, 100, homogeneous), 4, 2, "anemone")
    assert memory.num_parameters == model.num_parameters
    tables = model.tables()
    assert memory.tables == sum(table.numel() * 4 for table in vars(tables).values())
    assert memory.averages == memory.tables
    assert HMMMemory(4, 3, 100, homogeneous, 2, "em").averages == 0


def test_the_published_size() -> None:
    memory = HMMMemory(32, 1250, 33_278, False, 256, "anemone")
    assert 1.3e9 < memory.num_parameters < 1.4e9
    assert memory.training < 2 * memory.tables + 1e9  # no third table
    with pytest.raises(ValueError, match=r"training 1,379,479,999 parameters needs .* GB .* but 8 GB are there"):
        memory.check(8.0)
    HMMMemory(32, 8, 100, False, 4, "em").check()


def test_machines_have_memory() -> None:
    assert 1e8 < machine_memory() < 1e14


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the most memory held is read from /proc")
def test_steps_stay_within_the_plan() -> None:
    """In a process of its own: the most that it held while it trained, beyond what importing takes."""
    code = """
        import re
        import torch
        from lvd_lightning.models.hmm_graph import random_tables
        from lvd_lightning.models.hmm_memory import HMMMemory
        from lvd_lightning.models.sparse_hmm import SparseHMM, sparse_optimizer

        def most():
            return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

        memory = HMMMemory(8, 64, 60_000, False, 32, "anemone")
        small = SparseHMM(random_tables(8, 4, 50, False), 8, 32, "anemone")
        small.add_flows(torch.randint(50, (32, 8)))  # compiles what has to be
        before = most()
        model = SparseHMM(random_tables(8, 64, 60_000, False), 8, 32, "anemone")
        optimizer = sparse_optimizer(model, lr=0.4, momentum=0.9, pseudocount=0.01)
        for _ in range(40):  # multiplies factors out, too
            model.add_flows(torch.randint(60_000, (32, 8)))
            optimizer.step()
            optimizer.zero_grad()
        used = most() - before
        print(used, max(memory.beginning, memory.training))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    used, planned = map(int, done.stdout.split())
    assert used < 1.1 * planned + 3e7
    assert used > 0.8 * planned  # the plan is no guess far above

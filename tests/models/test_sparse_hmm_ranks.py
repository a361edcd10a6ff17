"""Sparse steps of two processes, whose batches have different words, are those of one process with all windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import free_port, one_of_two

from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.sparse_hmm import SparseHMM, sparse_optimizer

T, K, V = 4, 3, 9
RULES = ("em", "anemone")


def train(rule: str, homogeneous: bool, part: slice) -> SparseHMM:
    model = SparseHMM(random_tables(T, K, V, homogeneous, torch.Generator().manual_seed(0), torch.float64), T, 8, rule)
    optimizer = sparse_optimizer(model, lr=0.4, momentum=0.9, pseudocount=0.01)
    for x in torch.randint(V, (6, 8, T), generator=torch.Generator().manual_seed(1)):
        model.add_flows(x[part])
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_part(rank: int, port: int, folder: str) -> None:
    with one_of_two(rank, port):
        part = slice(0, 5) if rank == 0 else slice(5, 8)
        found = {
            f"{rule}-{homogeneous}": train(rule, homogeneous, part).state_dict()
            for rule in RULES
            for homogeneous in (False, True)
        }
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(train_part, (free_port(), str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("homogeneous", [False, True])
def test_two_processes_equal_one(rule: str, homogeneous: bool, two_ranks: list[dict[str, Any]]) -> None:
    expected = train(rule, homogeneous, slice(0, 8))
    columns = f"circuit.tables.{expected.number}"  # those of the last batch's words
    for key, value in expected.state_dict().items():
        if key != columns:
            first, second = (found[f"{rule}-{homogeneous}"][key] for found in two_ranks)
            assert torch.equal(first, second), key
            torch.testing.assert_close(first, value, rtol=1e-9, atol=1e-13)

"""CircuitEM and Anemone across two processes."""

import itertools
from typing import Any

import pytest
import torch
from helpers.em_steps import step
from helpers.processes import free_port, one_of_two
from torch import Tensor

import lvd_lightning.circuits as pc

SPLITS = {"uneven": (9, 4), "one-empty": (13, 0)}


DISTRIBUTED_LEAVES = {
    "categorical": pc.Categorical(3),
    "ordered": pc.OrderedCategorical(3, share=0.3, constant=0.2),
    "gaussian": pc.Gaussian(),
    "binomial": pc.Binomial(2),
    "logistic": pc.DiscretizedLogistic(3),
    "single": pc.Binomial(2),  # parameters in single precision beside statistics in double
}


RULES = ("CircuitEM", "Anemone")


def distributed_circuit(leaf: str) -> pc.Circuit:
    torch.manual_seed(0)
    distribution = DISTRIBUTED_LEAVES[leaf]
    parents = ([-1, 0, 1], [1, -1, 1])
    return pc.Circuit(
        [pc.hclt(torch.tensor(p), 3, distribution, heads) for p, heads in zip(parents, (1, 2), strict=True)]
    )


def distributed_data(leaf: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 3, (2, 2, 13, 3), generator=generator)  # (steps, G, B, D)
    return (x + 0.5 * torch.rand(x.shape, generator=generator) if leaf == "gaussian" else x), torch.rand(2, 13)


def train(rule: str, leaf: str, part: slice) -> torch.nn.Module:
    """Two steps on a part of the examples; of two circuits under one optimizer the second rests in the second step."""
    circuit, beside = distributed_circuit(leaf), distributed_circuit(leaf)
    if leaf == "single":
        circuit, beside = circuit.float(), beside.float()
    module = torch.nn.ModuleDict({"learning": circuit, "resting": beside})
    optimizer = getattr(pc, rule)(module, lr=0.5, pseudocount=0.1)
    x, weights = distributed_data(leaf)
    for number in range(2):
        found = circuit.log_prob(x[number, :, part], head=0)
        if number == 0:
            found = found + beside.log_prob(x[number, :, part], head=0)
        step(optimizer, -(weights[number, part] * found).sum())
    return module


def try_bad_step(rule: str, rank: int) -> tuple[str, bool]:
    """What the optimizer says to a NaN among the weights of the second rank, and whether all parameters stayed."""
    circuit = distributed_circuit("categorical")
    optimizer = getattr(pc, rule)(circuit)
    x, weights = distributed_data("categorical")
    weights[0, 5] = torch.nan if rank == 1 else 1.0
    before = [table.detach().clone() for table in circuit.tables]
    (-(weights[0] * circuit.log_prob(x[0], head=0)).sum()).backward()
    try:
        optimizer.step()
    except ValueError as error:
        return str(error), all(map(torch.equal, before, circuit.tables))
    return "", False


def train_part(rank: int, port: int, folder: str) -> None:
    """One process of two: trains on its part of every batch, for every split, leaf and rule."""
    with one_of_two(rank, port):
        results = {}
        for (name, sizes), leaf, rule in itertools.product(SPLITS.items(), DISTRIBUTED_LEAVES, RULES):
            part = slice(rank * sizes[0], rank * sizes[0] + sizes[rank])
            results[f"{name}-{leaf}-{rule}"] = train(rule, leaf, part).state_dict()
        results["refusals"] = {rule: try_bad_step(rule, rank) for rule in RULES}
        torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    """What each of two processes has learnt, per split, leaf and rule."""
    folder = tmp_path_factory.mktemp("ranks")
    port = free_port()
    torch.multiprocessing.spawn(train_part, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("leaf", DISTRIBUTED_LEAVES)
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_equal_one(split: str, leaf: str, rule: str, two_ranks: list[Any]) -> None:
    """Steps on unevenly split examples, or with an empty part, are the steps on all of them in one process."""
    first, second = (part[f"{split}-{leaf}-{rule}"] for part in two_ranks)
    expected = train(rule, leaf, slice(0, 13)).state_dict()
    assert {key.split(".")[0] for key in expected} == {"learning", "resting"}
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        rtol, atol = (1e-4, 1e-6) if leaf == "single" else (1e-9, 1e-12)
        torch.testing.assert_close(first[key], value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("rule", RULES)
def test_a_nan_on_one_rank_stops_both(rule: str, two_ranks: list[Any]) -> None:
    """The rank that has it names the example, the other one the head that it got it from."""
    (other, stayed), (guilty, stayed_too) = (part["refusals"][rule] for part in two_ranks)
    assert "first of head 0 of circuit " in other
    assert "first of example 5 under head 0 of circuit 0;" in guilty
    assert stayed
    assert stayed_too

"""Emissions that a step touches where words occurred are those of the dense rule, to the last digits."""

from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.models.sparse_hmm import SparseHMM, sparse_optimizer

T, K, V = 4, 3, 11


def batches(count: int, size: int = 6) -> torch.Tensor:
    """Words of a batch are few, and others from batch to batch."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(V - 3, (count, 1, 1), generator=generator)
    return low + torch.randint(4, (count, size, T), generator=generator)


def both(homogeneous: bool, rule: str, batch_size: int = 6, **settings: Any) -> tuple[Any, ...]:
    tables = random_tables(T, K, V, homogeneous, torch.Generator().manual_seed(1), torch.float64)
    dense = HiddenMarkovModel.from_tables(tables, T)
    sparse = SparseHMM(tables, T, batch_size, rule)
    settings = {"lr": 0.4, "pseudocount": 0.01, **settings}
    if rule == "anemone":
        optimizer: Any = pc.Anemone(dense, momentum=0.9, **settings)
    else:
        optimizer = pc.CircuitEM(dense, **settings)
    return dense, optimizer, sparse, sparse_optimizer(sparse, momentum=0.9, **settings)


def dense_step(model: HiddenMarkovModel, optimizer: Any, *parts: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    for x, observed in parts:
        (-model.log_prob(x, observed).sum()).backward()
    optimizer.step()
    optimizer.zero_grad()


def sparse_step(model: SparseHMM, optimizer: Any, *parts: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    for x, observed in parts:
        model.add_flows(x, observed)
    optimizer.step()
    optimizer.zero_grad()


def assert_same(dense: HiddenMarkovModel, sparse: SparseHMM) -> None:
    for name in ("initial_K", "transition_SKK", "emission_SKV"):
        one, other = getattr(dense.tables(), name), getattr(sparse.tables(), name)
        torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("rule", ["em", "anemone"])
@pytest.mark.parametrize("settings", [{}, {"lr": 1.0}, {"pseudocount": 1e-6}, {"lr": 0.05}], ids=str)
def test_many_steps_are_those_of_the_dense_rule(homogeneous: bool, rule: str, settings: dict[str, float]) -> None:
    dense, dense_optimizer, sparse, optimizer = both(homogeneous, rule, **settings)
    for number, x in enumerate(batches(120)):
        torch.testing.assert_close(sparse.log_prob(x), dense.log_prob(x).detach(), rtol=1e-9, atol=1e-9)
        dense_step(dense, dense_optimizer, (x, None))
        sparse_step(sparse, optimizer, (x, None))
        if number in (0, 1, 5):  # to look multiplies factors out, which must not matter
            assert_same(dense, sparse)
    assert_same(dense, sparse)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_missing_words_and_flows_of_several_batches(homogeneous: bool, rule: str) -> None:
    dense, dense_optimizer, sparse, optimizer = both(homogeneous, rule, batch_size=4)  # batches of 6 are divided
    generator = torch.Generator().manual_seed(2)
    for x, y in batches(20).view(10, 2, 6, T):
        masks = torch.rand(2, 6, T, generator=generator) < 0.7
        parts = [(x, masks[0]), (y, masks[1])]
        dense_step(dense, dense_optimizer, *parts)
        sparse_step(sparse, optimizer, *parts)
    assert_same(dense, sparse)


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_a_falling_step_size(rule: str) -> None:
    dense, dense_optimizer, sparse, optimizer = both(False, rule)
    for number, x in enumerate(batches(30)):
        for found in (dense_optimizer, optimizer):
            found.param_groups[0]["lr"] = 0.4 * (1 - number / 30)
        dense_step(dense, dense_optimizer, (x, None))
        sparse_step(sparse, optimizer, (x, None))
    assert_same(dense, sparse)


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_single_precision_is_as_good_as_that_of_the_dense_rule(rule: str) -> None:
    """Before factors are multiplied out, when what is stored is largest."""
    exact, exact_optimizer, _, _ = both(False, rule)
    tables = random_tables(T, K, V, False, torch.Generator().manual_seed(1), torch.float64)
    single = type(tables)(*(table.float() for table in vars(tables).values()))
    sparse = SparseHMM(single, T, 6, rule)
    optimizer = sparse_optimizer(sparse, lr=0.4, momentum=0.9, pseudocount=0.01)
    for x in batches(70):
        dense_step(exact, exact_optimizer, (x, None))
        sparse_step(sparse, optimizer, (x, None))
    assert 1e-18 < float(sparse.emissions.factor_SK.min()) < 1e-12
    found = sparse.emissions.table_SKV().double()
    torch.testing.assert_close(found, exact.tables().emission_SKV, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_in_single_precision_rows_still_sum_to_one(rule: str) -> None:
    tables = random_tables(T, K, V, False, torch.Generator().manual_seed(1))
    sparse = SparseHMM(tables, T, 6, rule)
    optimizer = sparse_optimizer(sparse, lr=0.4, momentum=0.9, pseudocount=0.01)
    for x in batches(300):
        sparse_step(sparse, optimizer, (x, None))
    sparse.emissions.multiply_out()
    sums = sparse.emissions.stored_SVK.sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-3, atol=1e-3)


def test_flows_are_forgotten_where_no_step_was_taken() -> None:
    _, _, sparse, optimizer = both(False, "em")
    x, y = batches(2)
    sparse.add_flows(x)
    optimizer.zero_grad()
    sparse.add_flows(y)
    keys, _ = sparse.flows()
    assert torch.equal(keys, sparse.emissions.keys(torch.arange(T), y).unique())


def test_it_allocates_no_table_of_its_own() -> None:
    """With 50,000 words a step makes tensors of the size of a batch's words alone."""
    words = 50_000
    sparse = SparseHMM(random_tables(T, 8, words, False), T, 6, "anemone")
    optimizer = sparse_optimizer(sparse, lr=0.1, momentum=0.9, pseudocount=0.01)
    sparse_step(sparse, optimizer, (batches(1)[0], None))
    with torch.profiler.profile(profile_memory=True) as profile:
        sparse_step(sparse, optimizer, (batches(1)[0], None))
    largest = max(abs(event.self_cpu_memory_usage) for event in profile.events())
    assert largest < T * 8 * words * 4 / 50


def test_parameters_are_counted_as_in_the_model() -> None:
    for homogeneous in (False, True):
        dense, _, sparse, _ = both(homogeneous, "em")
        assert sparse.num_parameters == dense.num_parameters == sparse.finished().num_parameters


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_a_model_taken_apart_is_the_finished_one(rule: str) -> None:
    _, _, sparse, optimizer = both(False, rule)
    for x in batches(3):
        sparse_step(sparse, optimizer, (x, None))
    x, finished = batches(1)[0], sparse.finished(reserved=4)
    taken = sparse.taken(reserved=4)
    assert torch.equal(taken.log_prob(x), finished.log_prob(x))
    assert taken.reserved == 4
    assert sum(found.numel() for found in sparse.emissions.buffers()) < T * K * V

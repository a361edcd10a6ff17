"""Parameters in a type that is asked for: tables sum to one in it, and what was drawn in single precision stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.structures.drawing import in_type

LEAVES = [pc.Categorical(7), pc.Bernoulli(), pc.Binomial(4), pc.Gaussian(), pc.DiscretizedLogistic(5)]
PARENTS = torch.tensor([-1, 0, 1, 0])
STRUCTURES: dict[str, Callable[..., pc.CircuitGraph]] = {
    "hclt": lambda leaf, **rest: pc.hclt(PARENTS, 3, leaf, **rest),
    "hclt of several families": lambda leaf, **rest: pc.hclt(PARENTS, 3, [leaf, pc.Categorical(3)] * 2, **rest),
    "hmm": lambda leaf, **rest: pc.hmm(4, 3, leaf=leaf, **rest),
    "tied hmm": lambda leaf, **rest: pc.hmm(4, 3, leaf=leaf, homogeneous=True, **rest),
    "rat_spn": lambda leaf, **rest: pc.rat_spn(
        4, depth=2, num_repetitions=2, num_sums=3, num_leaves=2, leaf=leaf, **rest
    ),
    "poon_domingos": lambda leaf, **rest: pc.poon_domingos((2, 2, 1), delta=1, num_units=3, leaf=leaf, **rest),
}


@pytest.fixture(autouse=True)
def single_precision(double_precision: None) -> None:
    torch.set_default_dtype(torch.float32)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("leaf", LEAVES, ids=str)
@pytest.mark.parametrize("name", STRUCTURES)
def test_tables_sum_to_one_in_double_precision(name: str, leaf: pc.Distribution) -> None:
    graph = STRUCTURES[name](leaf, generator=generator(), dtype=torch.float64)
    for node in graph.nodes:
        table = node.weight if node.kind == "sum" else node.params
        if table is not None:
            assert table.dtype == torch.float64
            if node.distribution is None or node.distribution.is_table:
                torch.testing.assert_close(table.sum(-1), torch.ones(len(table)).double(), rtol=0, atol=1e-15)
    assert pc.Circuit(graph).dtype == torch.float64


@pytest.mark.parametrize("shape", [(2, 2, 1), (2, 2, 2)])
def test_worlds_sum_to_one_in_double_precision(shape: tuple[int, int, int]) -> None:
    graph = pc.poon_domingos(
        shape, delta=1, num_units=2, leaf=pc.Bernoulli(), generator=generator(), dtype=torch.float64
    )
    num_variables = shape[0] * shape[1] * shape[2]
    worlds = torch.cartesian_prod(*[torch.arange(2)] * num_variables)
    assert abs(pc.Circuit(graph).log_prob(worlds).detach().exp().sum().item() - 1) < 1e-14


def test_what_is_drawn_in_single_precision_stays() -> None:
    """Bit for bit, in its own type; in a wider one it is divided by its sum there."""
    drawn = pc.Categorical(5).initial(4, generator=generator())
    assert in_type(pc.Categorical(5), drawn, torch.float32) is drawn
    wide = in_type(pc.Categorical(5), drawn, torch.float64)
    assert torch.equal(wide, drawn.double() / drawn.double().sum(1, keepdim=True))
    graph = pc.hclt(torch.tensor([-1]), 4, pc.Categorical(5), generator=generator())
    assert torch.equal(graph.nodes[0].params, drawn)
    moments = torch.tensor([[0.3, 2.0]])
    assert torch.equal(in_type(pc.Gaussian(), moments, torch.float64), moments.double())


def test_regions_from_data_sum_to_one_in_double_precision() -> None:
    leaf = pc.Categorical(5)
    graph = pc.rat_spn(4, depth=2, num_repetitions=2, num_sums=3, num_leaves=3, leaf=leaf, dtype=torch.float64)
    x = torch.randint(0, 5, (60, 4), generator=generator())
    for node in pc.regions_from_data(graph, x, generator=generator()).nodes:
        table = node.weight if node.kind == "sum" else node.params
        if table is not None:
            assert table.dtype == torch.float64
            torch.testing.assert_close(table.sum(-1), torch.ones(len(table)).double(), rtol=0, atol=1e-15)


WRONG: list[Any] = [torch.float16, torch.bfloat16, torch.int64, int, float, "float64"]


@pytest.mark.parametrize("dtype", WRONG, ids=str)
@pytest.mark.parametrize("name", ["hclt", "hmm", "rat_spn", "poon_domingos"])
def test_other_types_are_refused(name: str, dtype: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: dtype: got .*expected torch.float32 or torch.float64"):
        STRUCTURES[name](pc.Categorical(3), dtype=dtype)

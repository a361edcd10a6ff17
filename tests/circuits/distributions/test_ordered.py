"""Ordered categoricals: what a prior adds, and what EM with it comes to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.em_steps import step
from helpers.families import prior_counts
from torch import Tensor

import lvd_lightning.circuits as pc


def added(family: pc.OrderedCategorical, flow: Tensor) -> Tensor:
    """The pseudocounts for flows (K, C), value by value in NumPy."""
    return torch.from_numpy(prior_counts(family, flow.double().numpy()))


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize("size", [20, 256])
def test_a_unit_does_not_get_wider_with_every_step(rule: Any, size: int) -> None:
    """A thousand steps on the same data end where one step of size 1 leads: (F + share F * g) / (1 + share)."""
    family = pc.OrderedCategorical(size, share=0.4, width=1.5)
    x = torch.tensor([0, 0, 1, 7, 12, 12, 12, size - 1])[:, None]
    circuit = pc.Circuit(pc.hclt([-1], num_latents=1, leaf=family))
    optimizer = rule(circuit, lr=0.3, pseudocount=0.0)
    for _ in range(1000):
        step(optimizer, -circuit.log_prob(x).sum())
    flow = torch.bincount(x[:, 0], minlength=size).double()[None]
    expected = (flow + added(family, flow)) / (1.4 * len(x))
    found = circuit.log_prob(torch.arange(size)[:, None]).exp().T
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-25)


def steps(circuit: pc.Circuit, optimizer: torch.optim.Optimizer, x: Tensor, number: int) -> list[Tensor]:
    """The tables after some steps on parts of the examples."""
    for part in x.chunk(number):
        step(optimizer, -circuit.log_prob(part, head=0).sum())
    return [table.detach() for table in circuit.tables]


@pytest.mark.parametrize("structure", ["chain", "shared", "tied", "ragged"])
@pytest.mark.parametrize("pseudocount", [0.0, 0.2])
def test_anemone_without_memory_is_em(structure: str, pseudocount: float, build_case: Callable[..., Any]) -> None:
    """With momentum 0 and step size 1."""
    results = []
    for rule, settings in ((pc.CircuitEM, {}), (pc.Anemone, {"momentum": 0.0})):
        case = build_case(structure, "ordered", 2)
        optimizer = rule(case.circuit, lr=1.0, pseudocount=pseudocount, **settings)
        results.append(steps(case.circuit, optimizer, case.x, 3))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_a_prior_it_is_a_categorical_to_the_last_bit(rule: Any, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    generator = torch.Generator().manual_seed(0)
    x, unit = torch.randint(0, 40, (60, 3), generator=generator), torch.randint(0, 2, (60, 3), generator=generator)
    plain, ordered = pc.Categorical(40), pc.OrderedCategorical(40, share=0.0, constant=0.0)
    assert torch.equal(plain.from_data(x, unit, 2), ordered.from_data(x, unit, 2))
    results = []
    for leaf in (plain, ordered):
        graph = pc.hclt([1, -1, 1], 4, leaf, generator=torch.Generator().manual_seed(1))
        circuit = pc.Circuit(graph)
        results.append(steps(circuit, rule(circuit), x, 5))
    assert all(map(torch.equal, *results))


def test_first_parameters_are_smooth() -> None:
    """Counts of a unit are smoothed as flows are; the values of all units come on top."""
    family = pc.OrderedCategorical(30, share=0.5, width=2.0, constant=1.0)
    x, unit = torch.tensor([3, 3, 20, 29])[:, None], torch.tensor([0, 0, 1, 1])[:, None]
    counts = torch.stack([torch.bincount(x[unit == u], minlength=30) for u in range(2)]).double()
    expected = counts + added(family, counts)
    found = family.from_data(x, unit, 2, smoothing=1e-12)[0]
    torch.testing.assert_close(found, expected / expected.sum(1, keepdim=True), rtol=1e-9, atol=1e-12)


def test_a_value_between_seen_ones_is_likely() -> None:
    """What a categorical has never seen, and one that is ordered nearly has."""
    x = 2 * torch.randint(0, 10, (200, 2), generator=torch.Generator().manual_seed(0))
    values = {}
    for leaf in (pc.Categorical(20), pc.OrderedCategorical(20)):
        circuit = pc.Circuit(pc.hclt([-1, 0], 2, leaf, generator=torch.Generator().manual_seed(0)))
        optimizer = pc.Anemone(circuit)
        for _ in range(50):
            step(optimizer, -circuit.log_prob(x).sum())
        values[type(leaf)] = circuit.log_prob((x + 1).clamp_max(19)).mean().item()
    assert values[pc.OrderedCategorical] > -10
    assert values[pc.Categorical] < -20


def test_edits_and_files_keep_the_prior(tmp_path: Path) -> None:
    """Each of two families, whose numbers of values differ, through pruning, growing and a file."""
    leaves = [pc.OrderedCategorical(size, share=0.1, width=2.0, constant=0.01) for size in (6, 9)]
    circuit = pc.Circuit(pc.hclt([-1, 0], 3, leaves))
    x = torch.stack([torch.randint(0, size, (30,)) for size in (6, 9)], 1)
    for edit in (lambda old, flows: pc.prune(old, flows), lambda old, flows: pc.grow(old, flows, heads=[0])):
        flows = pc.Flows(circuit)
        flows.add(x)
        circuit = pc.Circuit(edit(circuit, flows))
    again = pc.load(pc.save(circuit, tmp_path / "circuit"))
    assert torch.equal(again.log_prob(x), circuit.log_prob(x))
    for found in (circuit, again):
        assert {(node.variable, node.distribution) for node in found.to_graph().nodes if node.kind == "input"} == {
            *enumerate(leaves)
        }
    for found in (circuit, again):
        step(pc.Anemone(found), -found.log_prob(x).sum())
    assert all(map(torch.equal, circuit.tables, again.tables))


def test_a_prior_that_outweighs_the_data_moves_no_further_than_the_step() -> None:
    """An averaged rule with a large constant: the distance to the smoothed flows shrinks by the step size."""
    family = pc.OrderedCategorical(8, share=0.2, constant=50.0)
    circuit = pc.Circuit(pc.hclt([-1], num_latents=1, leaf=family))
    x = torch.tensor([[1], [6], [6]])
    flow = torch.tensor([[0, 1, 0, 0, 0, 0, 2, 0]]).double()
    target = (flow + added(family, flow)).numpy() / (1.2 * 3 + 50)
    before = circuit.log_prob(torch.arange(8)[:, None]).exp().detach().T.numpy()
    step(pc.Anemone(circuit, lr=0.3, pseudocount=0.0), -circuit.log_prob(x).sum())
    after = circuit.log_prob(torch.arange(8)[:, None]).exp().detach().T.numpy()
    np.testing.assert_allclose(after, 0.7 * before + 0.3 * target, rtol=1e-9)

"""Pruning and growing a batch does to every circuit what it would do to it alone, with its own patches."""

from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import circuit as limits
from lvd_lightning.growing import CircuitSize, examples, grow_circuits, mean_log_probs, prune_circuits


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "CHUNK_IMAGES", 7)
    monkeypatch.setitem(limits.MAX_NUMBERS, "cpu", 2000)


def own(small: Any, g: int, heads: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """The patches of a circuit (or of some heads of it) and their heads."""
    circuit, head = small.examples.circuit_NP.flatten(), small.examples.head_NP.flatten().long()
    chosen = circuit == g
    if heads is not None:
        chosen &= torch.isin(head, torch.tensor(heads, dtype=torch.int64))
    return small.patches[chosen], head[chosen]


def alone(small: Any, g: int, heads: list[int] | None = None) -> tuple[pc.Circuit, pc.Flows]:
    circuit = pc.Circuit(small.graphs[g])
    flows = pc.Flows(circuit)
    x, head = own(small, g, heads)
    flows.add(x, head=head, weight=torch.ones(len(x)))
    return circuit, flows


@pytest.mark.parametrize("threshold", [0.0, 0.02, 0.2])
def test_every_circuit_is_pruned_by_its_own_patches(small: Any, threshold: float) -> None:
    found = prune_circuits(small.circuit, small.examples, threshold)
    assert len(found) == 4
    for g in range(3):
        expected = pc.prune(*alone(small, g), threshold=threshold)
        assert CircuitSize.of(pc.Circuit(found[g])) == CircuitSize.of(pc.Circuit(expected))
        log_prob = pc.Circuit(expected).log_prob(small.patches)
        torch.testing.assert_close(pc.Circuit(found[g]).log_prob(small.patches), log_prob)
    smaller = CircuitSize.of(pc.Circuit(found[:2])).edges < CircuitSize.of(pc.Circuit(small.graphs[:2])).edges
    assert smaller == (threshold > 0)


def test_circuits_without_patches_stay(small: Any) -> None:
    """And heads without any keep an edge, so that all values stay finite."""
    found = prune_circuits(small.circuit, small.examples, 0.2)
    torch.testing.assert_close(
        pc.Circuit(found[3]).log_prob(small.patches), pc.Circuit(small.graphs[3]).log_prob(small.patches)
    )
    assert found[2].num_heads == 3
    assert torch.isfinite(pc.Circuit(found[2]).log_prob(small.patches)[:, 2]).all()


def test_pruning_nothing_but_zeros_keeps_the_likelihood(small: Any) -> None:
    before, count = mean_log_probs(small.circuit, small.examples)
    after, _ = mean_log_probs(pc.Circuit(prune_circuits(small.circuit, small.examples, 0.0)), small.examples)
    torch.testing.assert_close(after[count > 0], before[count > 0])


def test_growth_without_noise_leaves_old_heads_as_they_were(small: Any) -> None:
    heads = [[1, 0], [], [1], []]
    found = grow_circuits(small.circuit, small.examples, heads, sigma=0.0, generator=torch.Generator().manual_seed(0))
    assert [graph.num_heads for graph in found] == [4, 1, 4, 2]
    before, after = small.circuit.log_prob(small.patches), pc.Circuit(found).log_prob(small.patches)
    for g, graph in enumerate(small.graphs):
        torch.testing.assert_close(after[g, :, : graph.num_heads], before[g, :, : graph.num_heads])
    for g in (1, 3):
        assert CircuitSize.of(pc.Circuit(found[g])) == CircuitSize.of(pc.Circuit(small.graphs[g]))
    for g in (0, 2):
        assert CircuitSize.of(pc.Circuit(found[g])).parameters > CircuitSize.of(pc.Circuit(small.graphs[g])).parameters


def test_every_circuit_grows_by_the_patches_of_its_growing_heads(small: Any) -> None:
    """The circuits of one group: the same units become two as if each had been alone."""
    heads = [[0], [0], [1], []]
    found = grow_circuits(small.circuit, small.examples, heads, sigma=0.2, generator=torch.Generator().manual_seed(0))
    for g in range(3):
        circuit, flows = alone(small, g, heads[g])
        generator = torch.Generator().manual_seed(1)
        expected = pc.grow(circuit, flows, heads=heads[g], sigma=0.2, generator=generator)
        assert [node.num_units for node in found[g].nodes] == [node.num_units for node in expected.nodes]


def test_the_generator_decides(small: Any) -> None:
    heads = [[0], [0], [1], []]
    found = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        graphs = grow_circuits(small.circuit, small.examples, heads, sigma=0.2, generator=generator)
        found.append(pc.Circuit(graphs).log_prob(small.patches[:5]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])

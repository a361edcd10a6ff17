"""Padded shapes of folded layers: few, wide enough, little padding, and the same for nodes that share parameters."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.buckets import merge_shapes
from lvd_lightning.circuits.engine.plan import compile_plan


def padding(counts: dict[tuple[int, int], int], merged: dict[tuple[int, int], tuple[int, int]]) -> float:
    """Edges computed for each live one."""
    live = sum(count * outer * inner for (outer, inner), count in counts.items())
    return sum(count * merged[shape][0] * merged[shape][1] for shape, count in counts.items()) / live


def test_shapes_are_covered_by_fewer() -> None:
    counts = {(o, i): 1 + (o * i) % 7 for o, i in itertools.product(range(2, 17), repeat=2)}
    merged = merge_shapes(counts)
    assert all(a <= x and b <= y for (a, b), (x, y) in merged.items())
    assert len(set(merged.values())) < 12
    assert padding(counts, merged) < 1.6


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({(3, 4): 5}, {(3, 4)}),
        ({(3, 4): 5, (4, 3): 2}, {(4, 4)}),  # a handful of small nodes: one layer
        ({(3, 4): 10000, (4, 3): 10000}, {(3, 4), (4, 3)}),  # so many that a layer more costs less than padding
        ({(100, 100): 3, (300, 300): 3, (301, 299): 3}, {(100, 100), (301, 300)}),
    ],
)
def test_what_merges(counts: dict[tuple[int, int], int], expected: set[tuple[int, int]]) -> None:
    assert set(merge_shapes(counts).values()) == expected


def test_layers_on_several_levels_count_each() -> None:
    counts = {(8, 8): 40, (12, 12): 40}
    assert len(set(merge_shapes(counts).values())) == 2
    assert len(set(merge_shapes(counts, num_layers=10).values())) == 1


def test_thousands_of_shapes_are_rounded_first() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randint(200, 1000, (3000, 2), generator=generator).tolist()
    counts = dict.fromkeys(map(tuple, shapes), 1)
    merged = merge_shapes(counts)
    assert all(a <= x and b <= y for (a, b), (x, y) in merged.items())
    assert padding(counts, merged) < 1.5


def test_tied_nodes_share_a_shape_whatever_their_levels_hold(enumerate_trees: Callable[..., Any]) -> None:
    """Two tied sums on different levels, one of them beside a wider sum that it would otherwise be padded to."""
    graph = pc.CircuitGraph()
    first, second, third = (graph.add_input(v, pc.Categorical(3), units) for v, units in enumerate((2, 5, 2)))
    low, wide = graph.add_sum([first], 2), graph.add_sum([second], 2)
    high = graph.add_sum([graph.add_product([low, wide])], 2, tied_to=low)
    graph.root = graph.add_sum([graph.add_product([high, third])], 1)
    plan = compile_plan([graph])
    found = {key: (layer.group, layer.parameter_rows[k]) for layer in plan.layers for k, key in enumerate(layer.nodes)}
    assert found[0, low] == found[0, high]
    x = torch.cartesian_prod(*[torch.arange(3)] * 3)
    torch.testing.assert_close(
        pc.Circuit(graph).log_prob(x).detach(), torch.from_numpy(enumerate_trees(graph).log_prob(x))
    )


def test_dense_batches_are_not_padded() -> None:
    """The heads of the flat tree lie beside inner nodes of the deep one, whose table would need a mask for them."""
    graphs = [pc.hclt(torch.tensor(parents), 6, pc.Categorical(3)) for parents in ([-1, 0, 0], [-1, 0, 1])]
    circuit = pc.Circuit(graphs)
    assert sorted(group.shape for group in circuit.plan.groups) == [(1, 6), (6, 3), (6, 6)]
    assert all(circuit.engine.mask(number) is None for number in range(3))


def test_soft_evidence_keeps_its_states() -> None:
    """Inputs of different widths are refused, not padded to one."""
    graph = pc.CircuitGraph()
    leaves = [graph.add_sum([graph.add_input(v, pc.SoftEvidence(3), 2 + v)], 2) for v in range(2)]
    graph.root = graph.add_sum([graph.add_product(leaves)], 1)
    with pytest.raises(ValueError, match="same number of states"):
        pc.Circuit(graph)

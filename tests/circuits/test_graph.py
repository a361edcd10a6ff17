"""What a graph refuses, and what it knows of itself."""

from collections.abc import Callable

import pytest
import torch

import lvd_lightning.circuits as pc


def two_leaves() -> tuple[pc.CircuitGraph, int, int]:
    graph = pc.CircuitGraph()
    return graph, graph.add_input(0, pc.Categorical(3), 2), graph.add_input(1, pc.Categorical(3), 2)


def test_weights_are_normalised_over_live_edges() -> None:
    graph, first, _ = two_leaves()
    mask = torch.tensor([[True, False], [True, True]])
    node = graph.nodes[graph.add_sum([first], 2, weight=torch.tensor([[2.0, 5.0], [1.0, 3.0]]), mask=mask)]
    torch.testing.assert_close(node.weight, torch.tensor([[1.0, 0.0], [0.25, 0.75]]))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g, a, b: g.add_sum([a, b], 1), "smooth"),
        (lambda g, a, b: g.add_sum([g.add_product([a, g.add_product([a, b])])], 1), "decomposable"),
        (lambda g, a, b: g.add_sum([a], 1), "used by no other node"),
        (lambda g, a, b: g.add_sum([g.add_product([a, b, g.add_input(3, pc.Bernoulli(), 2)])], 1), "variables"),
    ],
)
def test_bad_circuits_are_named(edit: Callable[[pc.CircuitGraph, int, int], int], message: str) -> None:
    graph, first, second = two_leaves()
    graph.root = edit(graph, first, second)
    with pytest.raises(ValueError, match=message):
        pc.Circuit(graph)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g, a, b: g.add_input(-1, pc.Bernoulli(), 2), "variable.*-1"),
        (lambda g, a, b: g.add_input(0, pc.Bernoulli(), 0), "num_units.*0"),
        (lambda g, a, b: g.add_input(0, pc.Categorical(2), 1, params=torch.ones(1, 3)), r"\(1, 2\).*\(1, 3\)"),
        (lambda g, a, b: g.add_input(0, pc.Categorical(2), 1, params=torch.ones(1, 2)), "sum to one"),
        (lambda g, a, b: g.add_input(0, pc.Gaussian(), 1, params=torch.zeros(1, 2)), "positive"),
        (lambda g, a, b: g.add_product([]), "child"),
        (lambda g, a, b: g.add_product([a, 9]), "9"),
        (lambda g, a, b: g.add_product([a, g.add_input(1, pc.Bernoulli(), 3)]), r"\[2, 3\]"),
        (lambda g, a, b: g.add_product([a, b], torch.tensor([[0, 2]])), "unit"),
        (lambda g, a, b: g.add_product([a, b], torch.tensor([[0]])), "units"),
        (lambda g, a, b: g.add_sum([a], 0), "num_units"),
        (lambda g, a, b: g.add_sum([a], 1, weight=torch.ones(1, 3)), r"\(1, 2\).*\(1, 3\)"),
        (lambda g, a, b: g.add_sum([a], 1, weight=-torch.ones(1, 2)), "non-negative"),
        (lambda g, a, b: g.add_sum([a], 1, weight=torch.full((1, 2), torch.nan)), "finite"),
        (lambda g, a, b: g.add_sum([a], 1, mask=torch.zeros(1, 2, dtype=torch.bool)), "live edge"),
        (lambda g, a, b: g.add_sum([a], 2, tied_to=b), "tied_to"),
        (lambda g, a, b: pc.Categorical(0), "num_categories.*0"),
        (lambda g, a, b: pc.Gaussian(min_std=0.0), "min_std"),
        (lambda g, a, b: pc.SoftEvidence(0), "num_states"),
    ],
)
def test_bad_nodes_are_named(edit: Callable[[pc.CircuitGraph, int, int], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        edit(*two_leaves())


def test_scopes() -> None:
    graph, first, second = two_leaves()
    product = graph.add_product([first, second])
    root = graph.add_sum([product], 1)
    assert graph.scopes() == [{0}, {1}, {0, 1}, {0, 1}]
    assert (graph.root, graph.num_heads, graph.num_variables) == (root, 1, 2)

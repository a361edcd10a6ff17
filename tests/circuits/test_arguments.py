"""Arguments of graphs, queries, flows and growth that are of a wrong kind: a ValueError that names them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lvd_lightning.circuits as pc

LEAF = pc.Categorical(3)
PARENTS = torch.tensor([-1, 0, 1])
X = torch.zeros(2, 3, dtype=torch.int64)
SEEN = torch.ones(2, 3, dtype=torch.bool)


def pair() -> pc.CircuitGraph:
    """Nodes 0 and 1, inputs of two units."""
    graph = pc.CircuitGraph()
    for variable in range(2):
        graph.add_input(variable, LEAF, 2)
    return graph


def circuit(num_heads: int = 1) -> pc.Circuit:
    return pc.Circuit(pc.hclt(PARENTS, 2, LEAF, num_heads))


def flows(of: pc.Circuit) -> pc.Flows:
    found = pc.Flows(of)
    found.add(X)
    return found


def grow(heads: Any, **rest: Any) -> Any:
    made = circuit()
    return pc.grow(made, flows(made), heads, **rest)


GRAPHS: list[tuple[Callable[[], Any], str]] = [
    (lambda: pair().add_input(0, pc.Categorical, 2), "add_input: distribution: .*the class Categorical itself"),
    (lambda: pair().add_input(0, None, 2), "add_input: distribution: .*got None"),
    (lambda: pair().add_input(0.5, LEAF, 2), "add_input: variable: got 0.5, expected a whole number, 0 or larger"),
    (lambda: pair().add_input(True, LEAF, 2), "add_input: variable: got True, expected a whole number"),
    (lambda: pair().add_input(-1, LEAF, 2), "add_input: variable: got -1, expected a whole number, 0 or larger"),
    (lambda: pair().add_input(0, LEAF, 1.5), "add_input: num_units: got 1.5, expected a whole number"),
    (lambda: pair().add_input(0, LEAF, 2, params="a"), "add_input: params: got 'a', expected a tensor of numbers"),
    (
        lambda: pair().add_input(0, LEAF, 2, params=[[1], [1, 2]]),
        "add_input: params: got .*expected a tensor of numbers",
    ),
    (
        lambda: pair().add_input(0, LEAF, 1, params=torch.tensor([[1, 0, 0]])),
        "add_input: params: got .*expected .*floating",
    ),
    (lambda: pair().add_input(0, LEAF, 2, generator=3), "add_input: generator: .*got 3"),
    (lambda: pair().add_input(0, LEAF, 2, tied_to="a"), "tied_to: got 'a', expected the id of a node"),
    (lambda: pair().add_sum(0, 1), "add_sum: children: got 0, expected a list of node ids"),
    (lambda: pair().add_sum([0.5], 1), r"add_sum: children: got \[0.5\], expected a list of node ids"),
    (lambda: pair().add_sum(torch.tensor(0), 1), "add_sum: children: got a tensor .*, expected a list of node ids"),
    (lambda: pair().add_sum([], 1), "add_sum: needs at least one child"),
    (lambda: pair().add_sum([0], 1.5), "add_sum: num_units: got 1.5, expected a whole number"),
    (lambda: pair().add_sum([0], 1, weight="ab"), "add_sum: weight: got 'ab', expected a tensor of numbers"),
    (lambda: pair().add_sum([0], 1, weight=[0.5]), r"add_sum: weight must have shape \(1, 2\), got \(1,\)"),
    (lambda: pair().add_sum([0], 1, mask={}), "add_sum: mask: got dict, expected a tensor of numbers"),
    (lambda: pair().add_sum([0], 1, generator=3), "add_sum: generator: got 3, expected a torch.Generator or None"),
    (lambda: pair().add_sum([0], 2, tied_to=0.0), "tied_to: got 0.0, expected the id of a node"),
    (lambda: pair().add_product("ab"), "add_product: children: got 'ab', expected a list of node ids"),
    (
        lambda: pair().add_product([0, 1], torch.tensor([[0.0, 1.0]])),
        "add_product: units: got .*expected whole numbers",
    ),
    (lambda: pair().add_product([0, 1], [[0.7, 1]]), "add_product: units: got .*expected whole numbers"),
    (lambda: pair().add_product([0, 1], "ab"), "add_product: units: got 'ab', expected a tensor of numbers"),
    (lambda: pair().embed("x"), "embed: other: got 'x', expected a CircuitGraph"),
    (lambda: pair().embed(circuit()), r"embed: other: got Circuit, .*; give its graph: circuit.to_graph\(\)"),
    (lambda: pair().embed(pair(), [0.5, 1]), r"embed: variables must be 2 different .*got \[0.5, 1\]"),
    (lambda: pair().embed(pair(), 3), "embed: variables must be 2 different .*got 3"),
    (lambda: pair().embed(pair(), latents="a"), "embed: latents: got 'a', expected a whole number or None"),
]

FAMILIES: list[tuple[Callable[[], Any], str]] = [
    (lambda: pc.Categorical(2.5), "Categorical: num_categories: got 2.5, expected a whole number of at least 1"),
    (lambda: pc.Categorical(True), "Categorical: num_categories: got True, expected a whole number of at least 1"),
    (lambda: pc.Categorical("3"), "Categorical: num_categories: got '3', expected a whole number of at least 1"),
    (lambda: pc.Categorical(torch.ones(2)), "Categorical: num_categories: got .*expected a whole number"),
    (lambda: pc.Bernoulli(2.0), "Bernoulli: has 2 categories, got num_categories=2.0"),
    (lambda: pc.Binomial(1.5), "Binomial: total: got 1.5, expected a whole number of at least 1"),
    (lambda: pc.Binomial(3, "a"), "Binomial: min_prob must .*got 'a'"),
    (
        lambda: pc.DiscretizedLogistic(2.5),
        "DiscretizedLogistic: num_values: got 2.5, expected a whole number of at least 2",
    ),
    (lambda: pc.DiscretizedLogistic(4, None), "DiscretizedLogistic: min_scale must .*got None"),
    (lambda: pc.SoftEvidence(2.5), "SoftEvidence: num_states: got 2.5, expected a whole number of at least 1"),
    (lambda: pc.Gaussian("a"), "Gaussian: min_std: got 'a', expected "),
]

QUERIES: list[tuple[Callable[[], Any], str]] = [
    (lambda: circuit().sample(2.5), "sample: n: got 2.5, expected a whole number, 0 or larger"),
    (lambda: circuit().sample("3"), "sample: n: got '3', expected a whole number, 0 or larger"),
    (lambda: circuit().sample(True), "sample: n: got True, expected a whole number, 0 or larger"),
    (lambda: circuit().sample(-1), "sample: n: got -1, expected a whole number, 0 or larger"),
    (lambda: circuit().sample(X), "sample: n: .*got a tensor of shape .*examples are given by name: x="),
    (lambda: circuit().sample(X, observed=SEEN), "sample: n: .*examples are given by name: x="),
    (lambda: circuit().sample(2, observed=SEEN), "sample: observed: says what of x is given, and there is no x"),
    (lambda: circuit().sample(2, generator=3), "sample: generator: got 3, expected a torch.Generator or None"),
    (lambda: circuit().posterior(X, None), "node: got None, expected the name of a latent"),
    (lambda: circuit().posterior(X, 1.7), "node: got 1.7, expected the name of a latent"),
    (lambda: circuit().posterior(X, "0"), "node: got '0', expected the name of a latent"),
    (lambda: circuit().log_prob(X, wanted=[True]), r"wanted: got \[True\], expected a bool tensor of shape \(2, 1\)"),
    (
        lambda: circuit(2).log_prob(X, head=torch.tensor([True, False])),
        "head: got .*expected an int or an integer tensor",
    ),
    (
        lambda: circuit(2).sample(2, head=torch.tensor([True, False])),
        "head: got .*expected an int or an integer tensor",
    ),
    (lambda: pc.expectation(circuit(), torch.zeros(3, 3), observed=SEEN), "expectation: observed: .*there is no x"),
    (lambda: pc.expectation(circuit(), torch.zeros(4, 3)), r"f: expected .*3 variables.*got \(4, 3\)"),
    (lambda: pc.expectation(circuit(), torch.zeros(2, 3)), r"f: expected .*3 variables.*got \(2, 3\)"),
    (lambda: pc.expectation(circuit(), torch.zeros(3)), r"f: expected .*3 variables.*got \(3,\)"),
]

FLOWS: list[tuple[Callable[[], Any], str]] = [
    (lambda: pc.Flows(circuit()).add(X, observed=[True]), r"observed: got .*expected a bool tensor of shape \(2, 3\)"),
    (lambda: pc.Flows(circuit()).add(X, observed=torch.ones(5, 3).bool()), r"observed: got .*expected .*\(2, 3\)"),
    (lambda: pc.Flows(circuit()).add(X, chunk_size=1.5), "chunk_size: got 1.5, expected a whole number"),
    (lambda: pc.Flows(circuit()).add(X, chunk_size=0), "chunk_size: got 0, expected at least 1"),
    (lambda: flows(circuit()).units("a"), "node: got 'a', expected the id of a node"),
    (lambda: flows(circuit()).units(1.0), "node: got 1.0, expected the id of a node"),
    (lambda: flows(circuit()).edges(0, "a"), "circuit: got 'a', expected 0..0"),
    (lambda: grow([False]), r"heads: circuit 0: got \[False\], expected a list of whole numbers"),
    (lambda: grow(0), "heads: circuit 0: got 0, expected a list of whole numbers"),
    (lambda: grow([0], generator=3), "grow: generator: got 3, expected a torch.Generator or None"),
]

GENERATORS: list[tuple[str, Callable[[Any], Any]]] = [
    ("hclt", lambda found: pc.hclt(PARENTS, 2, LEAF, generator=found)),
    ("hmm", lambda found: pc.hmm(3, 2, 3, generator=found)),
    ("poon_domingos", lambda found: pc.poon_domingos((2, 2, 1), delta=1, num_units=2, leaf=LEAF, generator=found)),
    (
        "rat_spn",
        lambda found: pc.rat_spn(4, depth=1, num_repetitions=1, num_sums=2, num_leaves=2, leaf=LEAF, generator=found),
    ),
    ("mixture", lambda found: pc.mixture([pair_circuit(), pair_circuit()], generator=found)),
    ("hclt_from_data", lambda found: pc.hclt_from_data(X, PARENTS, 2, LEAF, generator=found)),
    ("regions_from_data", lambda found: pc.regions_from_data(regions(), X[:, :2], generator=found)),
]


def pair_circuit() -> pc.CircuitGraph:
    graph = pair()
    graph.add_product([0, 1])
    return graph


def regions() -> pc.CircuitGraph:
    return pc.rat_spn(2, depth=1, num_repetitions=1, num_sums=2, num_leaves=2, leaf=LEAF)


@pytest.mark.parametrize(("call", "message"), [*GRAPHS, *FAMILIES, *QUERIES, *FLOWS])
def test_what_came_and_what_was_expected(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}") as caught:
        call()
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "call"), GENERATORS, ids=[name for name, _ in GENERATORS])
def test_generators_are_generators(name: str, call: Callable[[Any], Any]) -> None:
    for wrong in (3, "cpu", torch.Generator):
        with pytest.raises(ValueError, match=f"{name}: generator: got .*expected a torch.Generator or None"):
            call(wrong)
    call(torch.Generator().manual_seed(0))


def test_a_batch_needs_a_list_of_heads_for_every_circuit() -> None:
    many = pc.Circuit([pc.hclt(PARENTS, 2, LEAF)] * 2)
    with pytest.raises(ValueError, match="heads: got 3, expected 2 lists, one per circuit"):
        pc.grow(many, flows(many), 3)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor], ids=["list", "tuple", "array", "tensor"])
def test_weights_and_parameters_may_be_lists_or_arrays(kind: Callable[[Any], Any]) -> None:
    graph = pc.CircuitGraph()
    given = kind([[0.25, 0.25, 0.5], [0.5, 0.0, 0.5]])
    leaf = graph.add_input(0, LEAF, 2, params=given)
    graph.add_sum(kind([leaf]), 1, weight=kind([[1.0, 3.0]]), mask=kind([[True, True]]))
    torch.testing.assert_close(graph.nodes[1].weight, torch.tensor([[0.25, 0.75]]))
    if kind is np.array:
        given[:] = 7.0  # the graph has numbers of its own
    assert torch.equal(graph.nodes[0].params, torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.0, 0.5]]))


def test_heads_may_be_an_iterator() -> None:
    assert grow(head for head in [0]).num_heads == 2


def test_whole_numbers_of_arrays_are_whole_numbers() -> None:
    assert pc.Categorical(np.int64(3)).size == 3
    assert pc.Bernoulli(np.int64(2)).size == 2
    assert pc.Binomial(3, np.float32(0.1)).size == 1
    assert circuit().sample(np.int64(2)).shape == (2, 3)
    assert circuit().posterior(X, np.int64(1)).shape == (2, 2)


def test_heads_that_a_circuit_of_a_batch_lacks() -> None:
    """They are not there, which is another thing than an impossible row."""
    many = pc.Circuit([pc.hclt(PARENTS, 2, LEAF), pc.hclt(PARENTS, 2, LEAF, 2)])
    message = "head: circuit 0 has 1 heads, example 1 asks for head 1"
    head = torch.tensor([[0, 1], [1, 1]])
    for call in (
        lambda: many.sample(2, head=head),
        lambda: many.posterior(X, 0, head=head),
        lambda: many.mpe(X, head=head),
        lambda: pc.expectation(many, torch.zeros(3, 3), x=X, head=head),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="head: circuit 0 has 1 heads, example 0 asks for head 1"):
        many.sample(2, head=1)
    assert many.sample(2, head=torch.tensor([[0, 0], [1, 1]])).shape == (2, 2, 3)


def test_without_weight_only_heads_double() -> None:
    """Examples that all weigh 0 say nothing of other units."""
    made = circuit()
    found = pc.Flows(made)
    found.add(X, weight=torch.zeros(2))
    graph = pc.grow(made, found, [0])
    assert graph.num_heads == 2
    for node, old in zip(graph.nodes[:-1], made.to_graph().nodes[:-1], strict=True):
        assert node.num_units == old.num_units

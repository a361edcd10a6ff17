"""What a graph refuses, and what it knows of itself."""

import itertools
import math
from collections.abc import Callable
from typing import Any

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


# Graphs that were edited by hand.


def widen(graph: pc.CircuitGraph, index: int) -> None:
    graph.nodes[index].num_units += 1


def replace(graph: pc.CircuitGraph, index: int, **changes: Any) -> None:
    for name, value in changes.items():
        setattr(graph.nodes[index], name, value)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda g: widen(g, 0), r"params of input node 0 must have shape \(3, 3\), got \[2, 3\]"),
        (lambda g: replace(g, 0, num_units=3, params=torch.ones(3, 3) / 3), r"product node 2 has 2 units.*\[3, 2\]"),
        (lambda g: replace(g, 2, units=torch.zeros(2, 1, dtype=torch.int64)), r"units of product node 2.*\(2, 2\)"),
        (lambda g: replace(g, 3, num_units=2), r"weight of sum node 3 must have shape \(2, 2\), got \[1, 2\]"),
        (lambda g: replace(g, 3, mask=torch.ones(1, 3) > 0), r"mask of sum node 3 must have shape \(1, 2\)"),
        (lambda g: replace(g, 2, children=(0, 3)), r"product node 2 has the children \[3\]; children come before"),
        (lambda g: replace(g, 3, children=(2, -1)), r"sum node 3 has the children \[-1\]"),
        (lambda g: setattr(g, "root", 7), "root is 7, expected the id of one of the 4 nodes"),
        (lambda g: setattr(g, "root", -1), "root is -1"),
    ],
)
def test_nodes_that_do_not_fit_together_are_named(edit: Callable[[pc.CircuitGraph], None], message: str) -> None:
    graph, first, second = two_leaves()
    graph.add_sum([graph.add_product([first, second])], 1)
    graph.validate()
    edit(graph)
    with pytest.raises(ValueError, match=message):
        pc.Circuit(graph)


def test_errors_name_the_nodes() -> None:
    graph, first, second = two_leaves()
    graph.add_sum([first, second, graph.add_product([first, second])], 1)
    with pytest.raises(ValueError, match=r"sum node 3 is not smooth: children \[0, 1\] lack"):
        graph.validate()
    graph, first, second = two_leaves()
    graph.add_sum([graph.add_product([first, second, first])], 1)
    with pytest.raises(ValueError, match="product node 2 is not decomposable: child 0 shares"):
        graph.validate()
    graph, first, second = two_leaves()
    graph.add_sum([second], 1)
    with pytest.raises(ValueError, match=r"nodes \[0\] are used by no other node"):
        graph.validate()


# Graphs in graphs.


def small_hmm(num_heads: int = 1) -> pc.CircuitGraph:
    return pc.hmm(3, 2, 4, homogeneous=True, num_heads=num_heads)


def test_an_embedded_circuit_is_the_same_function_of_other_variables() -> None:
    """Below a product with another circuit over the rest: p(x) = p_a(x_2, x_0, x_4) p_b(x_1, x_3), head by head."""
    rat = pc.rat_spn(2, depth=1, num_repetitions=1, num_sums=3, num_leaves=3, leaf=pc.Categorical(4), num_heads=2)
    hmm = small_hmm(num_heads=2)
    graph = pc.CircuitGraph()
    parts = [graph.embed(hmm, [2, 0, 4]), graph.embed(rat, torch.tensor([1, 3]))]
    assert parts[1] == graph.root
    graph.add_product(parts)
    x = torch.randint(0, 4, (20, 5))
    expected = pc.Circuit(hmm).log_prob(x[:, [2, 0, 4]]) + pc.Circuit(rat).log_prob(x[:, [1, 3]])
    torch.testing.assert_close(pc.Circuit(graph).log_prob(x), expected)


def leaf_circuits(num_heads: int) -> list[pc.CircuitGraph]:
    """One of every structure over four variables of four values."""
    leaf = pc.Categorical(4)
    widths: dict[str, Any] = {"num_sums": 3, "num_leaves": 2, "leaf": leaf, "num_heads": num_heads}
    return [
        pc.rat_spn(4, depth=2, num_repetitions=2, **widths),
        pc.rat_spn(4, depth=1, num_repetitions=3, product="kronecker", **widths),
        pc.poon_domingos((2, 2, 1), delta=1, num_units=3, leaf=leaf, num_heads=num_heads),
        pc.hmm(4, 2, 4, homogeneous=True, num_heads=num_heads),
        pc.hclt(torch.tensor([1, -1, 1, 2]), 3, leaf, num_heads),
    ]


def test_any_structure_is_a_leaf_of_a_tree_over_latents() -> None:
    """A chain z_0 -> z_1 -> ... with the heads of a circuit as p(x_i | z_i): the sum over all z, one by one."""
    states = 3
    leaves, graph = leaf_circuits(states), pc.CircuitGraph()
    tables = torch.rand(len(leaves), states, states).softmax(-1)
    below: list[int] = []
    for i in reversed(range(len(leaves))):
        given = graph.embed(leaves[i], [4 * i + v for v in range(4)])
        graph.latents[i] = graph.add_product([given, *below])
        below = [graph.add_sum([graph.latents[i]], states if i else 1, weight=tables[i] if i else tables[0, :1])]
    x = torch.randint(0, 4, (8, 4 * len(leaves)))
    given_IBK = [pc.Circuit(leaf).log_prob(x[:, 4 * i : 4 * i + 4]) for i, leaf in enumerate(leaves)]
    terms = []
    for z in itertools.product(range(states), repeat=len(leaves)):
        rows = [0, *z[:-1]]
        log_z = sum(tables[i, rows[i], k].log() for i, k in enumerate(z))
        terms.append(log_z + sum(found[:, k] for found, k in zip(given_IBK, z, strict=True)))
    circuit, joint = pc.Circuit(graph), torch.stack(terms)
    torch.testing.assert_close(circuit.log_prob(x)[:, 0], joint.logsumexp(0))
    last = joint.softmax(0).view(-1, states, len(x)).sum(0).T  # the last z runs fastest
    torch.testing.assert_close(circuit.posterior(x, len(leaves) - 1), last)


def test_embedding_copies() -> None:
    """Twice the same graph: ties inside of each copy, nothing in common between them or with the original."""
    hmm = small_hmm()
    graph = pc.CircuitGraph()
    roots = [graph.embed(hmm), graph.embed(hmm, [3, 4, 5])]
    graph.add_product(roots)
    assert pc.Circuit(graph).num_parameters == 2 * pc.Circuit(hmm).num_parameters
    for node in graph.nodes:
        if node.tied_to is not None:
            owner = graph.nodes[node.tied_to]
            assert (node.params is owner.params, node.weight is owner.weight) == (True, True)
    x = torch.randint(0, 4, (7, 3))
    before = pc.Circuit(hmm).log_prob(x)
    second = pc.Circuit(graph).log_prob(torch.cat([x, x], 1)) - before
    for node in graph.nodes[: len(hmm.nodes)]:
        if node.params is not None:
            node.params.fill_(0.25)
    torch.testing.assert_close(pc.Circuit(hmm).log_prob(x), before)
    found = pc.Circuit(graph).log_prob(torch.cat([x, x], 1))
    torch.testing.assert_close(found, second + 3 * math.log(0.25))


def test_a_graph_takes_itself() -> None:
    hmm = small_hmm()
    graph = pc.CircuitGraph(list(hmm.nodes), hmm.root, dict(hmm.latents))
    graph.add_product([hmm.root, graph.embed(graph, [5, 4, 3])])
    x = torch.randint(0, 4, (5, 3))
    found = pc.Circuit(graph).log_prob(torch.cat([x, x.flip(1)], 1))
    torch.testing.assert_close(found, 2 * pc.Circuit(hmm).log_prob(x))


def test_masks_and_units_are_kept() -> None:
    """A pruned circuit, whose products pick units, is the same beside a variable that nobody observes."""
    rat = pc.rat_spn(4, depth=2, num_repetitions=3, num_sums=3, num_leaves=4, leaf=pc.Categorical(4))
    circuit = pc.Circuit(rat)
    x = torch.randint(0, 4, (30, 4))
    flows = pc.Flows(circuit)
    flows.add(x)
    pruned = pc.prune(circuit, flows, 0.05)
    assert any(node.mask is not None for node in pruned.nodes)
    assert any(node.units is not None for node in pruned.nodes)
    graph = pc.CircuitGraph()
    graph.add_product([graph.embed(pruned, [1, 2, 3, 4]), graph.add_input(0, pc.Categorical(4), 1)])
    observed = torch.tensor([False, True, True, True, True]).expand(30, 5)
    found = pc.Circuit(graph).log_prob(torch.cat([x[:, :1], x], 1), observed=observed)
    torch.testing.assert_close(found, pc.Circuit(pruned).log_prob(x))


def test_latents_keep_their_names_or_none() -> None:
    hmm, graph = small_hmm(), pc.CircuitGraph()
    parts = [graph.embed(hmm), graph.embed(hmm, [3, 4, 5], latents=0), graph.embed(hmm, [6, 7, 8], latents=3)]
    size = len(hmm.nodes)
    expected = {v: size + node for v, node in hmm.latents.items()}
    expected |= {3 + v: 2 * size + node for v, node in hmm.latents.items()}
    assert graph.latents == expected
    assert parts == [size * (i + 1) - 1 for i in range(3)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"variables": [0, 1]}, r"variables must be 3 different indices.*\[0, 1\]"),
        ({"variables": [0, 1, 1]}, r"variables.*\[0, 1, 1\]"),
        ({"variables": [0, 1, -1]}, r"variables.*\[0, 1, -1\]"),
        ({"latents": 2}, r"latents \[2, 3\].*latents=2"),
    ],
)
def test_bad_embeddings_are_named(settings: dict[str, Any], message: str) -> None:
    graph = pc.CircuitGraph()
    graph.embed(small_hmm(), latents=1)
    with pytest.raises(ValueError, match=f"embed: {message}"):
        graph.embed(small_hmm(), **settings)
    assert len(graph.nodes) == len(small_hmm().nodes)


def test_nothing_to_embed() -> None:
    with pytest.raises(ValueError, match="embed: the root of the graph is -1; it has 0 nodes"):
        pc.CircuitGraph().embed(pc.CircuitGraph())

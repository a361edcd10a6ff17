"""RAT-SPNs: which regions there are, what shares what, and the distribution of a circuit small enough to spell out."""

from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc


def build(num_vars: int = 16, **settings: Any) -> pc.CircuitGraph:
    defaults = {"depth": 3, "num_repetitions": 4, "num_sums": 5, "num_leaves": 5, "leaf": pc.Categorical(3)}
    return pc.rat_spn(num_vars, **(defaults | settings))


def test_regions_are_halved() -> None:
    """Four trees of regions of 32, 16, 8 and 4 variables; the seed is one for which they have none in common."""
    graph = build(32, generator=torch.Generator().manual_seed(0))
    graph.validate()
    scopes = graph.scopes()
    splits = [
        [scopes[child] for child in node.children]
        for node in graph.nodes
        if node.kind == "product" and graph.nodes[node.children[0]].kind != "input"
    ]
    assert all(len(parts) == 2 for parts in splits)
    sizes = sorted((len(a), len(b)) for a, b in splits)
    assert sizes == [(4, 4)] * 16 + [(8, 8)] * 8 + [(16, 16)] * 4
    assert len(graph.nodes[graph.root].children) == 4
    assert {scopes[child] for child in graph.nodes[graph.root].children} == {frozenset(range(32))}
    inputs = [node.variable for node in graph.nodes if node.kind == "input"]
    assert sorted(inputs) == sorted(list(range(32)) * 4)


@pytest.mark.parametrize("num_vars", [5, 7, 11])
def test_odd_regions(num_vars: int) -> None:
    """Parts differ by one variable at most; single variables are not split, however deep the structure is to be."""
    graph = build(num_vars, depth=9)
    graph.validate()
    scopes = graph.scopes()
    for node in graph.nodes:
        if node.kind == "product":
            small, large = sorted(len(scopes[child]) for child in node.children)
            assert 0 <= large - small <= 1
    assert not any(node.kind == "product" and len(node.children) != 2 for node in graph.nodes)


def test_mixture_of_factorised_distributions() -> None:
    """With one unit everywhere: a weighted sum over repetitions of products of their own leaves."""
    graph = build(6, depth=2, num_sums=1, num_leaves=1, generator=torch.Generator().manual_seed(0))
    x = torch.cartesian_prod(*[torch.arange(3)] * 6)
    parts = graph.nodes[graph.root].children
    assert len(parts) == 4
    expected = torch.zeros(len(x))
    for weight, part in zip(graph.nodes[graph.root].weight[0], parts, strict=True):
        likelihood, todo = torch.ones(len(x)), [part]
        while todo:
            node = graph.nodes[todo.pop()]
            todo += node.children
            if node.kind == "input":
                likelihood *= node.params[0, x[:, node.variable]]
        expected += weight * likelihood
    torch.testing.assert_close(pc.Circuit(graph).log_prob(x)[:, 0].exp(), expected)


def test_a_region_is_the_set_of_its_variables() -> None:
    """Two variables split in one way only, three in three ways, which share the single variables."""
    two = build(2, depth=1, num_repetitions=6)
    assert [node.kind for node in two.nodes] == ["input", "input", "product", "sum"]
    three = build(3, depth=2, num_repetitions=40)
    assert sum(node.kind == "input" for node in three.nodes) == 3
    assert len(three.nodes[three.root].children) == 3
    assert sum(node.kind == "product" for node in three.nodes) == 6


@pytest.mark.parametrize(("product", "pair"), [("hadamard", 3), ("kronecker", 9)])
def test_widths(product: Any, pair: int) -> None:
    """Free parameters of one repetition over four variables in two leaf regions of two, or in four of one."""
    leaves = {"num_repetitions": 1, "num_leaves": 3, "leaf": pc.Categorical(7), "product": product}
    shallow = build(4, depth=1, num_sums=3, num_heads=2, **leaves)
    assert pc.Circuit(shallow).num_parameters == 4 * 3 * 6 + 2 * (pair - 1)
    deep = build(4, depth=2, num_sums=3, num_heads=2, **leaves)
    assert pc.Circuit(deep).num_parameters == 4 * 3 * 6 + 2 * 3 * (pair - 1) + 2 * (pair - 1)
    assert any(node.kronecker for node in deep.nodes) == (product == "kronecker")


def test_a_sum_makes_leaves_as_wide_as_the_rest() -> None:
    """Hadamard products of three sums, with five units in the leaves; Kronecker products need no such sum."""
    graph = build(4, depth=2, num_repetitions=1, num_sums=3, num_leaves=5)
    assert (
        sorted(tuple(n.weight.shape) for n in graph.nodes if n.kind == "sum") == [(1, 3)] + [(3, 3)] * 2 + [(3, 5)] * 4
    )
    graph = build(4, depth=2, num_repetitions=1, num_sums=3, num_leaves=5, product="kronecker")
    assert sorted(tuple(n.weight.shape) for n in graph.nodes if n.kind == "sum") == [(1, 9)] + [(3, 25)] * 2


def test_latents_name_the_partitions() -> None:
    graph = build(8, depth=3, num_repetitions=2)
    scopes = graph.scopes()
    sizes = [len(scopes[graph.latents[i]]) for i in range(len(graph.latents))]
    assert sizes == sorted(sizes)
    assert sorted(graph.latents.values()) == [i for i, node in enumerate(graph.nodes) if node.kind == "product"]


def test_a_generator_decides() -> None:
    state = torch.get_rng_state()
    first, again, other = (build(generator=torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.randint(0, 3, (6, 16))
    found = [pc.Circuit(graph).log_prob(x) for graph in (first, again, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
    assert [node.children for node in first.nodes] == [node.children for node in again.nodes]
    assert first.scopes() != other.scopes()


def test_one_variable_is_a_mixture_of_its_leaves() -> None:
    graph = build(1, num_leaves=4)
    assert [(node.kind, node.num_units) for node in graph.nodes] == [("input", 4), ("sum", 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    graph = build(5, num_leaves=2, dtype=dtype)
    assert {t.dtype for node in graph.nodes for t in (node.params, node.weight) if t is not None} == {dtype}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_vars": 0}, "num_vars.*0"),
        ({"depth": 0}, "depth.*0"),
        ({"num_repetitions": 0}, "num_repetitions.*0"),
        ({"num_sums": 0}, "num_sums.*0"),
        ({"num_leaves": -1}, "num_leaves.*-1"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"product": "einsum"}, "product: got 'einsum', expected 'hadamard' or 'kronecker'"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"rat_spn: {message}"):
        build(**settings)

"""Poon-Domingos structures: rectangles, cuts, and the order of variables."""

import itertools
from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc


def build(shape: tuple[int, int, int], delta: Any = 1, **settings: Any) -> pc.CircuitGraph:
    defaults = {"num_units": 2, "leaf": pc.Categorical(3)}
    return pc.poon_domingos(shape, delta=delta, **(defaults | settings))


def cuts(graph: pc.CircuitGraph) -> dict[frozenset[int], set[frozenset[frozenset[int]]]]:
    """The partitions of every region that has a sum."""
    scopes = graph.scopes()
    return {
        scopes[index]: {frozenset(scopes[part] for part in graph.nodes[child].children) for child in node.children}
        for index, node in enumerate(graph.nodes)
        if node.kind == "sum"
    }


def rectangle(width: int, top: int, left: int, bottom: int, right: int) -> frozenset[int]:
    return frozenset(h * width + w for h in range(top, bottom) for w in range(left, right))


def test_all_rectangles_with_all_cuts() -> None:
    """2 x 3 pixels: 18 rectangles, of which 12 have a cut, each cut once."""
    graph = build((2, 3, 1))
    graph.validate()
    expected = {}
    for top, bottom in itertools.combinations(range(3), 2):
        for left, right in itertools.combinations(range(4), 2):
            found = set()
            for h in range(top + 1, bottom):
                found.add(frozenset({rectangle(3, top, left, h, right), rectangle(3, h, left, bottom, right)}))
            for w in range(left + 1, right):
                found.add(frozenset({rectangle(3, top, left, bottom, w), rectangle(3, top, w, bottom, right)}))
            if found:
                expected[rectangle(3, top, left, bottom, right)] = found
    assert len(expected) == 12
    assert cuts(graph) == expected
    assert sum(node.kind == "sum" for node in graph.nodes) == 12
    assert sorted(node.variable for node in graph.nodes if node.kind == "input") == list(range(6))
    assert sum(node.kind == "product" for node in graph.nodes) == sum(map(len, expected.values()))


def test_variables_are_those_of_flattened_images() -> None:
    """Leaves are the channels of one pixel, wherever `flatten` puts them."""
    graph = build((2, 4, 3), num_units=3)
    index_CHW = torch.arange(24).view(3, 2, 4)
    expected = {frozenset(index_CHW[:, h, w].tolist()) for h in range(2) for w in range(4)}
    scopes = graph.scopes()
    leaves = [
        scopes[index]
        for index, node in enumerate(graph.nodes)
        if node.kind == "product" and graph.nodes[node.children[0]].kind == "input"
    ]
    assert len(leaves) == 8
    assert set(leaves) == expected
    left = frozenset(index_CHW[:, :, :1].flatten().tolist())
    right = frozenset(index_CHW[:, :, 1:].flatten().tolist())
    assert frozenset({left, right}) in cuts(graph)[frozenset(range(24))]
    images = torch.randint(0, 3, (5, 3, 2, 4))
    assert pc.Circuit(graph).log_prob(images.flatten(1)).shape == (5, 1)


def test_the_grid_is_that_of_the_image() -> None:
    """Lines at rows 2 and 4 of 5 and at column 2 of 3: leaves of 4, 2 and 1 pixels."""
    graph = build((5, 3, 1), delta=2)
    found = cuts(graph)
    scopes = graph.scopes()
    assert len(found[frozenset(range(15))]) == 3
    leaves = [scopes[i] for i, node in enumerate(graph.nodes) if node.kind != "sum" and scopes[i] not in found]
    assert sorted(len(leaf) for leaf in set(leaves) if len(leaf) in (4, 2)) == [2, 2, 2, 4, 4]
    assert rectangle(3, 4, 2, 5, 3) in leaves
    assert rectangle(3, 2, 0, 4, 2) in leaves


def test_of_several_steps_the_first_that_cuts_decides() -> None:
    graph = build((8, 6, 1), delta=[4, 2, 1])
    found = cuts(graph)
    whole = found[rectangle(6, 0, 0, 8, 6)]
    assert whole == {
        frozenset({rectangle(6, 0, 0, 4, 6), rectangle(6, 4, 0, 8, 6)}),
        frozenset({rectangle(6, 0, 0, 8, 4), rectangle(6, 0, 4, 8, 6)}),
    }
    # Rows by steps of 2 now, columns still by one of 4; then the last step, for either.
    assert found[rectangle(6, 4, 0, 8, 6)] == {
        frozenset({rectangle(6, 4, 0, 6, 6), rectangle(6, 6, 0, 8, 6)}),
        frozenset({rectangle(6, 4, 0, 8, 4), rectangle(6, 4, 4, 8, 6)}),
    }
    assert found[rectangle(6, 6, 4, 8, 6)] == {
        frozenset({rectangle(6, 6, 4, 7, 6), rectangle(6, 7, 4, 8, 6)}),
        frozenset({rectangle(6, 6, 4, 8, 5), rectangle(6, 6, 5, 8, 6)}),
    }
    assert rectangle(6, 0, 0, 3, 6) not in found


def test_every_grid_starts_at_the_corner_of_the_image() -> None:
    """Steps of 4 and then of 3: rows 4 to 8 are cut at 6, not at 7."""
    found = cuts(build((8, 1, 1), delta=[4, 3]))
    assert found[rectangle(1, 4, 0, 8, 1)] == {frozenset({rectangle(1, 4, 0, 6, 1), rectangle(1, 6, 0, 8, 1)})}
    assert found[rectangle(1, 0, 0, 4, 1)] == {frozenset({rectangle(1, 0, 0, 3, 1), rectangle(1, 3, 0, 4, 1)})}


@pytest.mark.parametrize(("product", "pair"), [("hadamard", 3), ("kronecker", 9)])
def test_widths(product: Any, pair: int) -> None:
    """Four pixels, four pairs of them, and the whole with two cuts."""
    graph = build((2, 2, 1), num_units=3, num_heads=2, product=product)
    assert pc.Circuit(graph).num_parameters == 4 * 3 * 2 + 4 * 3 * (pair - 1) + 2 * (2 * pair - 1)
    assert any(node.kronecker for node in graph.nodes) == (product == "kronecker")
    assert list(graph.latents) == list(range(6))
    assert all(graph.nodes[index].kind == "product" for index in graph.latents.values())


def test_many_rectangles_fold_into_few_layers() -> None:
    """32 x 32 pixels of three channels in steps of 4: 1,296 rectangles, one layer or two for every level of them."""
    graph = build((32, 32, 3), delta=4, num_units=2)
    circuit = pc.Circuit(graph)
    assert sum(node.kind == "sum" for node in graph.nodes) == 36 * 36 - 64
    assert len(circuit.engine.layers) <= 2 * 14 + 2
    assert circuit.log_prob(torch.randint(0, 3, (2, 3072))).isfinite().all()


def test_one_pixel_is_a_mixture_of_its_channels_products() -> None:
    graph = build((1, 1, 3), num_units=4)
    assert [(node.kind, node.num_units) for node in graph.nodes] == [("input", 4)] * 3 + [("product", 4), ("sum", 1)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shape": (2, 2)}, r"shape.*\(2, 2\)"),
        ({"shape": (2, 0, 1)}, r"shape.*\(2, 0, 1\)"),
        ({"delta": 0}, "delta.*0"),
        ({"delta": []}, r"delta.*\[\]"),
        ({"delta": [2, -1]}, "delta.*-1"),
        ({"delta": 4}, "delta.*3 x 4; got 4"),
        ({"num_units": 0}, "num_units.*0"),
        ({"num_heads": 0}, "num_heads.*0"),
        ({"product": "einsum"}, "product.*'einsum'"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"poon_domingos: {message}"):
        build(**({"shape": (3, 4, 1)} | settings))

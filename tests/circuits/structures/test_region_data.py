"""First parameters of region graphs from data: they are distributions, they are counts, and they know the data."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

PRODUCTS = ["hadamard", "kronecker"]


def rat(leaf: pc.Distribution, size: int = 6, **settings: Any) -> pc.CircuitGraph:
    defaults: dict[str, Any] = {"depth": 3, "num_repetitions": 2, "num_sums": 4, "num_leaves": 4}
    generator = torch.Generator().manual_seed(0)
    return pc.rat_spn(size, leaf=leaf, generator=generator, **(defaults | settings))


def rectangles(leaf: pc.Distribution, **settings: Any) -> pc.CircuitGraph:
    generator = torch.Generator().manual_seed(0)
    return pc.poon_domingos((2, 3, 1), delta=1, num_units=4, leaf=leaf, generator=generator, **settings)


@pytest.fixture
def x() -> Tensor:
    """Six smooth columns of 8-bit values: a random walk over columns."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(256, (600, 1), generator=generator)
    steps = torch.randint(-9, 10, (600, 5), generator=generator).cumsum(1)
    return torch.cat([start, start + steps], 1).clamp(0, 255)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("num_leaves", [4, 3])
def test_normalised_and_of_the_same_structure(product: str, depth: int, num_leaves: int) -> None:
    x = torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(0))
    before = rat(pc.Categorical(3), 4, product=product, depth=depth, num_leaves=num_leaves)
    weights = [None if node.weight is None else node.weight.clone() for node in before.nodes]
    graph = pc.regions_from_data(before, x)
    graph.validate()
    assert (graph.root, graph.latents) == (before.root, before.latents)
    assert [node.children for node in graph.nodes] == [node.children for node in before.nodes]
    worlds = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_prob = pc.Circuit(graph).log_prob(worlds)
    assert log_prob.exp().sum().item() == pytest.approx(1.0)
    for node, weight in zip(before.nodes, weights, strict=True):  # the given graph stays as it is
        assert (node.weight is None) == (weight is None)
        assert weight is None or torch.equal(node.weight, weight)


def test_parameters_of_hadamard_products_are_counts() -> None:
    """Two variables that are one: three parts of the pair; a unit of an input is what the product's unit stands for."""
    x = torch.arange(9)[:, None].expand(9, 2)
    before = rat(pc.Categorical(9), 2, depth=1, num_repetitions=1, num_sums=3, num_leaves=3)
    graph = pc.regions_from_data(before, x, smoothing=0.1)
    torch.testing.assert_close(graph.nodes[graph.root].weight, torch.full((1, 3), 1 / 3))
    for leaf in (node for node in graph.nodes if node.kind == "input"):
        # Every value once, in one part of three examples; a tenth of these for the marginal, which is uniform.
        torch.testing.assert_close(leaf.params, (torch.eye(3).repeat_interleave(3, 1) + 0.3 / 9) / 3.3)


def test_parameters_of_kronecker_products_are_counts() -> None:
    """Each factor has its own parts: those of the second variable are the first's, turned by one."""
    x = torch.stack([torch.arange(9), (torch.arange(9) + 3) % 9], 1)
    before = rat(pc.Categorical(9), 2, depth=1, num_repetitions=1, num_sums=3, num_leaves=3, product="kronecker")
    graph = pc.regions_from_data(before, x, smoothing=0.1)
    for leaf in (node for node in graph.nodes if node.kind == "input"):
        torch.testing.assert_close(leaf.params, (torch.eye(3).repeat_interleave(3, 1) + 0.3 / 9) / 3.3)
    root = graph.nodes[graph.root].weight
    assert root is not None
    # Three examples in each pair of parts that occurs; a tenth of nine examples over nine cells.
    expected = (3 * torch.eye(3).roll(1, 1) + 0.1).view(1, 9) / 9.9
    first = graph.nodes[graph.nodes[graph.root].children[0]].children[0]
    if graph.nodes[first].variable == 1:
        expected = (3 * torch.eye(3).roll(1, 0) + 0.1).view(1, 9) / 9.9
    torch.testing.assert_close(root, expected)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("structure", [rat, rectangles])
def test_data_are_known_far_better_than_to_random_parameters(x: Tensor, structure: Any, product: str) -> None:
    """Held-out rows of 16 values."""
    x, before = x // 16, structure(pc.Categorical(16), product=product)
    after = pc.regions_from_data(before, x[:400], generator=torch.Generator().manual_seed(0))
    bits = [
        -float(pc.Circuit(graph).log_prob(x[400:]).detach().mean()) / x.shape[1] / math.log(2)
        for graph in (before, after)
    ]
    assert bits[1] < bits[0] - 0.5


def test_equal_examples_and_fewer_than_units(x: Tensor) -> None:
    for some in (x[:3], x[:1].expand(40, 6)):
        graph = pc.regions_from_data(rat(pc.Categorical(256)), some)
        assert torch.isfinite(pc.Circuit(graph).log_prob(x)).all()


def test_the_generator_decides(x: Tensor) -> None:
    x, found = x // 64, []
    for seed in (0, 0, 1):
        graph = pc.regions_from_data(
            rat(pc.Categorical(4), product="kronecker"), x, generator=torch.Generator().manual_seed(seed)
        )
        found.append(pc.Circuit(graph).log_prob(x).detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_heads_differ_as_their_examples_do() -> None:
    """Head 1 has the examples of large values: it explains these better, head 0 the small ones; head 2 has none."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 100, (300, 1), generator=generator)
    x = torch.cat([low, low + 100]) + torch.randint(0, 20, (600, 3), generator=generator)
    head = torch.arange(2).repeat_interleave(300)
    graph = pc.regions_from_data(rat(pc.Categorical(256), 3, num_heads=3), x, head=head)
    log_NH = pc.Circuit(graph).log_prob(x)
    assert (log_NH[:, :2].argmax(1) == head).float().mean() > 0.9
    root = graph.nodes[graph.root].weight
    assert root is not None
    torch.testing.assert_close(root[2], torch.full_like(root[2], 1 / root.shape[1]))


def test_wrong_arguments_are_named(x: Tensor) -> None:
    graph = rat(pc.Categorical(256))
    with pytest.raises(ValueError, match=r"x: got shape \(600, 5\), expected values \(examples, 6\)"):
        pc.regions_from_data(graph, x[:, 1:])
    with pytest.raises(ValueError, match="x: .*expects values in 0..99"):
        pc.regions_from_data(rat(pc.Categorical(100)), x)
    with pytest.raises(ValueError, match="smoothing: got 0, expected a positive"):
        pc.regions_from_data(graph, x, smoothing=0)
    with pytest.raises(ValueError, match="leaf: SoftEvidence.* has no parameters"):
        pc.regions_from_data(rat(pc.SoftEvidence(4)), x)
    mixed = rat(pc.Categorical(256), depth=1)
    mixed.nodes[0].distribution = pc.Binomial(255)
    with pytest.raises(ValueError, match="graph: input 0 is Binomial.* expected one family per variable"):
        pc.regions_from_data(mixed, x)
    with pytest.raises(ValueError, match="head: is needed to tell 2 heads apart"):
        pc.regions_from_data(rat(pc.Categorical(256), num_heads=2), x)
    circuit = pc.Circuit(graph)
    flows = pc.Flows(circuit)
    flows.add(x[:100])
    with pytest.raises(ValueError, match="graph: .* expected"):
        pc.regions_from_data(pc.prune(circuit, flows, 0.05), x)


@pytest.mark.parametrize("product", PRODUCTS)
@pytest.mark.parametrize("build", [rat, rectangles])
def test_every_variable_has_a_family_of_its_own(build: Any, product: str, x: Tensor) -> None:
    x = x.double()
    x[:, 1] = x[:, 1] / 1e4
    leaf = [pc.Categorical(256), pc.Gaussian(), pc.Binomial(255), pc.DiscretizedLogistic(256)]
    leaf += [pc.DiscretizedGaussian(256), pc.Categorical(256)]
    drawn = build(leaf, product=product)
    graph = pc.regions_from_data(drawn, x, generator=torch.Generator().manual_seed(0))
    graph.validate()
    for node in graph.nodes:
        assert node.distribution is None or node.distribution == leaf[node.variable]
    assert pc.Circuit(graph).log_prob(x).mean() > pc.Circuit(drawn).log_prob(x).mean() + 6

"""First parameters from data: they are distributions, they are counts, and they know the data."""

import itertools
import math

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc


@pytest.fixture
def x() -> Tensor:
    """Six smooth columns of 8-bit values: a random walk over columns."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(256, (400, 1), generator=generator)
    steps = torch.randint(-9, 10, (400, 5), generator=generator).cumsum(1)
    return torch.cat([start, start + steps], 1).clamp(0, 255)


@pytest.mark.parametrize("num_latents", [1, 3])
def test_normalised(num_latents: int) -> None:
    x = torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(0))
    graph = pc.hclt_from_data(x, torch.tensor([1, -1, 1, 0]), num_latents, pc.Categorical(3))
    graph.validate()
    worlds = torch.tensor(list(itertools.product(range(3), repeat=4)))
    log_prob = pc.Circuit(graph).log_prob(worlds)
    assert log_prob.exp().sum().item() == pytest.approx(1.0)
    assert torch.isfinite(log_prob).all()


def test_parameters_are_counts_of_quantiles() -> None:
    """Nine values in three parts; the second variable is three more than the first, modulo nine."""
    x = torch.stack([torch.arange(9), (torch.arange(9) + 3) % 9], 1)
    graph = pc.hclt_from_data(x, torch.tensor([-1, 0]), 3, pc.Categorical(9), smoothing=0.1)
    edge = next(node for index, node in enumerate(graph.nodes) if node.kind == "sum" and index != graph.root)
    # A part of the first goes with the next part of the second, 3 examples each; a tenth of 9 over nine cells.
    torch.testing.assert_close(edge.weight, (3 * torch.eye(3).roll(1, 1) + 0.1) / 3.3)
    torch.testing.assert_close(graph.nodes[graph.root].weight, torch.full((1, 3), 1 / 3))
    for leaf in (node for node in graph.nodes if node.kind == "input"):
        assert leaf.params is not None
        # Every value once, in one part; a tenth of 3 examples of the marginal, which is uniform.
        torch.testing.assert_close(leaf.params, (torch.eye(3).repeat_interleave(3, 1) + 0.3 / 9) / 3.3)


@pytest.mark.parametrize(("num_categories", "first", "margin"), [(256, 0, 1.5), (16, 300, 1.0)])
def test_data_are_known_far_better_than_to_random_parameters(
    x: Tensor, num_categories: int, first: int, margin: float
) -> None:
    """The data themselves; and, where there are enough for so few values, held-out ones."""
    x, leaf = x * num_categories // 256, pc.Categorical(num_categories)
    parents, generator = pc.chow_liu_tree(x, num_categories), torch.Generator().manual_seed(0)
    graphs = {
        "random": pc.hclt(parents, 8, leaf, generator=generator),
        "data": pc.hclt_from_data(x[:300], parents, 8, leaf, generator=generator),
    }
    log_prob = {
        name: pc.Circuit(graph).log_prob(x[first : first + 300]).mean().detach() for name, graph in graphs.items()
    }
    bits = {name: -float(found) / x.shape[1] / math.log(2) for name, found in log_prob.items()}
    assert bits["data"] < bits["random"] - margin


def test_ties_are_broken_evenly() -> None:
    """A constant column has no quantiles, yet all states of its latent have the same share."""
    x = torch.cat([torch.zeros(90, 1), torch.arange(90)[:, None] % 9], 1).long()
    graph = pc.hclt_from_data(
        x, torch.tensor([1, -1]), 3, pc.Categorical(9), generator=torch.Generator().manual_seed(0)
    )
    circuit = pc.Circuit(graph)
    torch.testing.assert_close(circuit.posterior(x[:1], 0)[0], torch.full((3,), 1 / 3), atol=0.15, rtol=0)
    edge = next(node for index, node in enumerate(graph.nodes) if node.kind == "sum" and index != graph.root)
    assert edge.weight is not None
    assert (edge.weight - 1 / 3).abs().max() < 0.2


def test_the_generator_decides(x: Tensor) -> None:
    parents = torch.arange(-1, 5)
    weights = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        graph = pc.hclt_from_data(x, parents, 4, pc.Categorical(256), generator=generator)
        # Leaves are the same whatever the order of ties is, edges are not.
        weights.append(
            torch.stack([node.weight for node in graph.nodes if node.weight is not None and len(node.weight) > 1])
        )
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_fewer_examples_than_states(x: Tensor) -> None:
    graph = pc.hclt_from_data(x[:3], torch.arange(-1, 5), 8, pc.Categorical(256))
    assert torch.isfinite(pc.Circuit(graph).log_prob(x)).all()


def test_wrong_arguments_are_named(x: Tensor) -> None:
    parents, leaf = torch.arange(-1, 5), pc.Categorical(256)
    with pytest.raises(ValueError, match=r"x: got shape \(400, 5\), expected values \(examples, 6\)"):
        pc.hclt_from_data(x[:, 1:], parents, 4, leaf)
    with pytest.raises(ValueError, match="x: .*expects values in 0..99"):
        pc.hclt_from_data(x, parents, 4, pc.Categorical(100))
    with pytest.raises(ValueError, match="x: .*whole numbers"):
        pc.hclt_from_data(x + 0.5, parents, 4, leaf)
    with pytest.raises(ValueError, match="num_latents: got 0, expected at least 1"):
        pc.hclt_from_data(x, parents, 0, leaf)
    with pytest.raises(ValueError, match="smoothing: got 0, expected a positive"):
        pc.hclt_from_data(x, parents, 4, leaf, smoothing=0)
    with pytest.raises(ValueError, match="leaf: SoftEvidence.* has no parameters"):
        pc.hclt_from_data(x, parents, 4, pc.SoftEvidence(4))
    with pytest.raises(ValueError, match="leaf: got .*expected one distribution, or 6 "):
        pc.hclt_from_data(x, parents, 4, [leaf] * 5)


def test_heads_differ_as_their_examples_do() -> None:
    """Head 1 has the examples of large values: it explains these better, head 0 the small ones; counts decide."""
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 100, (300, 1), generator=generator)
    x = torch.cat([low, low + 100]) + torch.randint(0, 20, (600, 3), generator=generator)
    head = torch.arange(2).repeat_interleave(300)
    parents = torch.tensor([-1, 0, 1])
    graph = pc.hclt_from_data(x, parents, 4, pc.Categorical(256), num_heads=3, head=head)
    log_NH = pc.Circuit(graph).log_prob(x)
    assert (log_NH[:, :2].argmax(1) == head).float().mean() > 0.9
    root = graph.nodes[graph.root].weight
    assert root is not None
    torch.testing.assert_close(root.sum(1), torch.ones(3))
    assert root[2].tolist() == [0.25] * 4  # no examples
    assert (root[0] - root[1]).abs().min() > 0.1


@pytest.mark.parametrize(
    "head", [None, torch.zeros(5), torch.tensor([0, 1, 2, 0, 1]), torch.zeros(4, dtype=torch.int64)]
)
def test_wrong_heads_are_named(head: torch.Tensor | None) -> None:
    x = torch.randint(4, (5, 2))
    with pytest.raises(ValueError, match="head: "):
        pc.hclt_from_data(x, torch.tensor([-1, 0]), 2, pc.Categorical(4), num_heads=2, head=head)


MIXED = [pc.Categorical(256), pc.Gaussian(), pc.Binomial(255), pc.DiscretizedGaussian(256), pc.Gaussian()]
MIXED += [pc.DiscretizedLogistic(256)]


def test_every_variable_has_a_family_of_its_own(x: Tensor) -> None:
    """Real values may lie closer together than whole ones: their parts are quantiles all the same."""
    x = x.double()
    x[:, 1], x[:, 4] = x[:, 1] / 1e4 + 3, x[:, 4] * 100
    graph = pc.hclt_from_data(x, torch.arange(-1, 5), 4, MIXED, generator=torch.Generator().manual_seed(0))
    graph.validate()
    drawn = pc.hclt(torch.arange(-1, 5), 4, MIXED, generator=torch.Generator().manual_seed(0))
    assert pc.Circuit(graph).log_prob(x).mean() > pc.Circuit(drawn).log_prob(x).mean() + 6
    for node in graph.nodes:
        if node.distribution is not None:
            assert node.distribution == MIXED[node.variable]
        if isinstance(node.distribution, pc.Gaussian):
            parts = x[:, node.variable].sort().values.view(4, 100).mean(1)
            assert (node.params[:, 0] - parts).abs().max() < 0.03 * x[:, node.variable].std()


def test_ties_among_real_values_are_broken_evenly() -> None:
    x = torch.zeros(90, 1).double()
    graph = pc.hclt_from_data(torch.cat([x, x], 1), [-1, 0], 3, pc.Gaussian())
    edge = next(node for index, node in enumerate(graph.nodes) if node.kind == "sum" and index != graph.root)
    assert (edge.weight - 1 / 3).abs().max() < 0.25

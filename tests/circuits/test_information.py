"""Entropy and Kullback-Leibler divergence of the joint with the latents, against lists of induced trees."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import rel_entr, xlogy

import lvd_lightning.circuits as pc


def joint(reference: Any, x: torch.Tensor, head: int) -> np.ndarray:
    """p(x, induced tree) of all worlds and trees, whose order is that of the graph."""
    return reference.joint(x, head=head)


def test_entropy(discrete: Any) -> None:
    for head in range(discrete.graph.num_heads):
        p = joint(discrete.reference, discrete.x, head)
        found = float(pc.entropy(discrete.circuit, head))
        np.testing.assert_allclose(found, -xlogy(p, p).sum(), rtol=1e-8)
        marginal = p.sum(1)
        assert found >= -xlogy(marginal, marginal).sum() - 1e-12


def test_divergence(discrete: Any, enumerate_trees: Any) -> None:
    other = discrete.circuit.to_graph()
    for node in other.nodes:
        tensor = node.weight if node.kind == "sum" else node.params
        if tensor is not None and node.tied_to is None:
            tensor.mul_(0.5 + torch.rand_like(tensor)).div_(tensor.sum(-1, keepdim=True))
    second = pc.Circuit(other)
    reference = enumerate_trees(second.to_graph())
    for head in range(discrete.graph.num_heads):
        p, q = joint(discrete.reference, discrete.x, head), joint(reference, discrete.x, head)
        found = float(pc.kl(discrete.circuit, second, head))
        np.testing.assert_allclose(found, rel_entr(p, q).sum(), rtol=1e-8, atol=1e-12)
        assert found >= rel_entr(p.sum(1), q.sum(1)).sum() - 1e-12
        assert float(pc.kl(discrete.circuit, discrete.circuit, head)) == pytest.approx(0.0, abs=1e-12)


def test_densities() -> None:
    """Two mixtures of two normal distributions each: weights and units have closed forms."""
    torch.set_default_dtype(torch.float64)

    def mixture(weight: list[float], params: list[list[float]]) -> pc.Circuit:
        graph = pc.CircuitGraph()
        leaf = graph.add_input(0, pc.Gaussian(), 2, params=torch.tensor(params))
        graph.add_sum([leaf], 1, weight=torch.tensor([weight]))
        return pc.Circuit(graph)

    p = mixture([0.3, 0.7], [[0.0, 1.0], [2.0, 0.5]])
    q = mixture([0.6, 0.4], [[0.5, 2.0], [1.0, 0.5]])
    weights = -(0.3 * np.log(0.3) + 0.7 * np.log(0.7))
    normal = 0.5 * np.log(2 * np.pi * np.e)
    assert float(pc.entropy(p)) == pytest.approx(weights + normal + 0.7 * np.log(0.5))
    first = np.log(2.0) + (1 + 0.25) / 8 - 0.5
    second = 1 / 0.5
    expected = 0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4) + 0.3 * first + 0.7 * second
    assert float(pc.kl(p, q)) == pytest.approx(expected)


def test_what_pruning_removed_is_infinitely_far() -> None:
    torch.set_default_dtype(torch.float64)
    graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3))
    whole = pc.Circuit(graph)
    graph.nodes[graph.root].weight = torch.tensor([[1.0, 0.0]])
    graph.nodes[graph.root].mask = torch.tensor([[True, False]])
    less = pc.Circuit(graph)
    assert float(pc.kl(whole, less)) == float("inf")
    assert 0 < float(pc.kl(less, whole)) < float("inf")


def test_batches_of_circuits() -> None:
    torch.set_default_dtype(torch.float64)
    first, second = (
        [pc.hclt(torch.tensor([-1, 0, 1]), 3, pc.Categorical(4), num_heads=2) for _ in range(2)] for _ in range(2)
    )
    heads = torch.tensor([1, 0])
    entropies = pc.entropy(pc.Circuit(first), heads)
    divergences = pc.kl(pc.Circuit(first), pc.Circuit(second), heads)
    for g, head in enumerate(heads.tolist()):
        assert float(entropies[g]) == pytest.approx(float(pc.entropy(pc.Circuit(first[g]), head)))
        alone = pc.kl(pc.Circuit(first[g]), pc.Circuit(second[g]), head)
        assert float(divergences[g]) == pytest.approx(float(alone))


def test_circuits_of_different_structure() -> None:
    small, large, chain = (
        pc.Circuit(pc.hclt(torch.tensor(parents), states, pc.Categorical(2)))
        for parents, states in (([-1, 0, 0], 2), ([-1, 0, 0], 3), ([-1, 0, 1], 2))
    )
    for other in (large, chain):
        with pytest.raises(ValueError, match=r"kl: circuits 0 differ"):
            pc.kl(small, other)
    with pytest.raises(ValueError, match="kl: got 1 and 2, expected two circuits of one structure"):
        pc.kl(small, pair())
    with pytest.raises(ValueError, match="head"):
        pc.entropy(small, 1)


def pair() -> pc.Circuit:
    return pc.Circuit([pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.Categorical(2)) for _ in range(2)])

"""Hidden Chow-Liu trees: what the structure says, and its joint distribution spelled out."""

from typing import Any

import numpy as np
import pytest
import torch

import lvd_lightning.circuits as pc


def test_joint_distribution_is_a_directed_tree() -> None:
    """p(x) = sum_y p(y_root | head) prod_v p(y_v | y_parent) p(x_v | y_v), by hand for the tree 1 <- 0 -> 2 -> 3."""
    graph = pc.hclt(torch.tensor([-1, 0, 0, 2]), num_latents=3, leaf=pc.Categorical(2), num_heads=2)
    leaf = {n.variable: n.params.numpy() for n in graph.nodes if n.kind == "input"}
    edge: dict[int, np.ndarray] = {}
    scopes = graph.scopes()
    for index, node in enumerate(graph.nodes):
        if node.kind == "sum" and index != graph.root:
            edge[{frozenset({1}): 1, frozenset({2, 3}): 2, frozenset({3}): 3}[scopes[index]]] = node.weight.numpy()
    root = graph.nodes[graph.root].weight.numpy()
    x = torch.cartesian_prod(*[torch.arange(2)] * 4)
    picked = [leaf[v][:, x[:, v].numpy()] for v in range(4)]
    expected = np.einsum("ha,ab,ac,cd,aN,bN,cN,dN->Nh", root, edge[1], edge[2], edge[3], *picked)
    np.testing.assert_allclose(pc.Circuit(graph).log_prob(x).exp().detach(), expected, rtol=1e-10)


@pytest.mark.parametrize("num_heads", [1, 4])
def test_shape(num_heads: int) -> None:
    graph = pc.hclt(torch.tensor([2, 2, -1, 1]), num_latents=5, leaf=pc.Categorical(7), num_heads=num_heads)
    graph.validate()
    assert (graph.num_variables, graph.num_heads) == (4, num_heads)
    assert set(graph.latents) == {0, 1, 2, 3}
    scopes = graph.scopes()
    assert [scopes[graph.latents[v]] for v in range(4)] == [{0}, {1, 3}, {0, 1, 2, 3}, {3}]


def test_every_variable_may_have_a_family_of_its_own() -> None:
    """All values of the whole numbers, and a fine grid for the density: probabilities sum to one."""
    torch.set_default_dtype(torch.float64)
    leaves = [pc.Categorical(3), pc.Gaussian(), pc.Binomial(2), pc.DiscretizedLogistic(4)]
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 1, 1]), 3, leaves))
    grid = torch.linspace(-12, 12, 481)
    x = torch.cartesian_prod(torch.arange(3.0), grid, torch.arange(3.0), torch.arange(4.0))
    total = circuit.log_prob(x, head=0).exp().sum() * (grid[1] - grid[0])
    torch.testing.assert_close(total, torch.ones(()), rtol=1e-6, atol=0)
    for wrong in (leaves[:3], [pc.SoftEvidence(3)] * 4):
        with pytest.raises(ValueError, match="leaf: got .*expected one distribution, or 4 without soft evidence"):
            pc.hclt(torch.tensor([-1, 0, 1, 1]), 3, wrong)


def test_soft_evidence_enters_directly() -> None:
    """With as many latents as states there is no emission: only the tree over z has parameters."""
    graph = pc.hclt(torch.tensor([-1, 0]), num_latents=3, leaf=pc.SoftEvidence(3), num_heads=1)
    assert pc.Circuit(graph).num_parameters == 2 + 3 * 2
    graph = pc.hclt(torch.tensor([-1, 0]), num_latents=2, leaf=pc.SoftEvidence(3), num_heads=1)
    assert pc.Circuit(graph).num_parameters == 1 + 2 * 1 + 2 * 2 * 2


def test_long_chains() -> None:
    """A chain of 2,000 variables compiles and runs: no recursion over its depth."""
    circuit = pc.Circuit(pc.hclt(torch.arange(2000) - 1, num_latents=2, leaf=pc.Bernoulli()))
    assert circuit.log_prob(torch.ones(2, 2000, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parents": torch.tensor([1, 0])}, "parents"),
        ({"parents": torch.tensor([-1, -1])}, "parents|root"),
        ({"parents": torch.tensor([-1, 7])}, "parents|7"),
        ({"parents": torch.tensor([[-1, 0]])}, "parents"),
        ({"num_latents": 0}, "num_latents"),
        ({"num_heads": 0}, "num_heads"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pc.hclt(**{"parents": torch.tensor([-1, 0]), "num_latents": 2, "leaf": pc.Bernoulli(), **settings})

"""Hidden Markov models against the sum over all paths of states."""

from typing import Any

import numpy as np
import pytest
import torch

import lvd_lightning.circuits as pc


def tables(graph: pc.CircuitGraph) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray]]:
    """p(z_0 | head), p(z_t | z_t-1) for t = 1, 2, ..., and p(x_t | z_t) for t = 0, 1, ..., from the graph's nodes."""
    emissions = {node.variable: node.params.numpy() for node in graph.nodes if node.kind == "input"}
    length = len(emissions)
    above = {node.children[0]: node.weight.numpy() for node in graph.nodes if node.kind == "sum"}
    transitions = [above[graph.latents[t]] for t in range(1, length)]
    return above[graph.latents[0]], transitions, [emissions[t] for t in range(length)]


@pytest.mark.parametrize("homogeneous", [False, True])
def test_joint_distribution_is_a_sum_over_paths(homogeneous: bool) -> None:
    graph = pc.hmm(length=3, num_states=4, num_tokens=5, homogeneous=homogeneous, num_heads=2)
    first, steps, emissions = tables(graph)
    x = torch.cartesian_prod(*[torch.arange(5)] * 3)
    seen = [table[:, x[:, t].numpy()] for t, table in enumerate(emissions)]
    expected = np.einsum("ha,ab,bc,aN,bN,cN->Nh", first, *steps, *seen)
    np.testing.assert_allclose(pc.Circuit(graph).log_prob(x).exp().detach(), expected, rtol=1e-10)
    np.testing.assert_allclose(expected.sum(0), 1)
    assert np.array_equal(steps[0], steps[1]) == homogeneous
    assert np.array_equal(emissions[0], emissions[2]) == homogeneous


def test_parameters_are_shared_or_not() -> None:
    free = {False: (5 - 1) * 4 * 3 + 5 * 4 * 6, True: 4 * 3 + 4 * 6}
    for homogeneous, expected in free.items():
        graph = pc.hmm(5, 4, 7, homogeneous, num_heads=2)
        assert pc.Circuit(graph).num_parameters == expected + 2 * 3


def test_latents_are_the_states() -> None:
    """The posterior of the state at every step, by enumeration of paths."""
    graph = pc.hmm(3, 2, 3, homogeneous=True)
    first, steps, emissions = tables(graph)
    x = torch.tensor([[0, 2, 1], [1, 1, 0]])
    seen = [table[:, x[:, t].numpy()] for t, table in enumerate(emissions)]
    joint = np.einsum("a,ab,bc,aN,bN,cN->Nabc", first[0], *steps, *seen)
    joint /= joint.sum((1, 2, 3), keepdims=True)
    for t, others in enumerate(((2, 3), (1, 3), (1, 2))):
        np.testing.assert_allclose(pc.Circuit(graph).posterior(x, t).detach(), joint.sum(others), rtol=1e-9)


def test_training_keeps_a_homogeneous_model_homogeneous() -> None:
    circuit = pc.Circuit(pc.hmm(4, 3, 5, homogeneous=True))
    x = torch.randint(0, 5, (40, 4))
    optimizer = pc.CircuitEM(circuit, lr=0.5)
    before = circuit.log_prob(x).sum().item()
    for _ in range(5):
        (-circuit.log_prob(x)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert circuit.log_prob(x).sum().item() > before + 1
    _, steps, emissions = tables(circuit.to_graph())
    assert all(np.array_equal(step, steps[0]) for step in steps)
    assert all(np.array_equal(table, emissions[0]) for table in emissions)


def test_another_leaf() -> None:
    graph = pc.hmm(3, 2, leaf=pc.Gaussian(), homogeneous=True)
    assert pc.Circuit(graph).num_parameters == 2 * 2 + 2 + 1
    assert pc.Circuit(graph).log_prob(torch.randn(4, 3)).isfinite().all()


@pytest.mark.parametrize("homogeneous", [False, True])
def test_one_token(homogeneous: bool) -> None:
    graph = pc.hmm(1, 4, 3, homogeneous)
    assert [node.kind for node in graph.nodes] == ["input", "product", "sum"]


def test_a_generator_decides() -> None:
    state = torch.get_rng_state()
    x = torch.randint(0, 5, (6, 4), generator=torch.Generator().manual_seed(0))
    first, again, other = (
        pc.Circuit(pc.hmm(4, 3, 5, generator=torch.Generator().manual_seed(seed))).log_prob(x) for seed in (1, 1, 2)
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype(dtype: torch.dtype) -> None:
    graph = pc.hmm(3, 2, 5, True, dtype=dtype)
    assert {t.dtype for node in graph.nodes for t in (node.params, node.weight) if t is not None} == {dtype}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 0}, "length.*0"),
        ({"num_states": 0}, "num_states.*0"),
        ({"num_tokens": 0}, "num_tokens.*0"),
        ({"num_heads": -2}, "num_heads.*-2"),
        ({"num_tokens": None}, "num_tokens or leaf.*None"),
        ({"leaf": pc.Bernoulli()}, "num_tokens or leaf.*Bernoulli"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"hmm: .*{message}"):
        pc.hmm(**({"length": 3, "num_states": 2, "num_tokens": 5} | settings))

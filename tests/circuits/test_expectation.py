"""Expectations of functions of single variables against enumeration and closed forms."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lvd_lightning.circuits as pc

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def by_enumeration(case: Any, f_DC: torch.Tensor, row: int, head: int) -> np.ndarray:
    """E[f_v(x_v) | the observed variables of a row], from the probabilities of all worlds."""
    joint = np.exp(case.reference.log_prob(case.x)[:, head])
    agree = (case.x == case.x[row])[:, case.observed[row]].all(1).numpy()
    joint = joint * agree
    values = torch.stack([f_DC[v][case.x[:, v]] for v in range(case.x.shape[1])], 1).numpy()
    return joint @ values / joint.sum()


def test_expectations_given_what_is_observed(discrete: Any) -> None:
    head = discrete.graph.num_heads - 1
    f_DC = torch.randn(discrete.x.shape[1], 5, dtype=torch.float64)
    possible = discrete.reference.log_prob(discrete.x, discrete.observed.numpy())[:, head] > -np.inf
    rows = np.flatnonzero(possible)[:: max(1, possible.sum() // 8)]
    found = pc.expectation(discrete.circuit, f_DC, x=discrete.x[rows], observed=discrete.observed[rows], head=head)
    expected = np.stack([by_enumeration(discrete, f_DC, row, head) for row in rows])
    np.testing.assert_allclose(found.numpy(), expected, **EXACT)


def test_expectations_without_evidence(discrete: Any) -> None:
    f_DC = torch.randn(discrete.x.shape[1], 5, dtype=torch.float64)
    joint = np.exp(discrete.reference.log_prob(discrete.x)[:, 0])
    values = torch.stack([f_DC[v][discrete.x[:, v]] for v in range(discrete.x.shape[1])], 1).numpy()
    found = pc.expectation(discrete.circuit, f_DC)
    np.testing.assert_allclose(found.numpy(), joint @ values, **EXACT)
    by_function = pc.expectation(discrete.circuit, lambda x, v: f_DC[v, x.long()])
    torch.testing.assert_close(by_function, found)


def test_moments_of_gaussians(build_case: Callable[..., Any]) -> None:
    """The second moment of a mixture of normal distributions has a closed form."""
    case = build_case("single", "gaussian", 2)
    mean, std = case.graph.nodes[0].params.T.numpy()
    units = [next(u for u, c in tree.values() if c < 0) for tree in case.reference.trees[1]]
    expected = case.reference.tree_weights(1) @ (mean**2 + std**2)[units]
    found = pc.expectation(case.circuit, lambda x, v: x.square(), head=1)
    np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-10)
    given = pc.expectation(case.circuit, lambda x, v: x.square(), x=torch.tensor([[0.5]]), head=1)
    np.testing.assert_allclose(given.numpy(), [[0.25]])


def test_states_given_evidence() -> None:
    """With soft evidence, expectations are those under the posterior of the states."""
    torch.set_default_dtype(torch.float64)
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 4, pc.SoftEvidence(4)))
    evidence, f_DC = torch.randn(5, 3, 4), torch.randn(3, 4)
    expected = torch.stack([circuit.posterior(evidence, v) @ f_DC[v] for v in range(3)], 1)
    torch.testing.assert_close(pc.expectation(circuit, f_DC, x=evidence), expected)


def test_batches_of_circuits() -> None:
    torch.set_default_dtype(torch.float64)
    graphs = [pc.hclt(torch.tensor([-1, 0, 1]), 3, pc.Categorical(4), num_heads=2) for _ in range(2)]
    x, f_DC = torch.randint(4, (2, 6, 3)), torch.randn(3, 4)
    observed, head = torch.rand(x.shape) < 0.5, torch.randint(2, (2, 6))
    found = pc.expectation(pc.Circuit(graphs), f_DC, x=x, observed=observed, head=head)
    assert found.shape == (2, 6, 3)
    for g, graph in enumerate(graphs):
        alone = pc.expectation(pc.Circuit(graph), f_DC, x=x[g], observed=observed[g], head=head[g])
        torch.testing.assert_close(found[g], alone)


def test_functions_that_do_not_fit() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(4)))
    with pytest.raises(ValueError, match=r"f: expected shape \(variables, values\) with 4 values"):
        pc.expectation(circuit, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="f: expected a function"):
        pc.expectation(circuit, lambda x, v: x.sum())
    normal = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Gaussian()))
    with pytest.raises(ValueError, match="no table can list"):
        pc.expectation(normal, torch.zeros(2, 3))

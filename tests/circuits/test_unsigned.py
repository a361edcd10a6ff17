"""Whole numbers in any integer type, those included that PyTorch only stores."""

import pytest
import torch

import lvd_lightning.circuits as pc

X = torch.tensor([[0, 1, 2], [2, 2, 1], [1, 0, 0], [2, 1, 2]])
OBSERVED = torch.tensor([[True, False, True]]).expand(4, 3)


@pytest.fixture(params=[torch.uint16, torch.uint32, torch.uint64], ids=str)
def unsigned(request: pytest.FixtureRequest) -> torch.Tensor:
    return X.to(request.param)


def test_queries(unsigned: torch.Tensor) -> None:
    circuit = pc.Circuit(pc.hclt([-1, 0, 0], 2, pc.Categorical(3), num_heads=2))
    head = torch.tensor([0, 1, 1, 0])
    assert torch.equal(circuit.log_prob(unsigned), circuit.log_prob(X))
    assert torch.equal(circuit.log_prob(unsigned, observed=OBSERVED), circuit.log_prob(X, observed=OBSERVED))
    assert torch.equal(circuit.log_prob(X, head=head.to(unsigned.dtype)), circuit.log_prob(X, head=head))
    assert torch.equal(circuit.posterior(unsigned, 1), circuit.posterior(X, 1))
    assert torch.equal(circuit.sample(x=unsigned, observed=OBSERVED)[:, ::2], X[:, ::2])
    for found, expected in zip(circuit.mpe(unsigned, OBSERVED), circuit.mpe(X, OBSERVED), strict=True):
        assert torch.equal(found, expected)
    value = torch.arange(3.0).expand(3, 3)
    assert torch.equal(
        pc.expectation(circuit, value, x=unsigned, observed=OBSERVED),
        pc.expectation(circuit, value, x=X, observed=OBSERVED),
    )
    with circuit.reference():
        torch.testing.assert_close(circuit.log_prob(unsigned), circuit.log_prob(X))
    flows, expected = pc.Flows(circuit), pc.Flows(circuit)
    flows.add(unsigned, head=head.to(unsigned.dtype))
    expected.add(X, head=head)
    assert torch.equal(flows.inner_E, expected.inner_E)
    with pytest.raises(ValueError, match="values in 0..2, got 7"):
        circuit.log_prob(torch.full((1, 3), 7).to(unsigned.dtype))


def test_structures_from_data(unsigned: torch.Tensor) -> None:
    assert torch.equal(pc.chow_liu_tree(unsigned), pc.chow_liu_tree(X))
    found, expected = (
        pc.hclt_from_data(x, [-1, 0, 0], 2, pc.Categorical(3), generator=torch.Generator().manual_seed(0))
        for x in (unsigned, X)
    )
    assert torch.equal(pc.Circuit(found).log_prob(X), pc.Circuit(expected).log_prob(X))
    graph = pc.hclt([-1, 0, 0], 2, pc.Categorical(3))
    better = [
        pc.Circuit(pc.regions_from_data(graph, x, generator=torch.Generator().manual_seed(0))) for x in (unsigned, X)
    ]
    assert torch.equal(better[0].log_prob(X), better[1].log_prob(X))

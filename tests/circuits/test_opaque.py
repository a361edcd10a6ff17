"""`torch.compile` around circuits: equal numbers, gradients and few graphs; and nobody loads it who does not ask."""

import subprocess
import sys

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc


class Counting:
    """A backend that runs what it is given, and counts it."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        self.graphs += 1
        return graph


@pytest.fixture
def circuit() -> pc.Circuit:
    return pc.Circuit(pc.hclt([-1, 0, 0, 1], 3, pc.Categorical(5), generator=torch.Generator().manual_seed(0)))


def test_a_compiled_circuit_has_equal_numbers_and_gradients(circuit: pc.Circuit) -> None:
    x = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(circuit, backend=backend)
    found, expected = compiled(x), circuit.log_prob(x)
    assert torch.equal(found, expected)
    found.sum().backward()
    gradients = [table.grad for table in circuit.tables]
    circuit.zero_grad()
    expected.sum().backward()
    for one, other in zip(gradients, circuit.tables, strict=True):
        assert one is not None
        assert other.grad is not None
        assert torch.equal(one, other.grad)
    assert backend.graphs == 0  # nothing around the circuit


def test_what_is_around_a_circuit_is_compiled_in_two_graphs(circuit: pc.Circuit) -> None:
    def loss(x: Tensor) -> Tensor:
        observed = (x * 3 + 1) % 2 == 0
        return (circuit.log_prob(x, observed=observed).exp() * 2).sum() + 1

    x = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(1))
    torch._dynamo.reset()
    backend = Counting()
    found = torch.compile(loss, backend=backend)(x)
    torch.testing.assert_close(found, loss(x))
    assert backend.graphs == 2  # before and after
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(loss, backend=backend, fullgraph=True)(x)


def test_queries_are_left_alone_too(circuit: pc.Circuit) -> None:
    x = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(1))
    observed = torch.arange(4) < 2
    torch._dynamo.reset()
    backend = Counting()
    compiled = torch.compile(lambda x: circuit.mpe(x, observed.expand(20, 4))[0] + 1, backend=backend)
    assert torch.equal(compiled(x), circuit.mpe(x, observed.expand(20, 4))[0] + 1)
    assert backend.graphs <= 2


def test_a_circuit_does_not_load_the_compiler() -> None:
    program = (
        "import sys, torch, lvd_lightning.circuits as pc; "
        "c = pc.Circuit(pc.hclt([-1, 0], 2, pc.Bernoulli())); c.log_prob(torch.zeros(3, 2)); "
        "sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=100).returncode == 0

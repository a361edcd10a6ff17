"""A rounded normal variable: exact tails, EM that climbs to the maximum, and why the moments of x are not enough."""

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

import lvd_lightning.circuits as pc

DATA = {
    "far": lambda: stats.norm(200, 3).rvs((400, 1), random_state=0),
    "spread": lambda: stats.uniform(0, 255).rvs((400, 1), random_state=0),
    "beyond": lambda: stats.norm(260, 20).rvs((400, 1), random_state=0),
    "ends": lambda: np.array([[0.0], [255.0]]).repeat(50, 0),
    "outliers": lambda: np.r_[np.full((90, 1), 3.0), np.full((10, 1), 250.0)],
    "constant": lambda: np.full((50, 1), 7.0),
    "lowest": lambda: np.zeros((50, 1)),
}


def values_of(name: str) -> Tensor:
    return torch.from_numpy(DATA[name]()).round().clamp(0, 255)


def single(mean: float, std: float) -> pc.Circuit:
    """A circuit of one variable and one unit."""
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, pc.DiscretizedGaussian(256), 1, params=torch.tensor([[mean, std]]))
    graph.add_sum([leaf], 1)
    return pc.Circuit(graph)


def train(circuit: pc.Circuit, optimizer: torch.optim.Optimizer, x: Tensor, number: int) -> list[float]:
    """The mean log-likelihood before every step, and at last."""
    values = []
    for _ in range(number):
        loss = -circuit.log_prob(x).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(-loss.item() / len(x))
    return [*values, circuit.log_prob(x).mean().item()]


def test_tails_are_exact_in_single_precision() -> None:
    """Against double precision, on both sides of where the series takes over, thousands of deviations out as well."""
    family = pc.DiscretizedGaussian(256)
    std = torch.logspace(-1.3, 2, 12)
    params = torch.stack([torch.linspace(-40, 300, 12).round() + 0.25, std], 1).float()
    x = torch.arange(256)[None]
    found, exact = torch.empty(1, 12, 256, dtype=torch.float32), torch.empty(1, 12, 256)
    family.forward(params[None], x, found)
    family.forward(params[None].double(), x, exact)
    assert exact.min() < -1e6
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-4)
    first = -0.5 * (255 - params[0, 0].double() - 0.5).square() / params[0, 1].double().square()
    assert found[0, 0, 255].item() * np.log(2) == pytest.approx(float(first), rel=1e-3)


def test_log_prob_agrees_with_forward_and_its_gradient_with_backward() -> None:
    family = pc.DiscretizedGaussian(256)
    params = torch.tensor([[[100.0, 0.3], [-20.0, 2.0], [128.0, 40.0], [3.0, 1.0]]], requires_grad=True)
    x = torch.arange(256)[None]
    out, grad = torch.empty(1, 4, 256), torch.rand(1, 4, 256)
    found = family.log_prob(params, x)
    family.forward(params.detach(), x, out)
    torch.testing.assert_close(found.detach(), out * np.log(2), rtol=1e-10, atol=1e-10)
    (grad * found).sum().backward()
    closed = torch.empty(1, 4, 2)
    family.backward(params.detach(), x, grad, closed)
    torch.testing.assert_close(params.grad, closed, rtol=1e-8, atol=1e-8)


def test_many_examples_are_as_many_alone() -> None:
    """More of them than values: log-likelihoods, gradients and sums are gathered by value."""
    family, generator = pc.DiscretizedGaussian(9), torch.Generator().manual_seed(0)
    params = family.initial(4, generator=generator)[None]
    x, grad = torch.randint(0, 9, (1, 40), generator=generator), torch.rand(1, 4, 40, generator=generator)
    out, closed = torch.empty(1, 4, 40), torch.empty(1, 4, 2)
    family.forward(params, x, out)
    torch.testing.assert_close(out * np.log(2), family.log_prob(params, x))
    family.backward(params, x, grad, closed)
    sums = family.statistics(params, x, grad)
    for part in range(0, 40, 8):
        found = torch.empty(1, 4, 2)
        family.backward(params, x[:, part : part + 8], grad[..., part : part + 8], found)
        closed -= found
        sums -= family.statistics(params, x[:, part : part + 8], grad[..., part : part + 8])
    torch.testing.assert_close(closed, torch.zeros(1, 4, 2), rtol=0, atol=1e-10)
    torch.testing.assert_close(sums, torch.zeros(1, 4, 3), rtol=0, atol=1e-10)


@pytest.mark.parametrize("start", [(10.0, 1.0), (128.0, 60.0), (6.4, 0.06)], ids=["off", "broad", "sharp"])
@pytest.mark.parametrize("name", DATA)
def test_no_step_lowers_the_likelihood(name: str, start: tuple[float, float]) -> None:
    """Whatever the data, the start and the step size; up to rounding, 1e-9 nats."""
    x = values_of(name)
    for lr in (1.0, 0.1):
        circuit = single(*start)
        values = train(circuit, pc.CircuitEM(circuit, lr=lr, pseudocount=0.0), x, 25)
        assert (np.diff(values) > -1e-9).all()
        assert values[-1] > values[0] + 1e-5


@pytest.mark.parametrize("name", ["far", "spread", "beyond"])
def test_em_ends_at_the_maximum(name: str) -> None:
    """Which is not where the moments of x are when many values lie beyond an end."""
    x = values_of(name)
    circuit = single(128.0, 60.0)
    train(circuit, pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0), x, 300)
    values, counts = np.unique(x.numpy(), return_counts=True)
    low = np.where(values > 0, values - 0.5, -np.inf)
    high = np.where(values < 255, values + 0.5, np.inf)

    def loss(at: np.ndarray) -> float:
        known = stats.norm(at[0], np.exp(at[1]))
        return -(counts * np.log(known.cdf(high) - known.cdf(low))).sum()

    best = optimize.minimize(
        loss, [x.mean().item(), np.log(x.std().item())], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}
    )
    mean, std = circuit.to_graph().nodes[0].params[0].tolist()
    assert mean == pytest.approx(best.x[0], rel=1e-4)
    assert std == pytest.approx(np.exp(best.x[1]), rel=1e-4)
    assert (abs(mean - x.mean().item()) > 4) == (name == "beyond")


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_a_mixture_finds_its_parts(rule: type) -> None:
    """Pixels of two kinds, in single precision."""
    torch.set_default_dtype(torch.float32)
    kind = torch.rand(2000, 1) < 0.3
    x = torch.where(kind, 40 + 2 * torch.randn(2000, 1), 210 + 8 * torch.randn(2000, 1)).round().clamp(0, 255)
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, pc.DiscretizedGaussian(256), 2, params=torch.tensor([[100.0, 30.0], [150.0, 30.0]]))
    graph.add_sum([leaf], 1)
    circuit = pc.Circuit(graph)
    values = train(circuit, rule(circuit), x.byte(), 100)
    assert values[-1] > values[0] + 1
    learnt = circuit.to_graph()
    expected = torch.tensor([[40.0, 2.0], [210.0, 8.0]])
    torch.testing.assert_close(learnt.nodes[0].params, expected, rtol=0.05, atol=0.2)
    assert learnt.nodes[1].weight[0, 0].item() == pytest.approx(0.3, abs=0.03)

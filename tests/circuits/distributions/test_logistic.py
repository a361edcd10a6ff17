"""Learning discretised logistics: the random precision by quadrature, the maximum by scipy, and no step down."""

import numpy as np
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import Tensor

import lvd_lightning.circuits as pc


def single(family: pc.DiscretizedLogistic, mean: float, scale: float) -> pc.Circuit:
    """A circuit of one variable and one unit."""
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, family, 1, params=torch.tensor([[mean, scale]]))
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


DATA = {
    "far": lambda: stats.logistic(200, 3).rvs((400, 1), random_state=0),
    "spread": lambda: stats.uniform(0, 255).rvs((400, 1), random_state=0),
    "ends": lambda: np.array([[0.0], [255.0]]).repeat(50, 0),
    "outliers": lambda: np.r_[np.full((90, 1), 3.0), np.full((10, 1), 250.0)],
    "constant": lambda: np.full((50, 1), 7.0),
    "lowest": lambda: np.zeros((50, 1)),
}


@pytest.mark.parametrize("start", [(10.0, 1.0), (128.0, 60.0), (6.4, 0.06)], ids=["off", "broad", "sharp"])
@pytest.mark.parametrize("name", DATA)
def test_no_step_lowers_the_likelihood(name: str, start: tuple[float, float]) -> None:
    """Whatever the data, the start and the step size."""
    x = torch.from_numpy(DATA[name]()).round().clamp(0, 255)
    for lr in (1.0, 0.1):
        circuit = single(pc.DiscretizedLogistic(256), *start)
        values = train(circuit, pc.CircuitEM(circuit, lr=lr, pseudocount=0.0), x, 25)
        assert (np.diff(values) > -1e-9).all()
        assert values[-1] > values[0] + 1e-4


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_defaults_raise_the_likelihood(rule: type) -> None:
    x = torch.from_numpy(DATA["far"]()).round().clamp(0, 255)
    circuit = single(pc.DiscretizedLogistic(256), 128.0, 32.0)
    values = train(circuit, rule(circuit), x, 60)
    assert (np.diff(values) > 0).all()
    assert values[-1] > -3.2 > -5 > values[0]


@pytest.mark.parametrize("name", ["far", "spread"])
def test_em_ends_at_the_maximum(name: str) -> None:
    x = torch.from_numpy(DATA[name]()).round().clamp(0, 255)
    family = pc.DiscretizedLogistic(256)
    circuit = single(family, 10.0, 1.0)
    train(circuit, pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0), x, 150)
    values, counts = np.unique(x.numpy(), return_counts=True)
    low = np.where(values > 0, values - 0.5, -np.inf)
    high = np.where(values < 255, values + 0.5, np.inf)

    def loss(at: np.ndarray) -> float:
        known = stats.logistic(at[0], np.exp(at[1]))
        return -(counts * np.log(known.cdf(high) - known.cdf(low))).sum()

    best = optimize.minimize(
        loss, [x.mean().item(), np.log(x.std().item())], method="Nelder-Mead", options={"xatol": 1e-7, "fatol": 1e-9}
    )
    mean, scale = circuit.to_graph().nodes[0].params[0].tolist()
    assert mean == pytest.approx(best.x[0], rel=1e-4)
    assert scale == pytest.approx(np.exp(best.x[1]), rel=1e-4)


@pytest.mark.parametrize(("mean", "scale"), [(3.3, 0.7), (-2.0, 4.0), (9.0, 0.3)])
def test_sums_for_em_by_quadrature(mean: float, scale: float) -> None:
    """E[r y | x] and E[r y^2 | x]: integrals over the bin of x of tanh(z / 2) / z times the density."""
    family = pc.DiscretizedLogistic(8)
    x = torch.arange(8.0)
    params = torch.tensor([[[mean, scale]]])
    found = torch.stack([family.statistics(params, v.view(1, 1), torch.ones(1, 1, 1))[0, 0] for v in x])
    density = stats.logistic(mean, scale).pdf

    def precision(y: float) -> float:
        z = (y - mean) / scale
        return 0.5 if z == 0 else np.tanh(z / 2) / z

    for value, row in enumerate(found.tolist()):
        low = mean - 60 * scale if value == 0 else value - 0.5
        high = mean + 60 * scale if value == 7 else value + 0.5
        split = [mean] if low < mean < high else None
        mass, zeroth, first, second = (
            integrate.quad(lambda y, f=f: density(y) * f(y), low, high, points=split, epsabs=1e-14, epsrel=1e-11)[0]
            for f in (lambda y: 1.0, precision, lambda y: precision(y) * y, lambda y: precision(y) * y**2)
        )
        # the bound that stands for E[r | x] moves the other sums as well: they are gathered around the mean
        excess = row[1] - zeroth / mass
        assert -1e-9 < excess < 0.5
        expected = [1.0, first / mass + mean * excess, second / mass + mean**2 * excess]
        np.testing.assert_allclose([row[0], row[2], row[3]], expected, rtol=1e-6, atol=1e-9)


def test_a_mixture_of_logistics_finds_its_parts() -> None:
    """Pixels of two kinds, in single precision, by Anemone's defaults."""
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    kind = torch.rand(2000, 1) < 0.3
    x = torch.where(kind, 40 + 2 * torch.randn(2000, 1), 210 + 8 * torch.randn(2000, 1)).round().clamp(0, 255)
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, pc.DiscretizedLogistic(256), 2, params=torch.tensor([[100.0, 30.0], [150.0, 30.0]]))
    graph.add_sum([leaf], 1)
    circuit = pc.Circuit(graph)
    train(circuit, pc.Anemone(circuit), x.byte(), 60)
    learnt = circuit.to_graph()
    assert learnt.nodes[0].params[:, 0].tolist() == pytest.approx([40, 210], abs=1)
    assert learnt.nodes[1].weight[0, 0].item() == pytest.approx(0.3, abs=0.03)

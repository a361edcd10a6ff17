"""Logistic inputs in the pass with linear values: compiled, by PyTorch, and against the general pass."""

from typing import Any

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.kernels.cpu import passes


def spread_out(graph: pc.CircuitGraph, widest: float) -> pc.CircuitGraph:
    """Means all over the values and beyond, scales up to `widest`."""
    for node in graph.nodes:
        if isinstance(node.distribution, pc.DiscretizedLogistic) and node.tied_to is None:
            mean, scale = 300 * torch.rand(node.num_units) - 20, 0.05 + widest * torch.rand(node.num_units)
            node.params = torch.stack([mean, scale], 1)
    return graph


def trees(widest: float) -> pc.Circuit:
    """Three circuits over five variables of 256 and of 40 values, one of them a table."""
    leaves = [pc.DiscretizedLogistic(256)] * 3 + [pc.DiscretizedLogistic(40), pc.Categorical(7)]
    return pc.Circuit([spread_out(pc.hclt([-1, 0, 0, 1, 2], 9, leaves, num_heads=2), widest) for _ in range(3)])


def tied(widest: float) -> pc.Circuit:
    """A hidden Markov model whose steps share their inputs."""
    return pc.Circuit(spread_out(pc.hmm(5, 6, leaf=pc.DiscretizedLogistic(256), homogeneous=True), widest))


def draw(circuit: pc.Circuit, size: int) -> torch.Tensor:
    x = torch.randint(256, (size, 5))
    x[:5], x[5:10] = 0, 255
    if circuit.batched:
        x = torch.minimum(x, torch.tensor([255, 255, 255, 39, 6]))
    return x


def evaluate(circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor | None) -> list[torch.Tensor]:
    """Log-likelihoods, gradients, and the sums that EM learns from."""
    pc.CircuitEM(circuit)
    circuit.zero_grad()
    log_p = circuit.log_prob(x, observed=observed)
    (log_p * torch.linspace(0.5, 2, log_p.numel(), dtype=log_p.dtype).view_as(log_p)).sum().backward()
    statistics = [circuit.engine.statistics[number].clone() for number in sorted(circuit.engine.statistics)]
    assert statistics
    return [log_p.detach(), *(parameter.grad.clone() for parameter in circuit.parameters()), *statistics]


def general(
    circuit: pc.Circuit, x: torch.Tensor, observed: torch.Tensor | None, monkeypatch: Any
) -> list[torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(circuit.engine, "is_linear", False)
        return evaluate(circuit, x, observed)


@pytest.fixture(params=["compiled", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """By the compiled kernels (where there is a compiler), or without them."""
    monkeypatch.setenv("LVD_LIGHTNING_NATIVE", "1" if request.param == "compiled" else "0")
    return str(request.param)


@pytest.mark.parametrize("build", [trees, tied])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_both_passes_agree(
    build: Any, masked: bool, dtype: torch.dtype, tolerance: float, kind: str, monkeypatch: Any
) -> None:
    circuit = build(30).to(dtype)
    assert circuit.engine.is_linear
    x = draw(circuit, 150)
    observed = torch.rand(x.shape) < 0.7 if masked else None
    linear = evaluate(circuit, x, observed)
    for first, second in zip(linear, general(circuit, x, observed, monkeypatch), strict=True):
        torch.testing.assert_close(first, second, rtol=tolerance, atol=tolerance * float(second.abs().max()))


def test_the_kernels_take_them(kind: str) -> None:
    circuit = trees(30)
    x = draw(circuit, 20)
    expected = kind == "compiled" and passes.library(circuit.dtype) is not None
    assert passes.applies(circuit.engine, circuit.probabilities()) is expected
    circuit.log_prob(x)
    kinds = [type(space) for _, space in circuit.engine.pool.free]
    assert (passes.FusedWorkspace in kinds) is expected


@pytest.mark.parametrize("scale", [0.05, 0.7, 3.0, 40.0, 2000.0])
def test_every_value_has_its_probability(scale: float, kind: str) -> None:
    """Against the definition in double precision, to the relative precision of single; they sum to one."""
    means = torch.tensor([-60.0, 0.0, 17.3, 254.9, 300.0])
    params = torch.stack([means, torch.full_like(means, scale)], 1).float().double()
    graph = pc.hclt([-1], 5, pc.DiscretizedLogistic(256))
    (leaf,) = (node for node in graph.nodes if node.kind == "input")
    leaf.params = params
    family = leaf.distribution
    exact = family.log_prob(params.double()[None], torch.arange(256)[None]).exp()[0]
    weight = next(node for node in graph.nodes if node.kind == "sum" and node.num_units == 1).weight.double()
    circuit = pc.Circuit(graph).float()
    found = circuit.log_prob(torch.arange(256)[:, None])[:, 0].detach().double().exp()
    torch.testing.assert_close(found, (weight @ exact)[0], rtol=2e-5, atol=1e-37)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def test_far_out_in_the_tails(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No unit explains the value: single precision holds no such likelihood. The kernels scale it, others go round."""
    graph = pc.hclt([-1, 0, 0], 4, pc.DiscretizedLogistic(256))
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.tensor([[20.0, 0.3], [22.0, 0.3], [25.0, 0.3], [21.0, 0.3]])
    exact, circuit = pc.Circuit(graph).double(), pc.Circuit(graph).float()
    sizes: list[int] = []
    run_forward = circuit.engine.run_forward
    monkeypatch.setattr(
        circuit.engine, "run_forward", lambda batch, *rest: (sizes.append(batch.size), run_forward(batch, *rest))
    )
    x = 20 + torch.randint(5, (40, 3))
    x[7], x[9, 1] = torch.tensor([250, 20, 21]), 120
    x[11], x[13, 2], x[15] = torch.tensor([0, 255, 21]), 255, torch.tensor([255, 255, 255])
    for observed in (None, torch.rand(x.shape) < 0.8):
        first, second = evaluate(circuit, x, observed), evaluate(exact, x, observed)
        assert float(first[0].min()) < -200
        for found, expected in zip(first, second, strict=True):
            atol = 1e-4 * float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=atol)
    if passes.applies(circuit.engine, circuit.probabilities()):
        assert not sizes
    else:
        assert sizes
        assert max(sizes) <= 8  # these examples, and what fills a batch


def test_values_in_floating_point_and_gradients_for_them(kind: str) -> None:
    circuit = trees(30)
    x = draw(circuit, 30)
    expected = circuit.log_prob(x).detach()
    torch.testing.assert_close(circuit.log_prob(x.to(circuit.dtype)), expected)
    smooth = pc.Circuit(pc.hclt([-1, 0, 0], 5, pc.DiscretizedLogistic(256)))
    values = torch.randint(256, (20, 3)).to(smooth.dtype).requires_grad_()
    (found,) = torch.autograd.grad(smooth.log_prob(values).sum(), values)
    with smooth.reference():
        (wanted,) = torch.autograd.grad(smooth.log_prob(values).sum(), values)
    torch.testing.assert_close(found, wanted)
    assert bool((found != 0).any())


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_flows_are_those_of_the_general_pass(layout: Any, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every edge and unit, with heads, weights, pruned edges, and examples that no unit explains."""
    circuit = trees(2).float()
    x = draw(circuit, 100)
    graphs = circuit.to_graph()
    for graph in graphs:
        for index, node in enumerate(graph.nodes):
            if node.kind == "sum" and index != graph.root:
                node.mask = torch.rand(node.weight.shape) < 0.5
                node.mask[:, 0] = True
                node.weight = node.weight * node.mask / (node.weight * node.mask).sum(1, keepdim=True)
    circuit = pc.Circuit(graphs, layout=layout)
    head, weight = torch.randint(2, (3, 100)), torch.rand(3, 100) * (torch.rand(3, 100) < 0.8)

    def count() -> pc.Flows:
        flows = pc.Flows(circuit)
        flows.add(x, head=head, weight=weight, chunk_size=70)
        return flows

    found = count()
    with monkeypatch.context() as patch:
        patch.setattr(circuit.engine, "is_linear", False)
        expected = count()
    for g, graph in enumerate(graphs):
        for index, node in enumerate(graph.nodes):
            atol = 1e-4 * float(weight[g].sum())
            torch.testing.assert_close(found.units(index, g), expected.units(index, g), rtol=1e-4, atol=atol)
            if node.kind == "sum":
                torch.testing.assert_close(found.edges(index, g), expected.edges(index, g), rtol=1e-4, atol=atol)


def test_circuits_that_do_not_explain_an_example_are_not_computed_again(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a margin: what underflowed in one variable is far below the best, which the bound of the error knows."""
    graphs = []
    for level in (30.0, 120.0, 220.0):
        graph = pc.hclt([-1, 0, 0, 1, 1, 2], 4, pc.DiscretizedLogistic(256))
        for node in graph.nodes:
            if node.kind == "input":
                node.params = torch.stack([level + torch.randn(4), torch.full((4,), 0.4)], 1)
        graphs.append(graph)
    exact, circuit = pc.Circuit(graphs).double(), pc.Circuit(graphs).float()
    x = torch.tensor([30, 120, 220])[torch.randint(3, (60, 1))] + torch.randint(-1, 2, (60, 6))
    expected = exact.log_prob(x).detach()
    monkeypatch.setattr(circuit.engine, "run_forward", lambda *_: pytest.fail("the general pass was asked"))
    with torch.no_grad():
        found = circuit.log_prob(x, margin=40.0)
    best = expected.amax((0, 2))
    near = expected > best[:, None] - 40
    torch.testing.assert_close(found[near].double(), expected[near], rtol=1e-4, atol=1e-4)
    assert bool((found.double() <= expected + 1e-3).all())
    assert bool((~near).any())

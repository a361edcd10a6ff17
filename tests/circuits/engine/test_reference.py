"""The reference pass: equal to the fused passes, and differentiable as often as one likes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vmap

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine.reference import LogValues, log_values, take_inputs

EXACT = {"rtol": 1e-9, "atol": 1e-11}
BUILDS: dict[str, dict[str, Any]] = {
    "dense": {"layout": "dense"},
    "sparse": {"layout": "sparse"},
    "logits": {"parameterization": "logits"},
}


def gradients(circuit: pc.Circuit, loss: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(circuit.parameters()))


def assert_same(circuit: pc.Circuit, x: Tensor, **settings: Any) -> None:
    """Values, and gradients under random weights, of both passes."""
    fused = circuit.log_prob(x, **settings)
    with circuit.reference():
        found = circuit.log_prob(x, **settings)
    torch.testing.assert_close(found, fused, **EXACT)
    weights = torch.rand(fused.shape)
    parts = [(weights * out).masked_fill(out == -torch.inf, 0).sum() for out in (found, fused)]
    for one, other in zip(*(gradients(circuit, part) for part in parts), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def pass_over(circuit: pc.Circuit, x: Tensor) -> LogValues:
    return log_values(circuit.plan, circuit.probabilities(), take_inputs(circuit.plan, x, is_shared=True))


def test_both_passes_agree(case: Any) -> None:
    assert_same(case.circuit, case.x)
    assert_same(case.circuit, case.x, observed=case.observed)


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("structure", ["sparse", "shared", "tied", "ragged"])
def test_both_passes_agree_on_chosen_heads_in_every_layout(
    structure: str, build: str, build_case: Callable[..., Any]
) -> None:
    case = build_case(structure, "categorical", 3)
    circuit = pc.Circuit(case.graph, **BUILDS[build])
    heads = torch.arange(len(case.x)) % 3
    assert_same(circuit, case.x, head=heads, observed=case.observed)
    assert_same(circuit, case.x, wanted=torch.rand(len(case.x), 3) < 0.5)
    assert_same(circuit, case.x, head=heads, wanted=torch.rand(len(case.x)) < 0.5)


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_batch_of_circuits_of_different_heads(build_case: Callable[..., Any], is_shared: bool) -> None:
    cases = [build_case(name, "categorical", heads) for name, heads in (("chain", 1), ("shared", 3), ("tied", 2))]
    circuit = pc.Circuit([found.graph for found in cases])
    x = torch.randint(3, (7, 4) if is_shared else (3, 7, 4))
    observed = torch.rand(x.shape) < 0.6
    assert_same(circuit, x, observed=observed)
    assert_same(circuit, x, head=0)
    with circuit.reference():
        assert torch.equal(circuit.log_prob(x)[0, :, 1:], torch.full((7, 2), -torch.inf))


def test_kronecker_products_that_are_not_stored() -> None:
    graph = pc.rat_spn(4, depth=2, num_repetitions=2, num_sums=5, num_leaves=6, leaf=pc.Gaussian(), product="kronecker")
    circuit = pc.Circuit(graph)
    assert circuit.plan.implicit
    assert_same(circuit, torch.randn(9, 4))


def test_soft_evidence() -> None:
    circuit = pc.Circuit(pc.hclt([-1, 0, 0], 3, pc.SoftEvidence(3), num_heads=2))
    evidence = torch.randn(5, 3, 3, requires_grad=True)
    observed = torch.rand(5, 3) < 0.6
    assert_same(circuit, evidence, observed=observed)
    with circuit.reference():
        (found,) = torch.autograd.grad(circuit.log_prob(evidence, observed=observed).sum(), evidence)
        assert torch.autograd.gradgradcheck(circuit.log_prob, (evidence,))
    (expected,) = torch.autograd.grad(circuit.log_prob(evidence, observed=observed).sum(), evidence)
    torch.testing.assert_close(found, expected, **EXACT)


def test_log_values_of_every_node(build_case: Callable[..., Any]) -> None:
    """Also of products that only a sum reads, stored or not, against a loop over the nodes."""
    kronecker = pc.rat_spn(
        4, depth=1, num_repetitions=1, num_sums=2, num_leaves=16, leaf=pc.Categorical(3), product="kronecker"
    )
    graphs = [build_case(name, "categorical", 2).graph for name in ("chain", "shared", "ragged")]
    for graph in [*graphs, kronecker]:
        circuit = pc.Circuit(graph)
        x = torch.randint(3, (5, 4))
        found = pass_over(circuit, x)
        expected: list[Tensor] = []
        for index, node in enumerate(graph.nodes):
            children = [expected[child] for child in node.children]
            if node.kind == "input":
                log = node.params[:, x[:, node.variable]].log()
            elif node.kind == "sum":
                log = (node.weight.log()[:, :, None] + torch.cat(children)).logsumexp(1)
            else:
                units = torch.arange(node.num_units)[:, None].expand(-1, len(children))
                units = units if node.units is None else node.units
                log = sum(child[unit] for child, unit in zip(children, units.T, strict=True))
            expected.append(log)
            torch.testing.assert_close(found.of_node((0, index), node.num_units), log, **EXACT)


def test_extremes_are_exact() -> None:
    """Units of one node whose likelihoods differ by more than a float64 holds, under weights that need the small."""
    graph = pc.CircuitGraph()
    low = 1e-30
    leaves = [graph.add_input(v, pc.Bernoulli(), 2, params=[[1 - low, low], [low, 1 - low]]) for v in range(12)]
    inner = graph.add_sum([graph.add_product(leaves)], 2, weight=[[1.0, 0.0], [0.5, 0.5]])
    graph.add_sum([inner], 1, weight=[[1.0, 0.0]])
    circuit = pc.Circuit(graph)
    x = torch.tensor([[1] * 12, [0] * 12, [1] * 11 + [0]])
    with circuit.reference():
        found = circuit.log_prob(x)
    expected = torch.tensor([12.0, 0.0, 11.0])[:, None] * torch.tensor(low).log()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert all(part.isfinite().all() for part in gradients(circuit, found.sum()))


def test_impossible_examples_pass_no_gradient() -> None:
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, pc.Categorical(3), 2, params=[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    graph.add_sum([leaf], 1)
    circuit = pc.Circuit(graph)
    assert_same(circuit, torch.tensor([[0], [1], [2]]))
    with circuit.reference():
        assert circuit.log_prob(torch.tensor([[2]])).item() == -torch.inf


def test_an_empty_batch(case: Any) -> None:
    with case.circuit.reference():
        found = case.circuit.log_prob(case.x[:0])
        assert found.shape == (0, case.graph.num_heads)
        assert not any(part.any() for part in gradients(case.circuit, found.sum()))


@pytest.mark.parametrize(
    ("structure", "leaf"),
    [("star", "logistic"), ("star", "binomial"), ("chain", "mixed"), ("tied", "gaussian"), ("sparse", "categorical")],
)
@pytest.mark.parametrize("build", ["sparse", "logits"])
def test_second_derivatives(structure: str, leaf: str, build: str, build_case: Callable[..., Any]) -> None:
    case = build_case(structure, leaf, 2)
    circuit = pc.Circuit(case.graph, **BUILDS[build])
    names = [name for name, _ in circuit.named_parameters()]
    x, observed = case.x[:4], case.observed[:4]

    def log_prob(*tables: Tensor) -> Tensor:
        return functional_call(circuit, dict(zip(names, tables, strict=True)), (x, None, observed))

    tables = [table.detach().clone().requires_grad_() for table in circuit.parameters()]
    with circuit.reference():
        assert torch.autograd.gradcheck(log_prob, tables, fast_mode=True)
        assert torch.autograd.gradgradcheck(log_prob, tables, fast_mode=True)


def test_gradients_for_continuous_values(build_case: Callable[..., Any]) -> None:
    case = build_case("shared", "gaussian", 2)
    x = case.x.clone().requires_grad_()
    observed = case.observed
    missing = torch.where(observed, x, torch.nan)
    with case.circuit.reference():
        assert torch.autograd.gradgradcheck(case.circuit.log_prob, (x,), fast_mode=True)
        (found,) = torch.autograd.grad(case.circuit.log_prob(missing, observed=observed).sum(), x)
    assert found.isfinite().all()
    assert not found[~observed].any()
    assert found[observed].all()


def test_torch_func(build_case: Callable[..., Any]) -> None:
    """Gradients per example, and Hessians forward over reverse and reverse over reverse."""
    case = build_case("ragged", "gaussian", 2)
    tables = dict(case.circuit.named_parameters())

    def loss(tables: dict[str, Tensor], x: Tensor, head: Tensor) -> Tensor:
        return functional_call(case.circuit, tables, (x[None], head[None]))[0]

    heads = torch.arange(len(case.x)) % 2
    with case.circuit.reference():
        found = vmap(grad(loss), in_dims=(None, 0, 0))(tables, case.x, heads)
        twice = hessian(loss, argnums=1)(tables, case.x[0], heads[0])
        again = jacrev(jacrev(loss, argnums=1), argnums=1)(tables, case.x[0], heads[0])
        many = vmap(hessian(loss, argnums=1), in_dims=(None, 0, 0))(tables, case.x, heads)
    torch.testing.assert_close(twice, again, **EXACT)
    torch.testing.assert_close(many[0], twice, **EXACT)
    for row, (x, head) in enumerate(zip(case.x, heads, strict=True)):
        expected = gradients(case.circuit, case.circuit.log_prob(x[None], head=head[None]).sum())
        for name, part in zip(tables, expected, strict=True):
            torch.testing.assert_close(found[name][row], part, **EXACT)


def test_the_fused_pass_names_what_works_under_torch_func(build_case: Callable[..., Any]) -> None:
    case = build_case("star", "categorical", 1)

    def loss(tables: dict[str, Tensor]) -> Tensor:
        return functional_call(case.circuit, tables, (case.x,)).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func.*circuit\.reference\(\)"):
        grad(loss)(dict(case.circuit.named_parameters()))


def test_only_the_circuit_whose_reference_it_is_and_only_inside(build_case: Callable[..., Any]) -> None:
    case = build_case("star", "categorical", 1)
    other = copy.deepcopy(case.circuit)

    def differentiates_twice(circuit: pc.Circuit) -> bool:
        try:
            torch.autograd.grad(circuit.log_prob(case.x).sum(), list(circuit.parameters()), create_graph=True)
        except RuntimeError as error:
            return "circuit.reference()" not in str(error)
        return True

    with case.circuit.reference():
        assert differentiates_twice(case.circuit)
        assert not differentiates_twice(other)
        assert not differentiates_twice(copy.deepcopy(case.circuit))
        with case.circuit.reference(), other.reference():
            assert differentiates_twice(other)
        assert differentiates_twice(case.circuit)
    assert not differentiates_twice(case.circuit)
    with pytest.raises(KeyError), case.circuit.reference():
        raise KeyError
    assert not differentiates_twice(case.circuit)


def test_wrong_arguments_are_refused_as_ever(build_case: Callable[..., Any]) -> None:
    case = build_case("star", "categorical", 1)
    with case.circuit.reference():
        for x, head in ((case.x + 1, None), (case.x[:, 1:], None), (case.x, 1)):
            with pytest.raises(ValueError, match=r"^(x|head): "):
                case.circuit.log_prob(x, head=head)


@pytest.mark.parametrize("optimizer", [pc.CircuitEM, pc.Anemone])
@pytest.mark.parametrize("leaf", ["categorical", "gaussian"])
def test_em(optimizer: Any, leaf: str, build_case: Callable[..., Any]) -> None:
    """Flows are gradients, whichever pass they come from; inputs that need more say so."""
    case = build_case("star", leaf, 1)
    circuit, twin = case.circuit, copy.deepcopy(case.circuit)
    ours, theirs = optimizer(circuit, lr=0.3), optimizer(twin, lr=0.3)
    with circuit.reference():
        (-circuit.log_prob(case.x).sum()).backward()
    if leaf == "gaussian":
        before = [table.clone() for table in circuit.parameters()]
        with pytest.raises(ValueError, match="came from inside `circuit.reference"):
            ours.step()
        assert all(map(torch.equal, before, circuit.parameters()))
        ours.zero_grad()
        (-circuit.log_prob(case.x).sum()).backward()
    ours.step()
    (-twin.log_prob(case.x).sum()).backward()
    theirs.step()
    for found, expected in zip(circuit.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, expected, **EXACT)

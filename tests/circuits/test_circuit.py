"""Likelihoods of circuits against enumeration of their induced trees, copies of circuits, bad arguments."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_discrete_structures, few_structures
from helpers.gradients import EXACT

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import circuit as module


def test_worlds_sum_to_one(discrete: Any) -> None:
    total = discrete.circuit.log_prob(discrete.x).exp().sum(0)
    np.testing.assert_allclose(total.detach(), np.ones(discrete.graph.num_heads), **EXACT)


def test_density_integrates_to_one(build_case: Callable[..., Any]) -> None:
    case = build_case("pair", "gaussian", 2)
    grid = torch.linspace(-12, 12, 481)
    x = torch.cartesian_prod(grid, grid)
    total = case.circuit.log_prob(x).exp().sum(0) * (grid[1] - grid[0]) ** 2
    np.testing.assert_allclose(total.detach(), [1.0, 1.0], rtol=1e-8)


def test_a_mixed_circuit_integrates_to_one(build_case: Callable[..., Any]) -> None:
    """Sums over three discrete variables, an integral over the fourth."""
    case = build_case("chain", "mixed", 2)
    families = {node.variable: node.distribution for node in case.graph.nodes if node.kind == "input"}
    assert [type(families[v]) for v in range(4)] == [pc.Categorical, pc.Binomial, pc.Gaussian, pc.DiscretizedLogistic]
    grid = torch.linspace(-12, 12, 241)
    x = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0), grid, torch.arange(6.0))
    total = case.circuit.log_prob(x).exp().sum(0) * (grid[1] - grid[0])
    np.testing.assert_allclose(total.detach(), [1.0, 1.0], rtol=1e-8)


def test_log_likelihoods(case: Any) -> None:
    np.testing.assert_allclose(case.circuit.log_prob(case.x).detach(), case.reference.log_prob(case.x), **EXACT)


def test_marginals(case: Any) -> None:
    found = case.circuit.log_prob(case.x, observed=case.observed).detach()
    np.testing.assert_allclose(found, case.reference.log_prob(case.x, case.observed), **EXACT)


def test_marginal_is_the_sum_over_the_worlds_that_agree(discrete: Any) -> None:
    """Independent of the reference, too: marginals are sums of joint probabilities."""
    joint = discrete.circuit.log_prob(discrete.x).exp().detach()
    observed = discrete.observed[1]
    agree = (discrete.x[:, None, observed] == discrete.x[None, :, observed]).all(2).double()
    found = discrete.circuit.log_prob(discrete.x, observed=observed.expand(discrete.x.shape)).exp().detach()
    np.testing.assert_allclose(found, agree @ joint, **EXACT)


@few_structures
def test_values_of_unobserved_variables_do_not_matter(case: Any) -> None:
    x = case.x.masked_fill(~case.observed, 99)
    expected = case.circuit.log_prob(case.x, observed=case.observed)
    torch.testing.assert_close(case.circuit.log_prob(x, observed=case.observed), expected, rtol=0, atol=0)


def test_nan_in_unobserved_variables_does_not_matter(build_case: Callable[..., Any]) -> None:
    case = build_case("bush", "gaussian", 1)
    x = case.x.masked_fill(~case.observed, float("nan"))
    case.circuit.log_prob(x, observed=case.observed).sum().backward()
    assert torch.equal(
        case.circuit.log_prob(x, observed=case.observed), case.circuit.log_prob(case.x, observed=case.observed)
    )
    assert all(parameter.grad.isfinite().all() for parameter in case.circuit.parameters())


@few_structures
def test_head_selects(case: Any) -> None:
    heads = torch.randint(0, case.graph.num_heads, (len(case.x),))
    every = case.circuit.log_prob(case.x)
    assert torch.equal(case.circuit.log_prob(case.x, head=heads), every.gather(1, heads[:, None])[:, 0])
    for head in range(case.graph.num_heads):
        assert torch.equal(case.circuit.log_prob(case.x, head=head), every[:, head])


def test_chunks_of_folds_do_not_show(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a layer runs in pieces that fit the cache; small circuits fit at once unless the cache is tiny."""
    weights = torch.rand(len(case.x), case.graph.num_heads)
    whole = case.circuit.log_prob(case.x, observed=case.observed)
    (weights * whole).sum().backward()
    expected = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    monkeypatch.setattr("lvd_lightning.circuits.engine.layers.CACHE_SIZE", 2 * len(case.x))
    found = case.circuit.log_prob(case.x, observed=case.observed)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    (weights * found).sum().backward()
    for gradient, parameter in zip(expected, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)


@few_discrete_structures
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_every_type_of_whole_numbers_is_read_alike(dtype: torch.dtype, discrete: Any) -> None:
    assert torch.equal(discrete.circuit.log_prob(discrete.x.to(dtype)), discrete.circuit.log_prob(discrete.x))


@few_structures
def test_empty_batch(case: Any) -> None:
    found = case.circuit.log_prob(case.x[:0])
    assert found.shape == (0, case.graph.num_heads)
    found.sum().backward()
    for parameter in case.circuit.parameters():
        assert parameter.grad is None or not parameter.grad.any()


@few_structures
def test_copies_and_round_trips_are_exact(case: Any) -> None:
    expected = case.circuit.log_prob(case.x)
    again = pc.Circuit(case.circuit.to_graph())
    loaded = pc.Circuit(case.graph)
    for parameter in loaded.parameters():
        parameter.data.fill_(0.5)
    loaded.load_state_dict(case.circuit.state_dict())
    for other in (copy.deepcopy(case.circuit), again, loaded):
        assert torch.equal(other.log_prob(case.x), expected)
    for found, node in zip(again.to_graph().nodes, case.circuit.to_graph().nodes, strict=True):
        for name in ("weight", "params", "mask", "units"):
            first, second = getattr(found, name), getattr(node, name)
            assert first is second is None or torch.equal(first, second)
        assert (found.kind, found.children, found.variable, found.tied_to) == (
            node.kind,
            node.children,
            node.variable,
            node.tied_to,
        )


@few_structures
def test_a_copy_owns_its_parameters(case: Any) -> None:
    expected = case.circuit.log_prob(case.x)
    graph = case.circuit.to_graph()
    for other in (copy.deepcopy(case.circuit), pc.Circuit(graph)):
        for parameter in other.parameters():
            parameter.data.mul_(0.5)
    for node in graph.nodes:
        for tensor in (node.weight, node.params):
            if tensor is not None:
                tensor.mul_(0.5)
    assert torch.equal(case.circuit.log_prob(case.x), expected)


@few_structures
def test_precision_follows_the_module(case: Any) -> None:
    expected = case.circuit.log_prob(case.x)
    single = copy.deepcopy(case.circuit).float()
    assert single.log_prob(case.x).dtype == torch.float32
    torch.testing.assert_close(single.log_prob(case.x).double(), expected, rtol=1e-5, atol=1e-5)
    assert single.double().log_prob(case.x).dtype == torch.float64


def test_number_of_parameters(case: Any) -> None:
    expected = 0
    for node in case.graph.nodes:
        if node.tied_to is not None or node.kind == "product":
            continue
        if node.kind == "sum":
            live = node.weight.numel() if node.mask is None else int(node.mask.sum())
            expected += live - node.num_units
        else:
            two = (pc.Gaussian, pc.DiscretizedGaussian, pc.DiscretizedLogistic)
            free = {**dict.fromkeys(two, 2), pc.Binomial: 1}.get(type(node.distribution))
            free = node.params.shape[1] - 1 if free is None else free
            expected += node.num_units * free
    assert case.circuit.num_parameters == expected


def test_number_of_parameters_of_an_hclt_by_hand() -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 0]), num_latents=4, leaf=pc.Categorical(256), num_heads=5)
    # three leaves of 4 units, two transition matrices, five root rows
    assert pc.Circuit(graph).num_parameters == 3 * 4 * 255 + 2 * 4 * 3 + 5 * 3


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor([[0, 1, 2, 3]])}, r"0\.\.2.*3"),
        ({"x": torch.tensor([[0, -1, 2, 1]])}, r"0\.\.2.*-1"),
        ({"x": torch.tensor([[0.0, 0.5, 2.0, 1.0]])}, "x"),
        ({"x": torch.tensor([[0.0, float("nan"), 2.0, 1.0]])}, "NaN"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x: got shape \(2, 3\), expected \(batch, 4\)"),
        ({"x": torch.zeros(4, dtype=torch.int64)}, "x"),
        ({"x": torch.zeros(1, 2, 4, dtype=torch.int64)}, "x"),
        ({"observed": torch.ones(2, 3, dtype=torch.bool)}, "observed"),
        ({"observed": torch.ones(2, 4)}, "observed.*bool"),
        ({"head": 3}, "head.*3"),
        ({"head": -1}, "head.*-1"),
        ({"head": torch.tensor([0, 1, 0])}, "head"),
        ({"head": torch.tensor([0.0, 1.0])}, "head"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str, build_case: Callable[..., Any]) -> None:
    circuit = build_case("chain", "categorical", 2).circuit
    with pytest.raises(ValueError, match=message):
        circuit.log_prob(**{"x": torch.zeros(2, 4, dtype=torch.int64), **arguments})


def test_nan_is_refused(build_case: Callable[..., Any]) -> None:
    x = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(ValueError, match="NaN"):
        build_case("pair", "gaussian", 1).circuit.log_prob(x)
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.SoftEvidence(2), 1))
    with pytest.raises(ValueError, match="NaN"):
        prior.log_prob(x[..., None].expand(1, 2, 2))


def test_circuits_over_different_variables_do_not_fold(build_case: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"variables.*\[2, 4\]"):
        pc.Circuit([build_case("pair", "categorical", 1).graph, build_case("chain", "categorical", 1).graph])
    with pytest.raises(ValueError, match="empty"):
        pc.Circuit([])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same(case: Any) -> None:
    other = copy.deepcopy(case.circuit).cuda()
    expected = case.circuit.log_prob(case.x, observed=case.observed)
    found = other.log_prob(case.x.cuda(), observed=case.observed.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-8, atol=1e-12)
    for circuit, loss in ((case.circuit, expected), (other, found)):
        (-loss.sum()).backward()
        pc.Anemone(circuit, lr=0.5, pseudocount=0.1).step()
    for first, second in zip(other.parameters(), case.circuit.parameters(), strict=True):
        torch.testing.assert_close(first.cpu(), second, rtol=1e-8, atol=1e-12)


def test_buffers_of_inference_mode_stay_in_it() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0, 0]), 2, pc.Categorical(3)))
    x = torch.tensor([[0, 1, 2], [2, 2, 0]])
    with torch.inference_mode():
        inside = circuit.log_prob(x).clone()
    with torch.no_grad():
        torch.testing.assert_close(circuit.log_prob(x), inside)
    circuit.log_prob(x).sum().backward()


def test_a_pass_holds_as_many_examples_as_its_values_leave_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    circuit = pc.Circuit([pc.hclt([-1, 0, 0], 4, pc.Bernoulli())] * 2)
    rows = circuit.plan.num_value_rows
    for room, expected in ((10 * rows, 10), (10 * rows - 1, 9), (rows - 1, 1)):
        monkeypatch.setitem(module.MAX_NUMBERS, "cpu", room)
        assert circuit.batch_limit == expected

"""Likelihoods and gradients of folded circuits against enumeration of their induced trees."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

EXACT = {"rtol": 1e-8, "atol": 1e-12}


def flows_by_gradient(circuit: pc.Circuit, loss: Tensor) -> list[pc.CircuitGraph]:
    """Graphs whose parameters are theta * gradient of the log-likelihood, after `loss.backward()`."""
    circuit.zero_grad()
    loss.backward()
    flows = copy.deepcopy(circuit)
    for flow, parameter in zip(flows.parameters(), circuit.parameters(), strict=True):
        flow.data.copy_(-parameter.detach() * parameter.grad)
    graphs = flows.to_graph()
    return graphs if isinstance(graphs, list) else [graphs]


def assert_flows(graph: pc.CircuitGraph, reference: Any, expected: dict[int, np.ndarray]) -> None:
    for index, flow in expected.items():
        node = graph.nodes[index]
        found = (node.weight if node.kind == "sum" else node.params).numpy()
        if isinstance(node.distribution, pc.Binomial):
            p, total = reference.params[index][:, 0], node.distribution.total
            flow = ((flow[:, 1] - total * p * flow[:, 0]) / (1 - p))[:, None]
        elif isinstance(node.distribution, pc.Gaussian | pc.DiscretizedLogistic):
            mean, spread = reference.params[index].T
            weight, first, second = flow[:, -3:].T  # sums of (r, r y, r y^2) of a normal y with precision r / spread^2
            square = second - 2 * mean * first + mean**2 * weight
            flow = np.stack([mean * (first - mean * weight) / spread**2, square / spread**2 - flow[:, 0]], 1)
        np.testing.assert_allclose(found, flow, rtol=1e-8, atol=1e-11)


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


def test_head_selects(case: Any) -> None:
    heads = torch.randint(0, case.graph.num_heads, (len(case.x),))
    every = case.circuit.log_prob(case.x)
    assert torch.equal(case.circuit.log_prob(case.x, head=heads), every.gather(1, heads[:, None])[:, 0])
    for head in range(case.graph.num_heads):
        assert torch.equal(case.circuit.log_prob(case.x, head=head), every[:, head])


def test_parameter_times_gradient_is_the_flow(case: Any) -> None:
    weights = torch.rand(len(case.x), case.graph.num_heads)
    loss = -(weights * case.circuit.log_prob(case.x, observed=case.observed)).sum()
    (graph,) = flows_by_gradient(case.circuit, loss)
    assert_flows(graph, case.reference, case.reference.flows(case.x, weights, case.observed))


def test_flow_under_one_head_per_example(case: Any) -> None:
    heads = torch.randint(0, case.graph.num_heads, (len(case.x),))
    weights = torch.rand(len(case.x))
    (graph,) = flows_by_gradient(case.circuit, -(weights * case.circuit.log_prob(case.x, head=heads)).sum())
    per_head = torch.nn.functional.one_hot(heads, case.graph.num_heads) * weights[:, None]
    assert_flows(graph, case.reference, case.reference.flows(case.x, per_head))


def test_gradients_of_two_passes_add_up(case: Any) -> None:
    half = len(case.x) // 2
    (case.circuit.log_prob(case.x[:half]).sum() + case.circuit.log_prob(case.x[half:]).sum()).backward()
    halves = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x[:half]).sum().backward()
    case.circuit.log_prob(case.x[half:]).sum().backward()
    apart = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x).sum().backward()
    for first, second, parameter in zip(halves, apart, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(second, parameter.grad, rtol=1e-9, atol=1e-11)


def test_a_pass_without_gradient_between_forward_and_backward_does_no_harm(case: Any) -> None:
    """Buffers are reused between passes: those a backward pass still needs must not be."""
    loss = case.circuit.log_prob(case.x).sum()
    with torch.no_grad():
        case.circuit.log_prob(case.x.flip(0))
    other = case.circuit.log_prob(case.x.flip(0))
    loss.backward()
    found = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    del other
    case.circuit.zero_grad()
    case.circuit.log_prob(case.x).sum().backward()
    for first, parameter in zip(found, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(first, parameter.grad, rtol=1e-9, atol=1e-11)


def test_a_graph_may_be_walked_back_twice(case: Any) -> None:
    loss = case.circuit.log_prob(case.x).sum()
    loss.backward(retain_graph=True)
    once = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    loss.backward()
    for first, parameter in zip(once, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(2 * first, parameter.grad, rtol=1e-10, atol=0)


def test_chunks_of_folds_do_not_show(case: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a layer runs in pieces that fit the cache; small circuits fit at once unless the cache is tiny."""
    weights = torch.rand(len(case.x), case.graph.num_heads)
    whole = case.circuit.log_prob(case.x, observed=case.observed)
    (weights * whole).sum().backward()
    expected = [parameter.grad.clone() for parameter in case.circuit.parameters()]
    case.circuit.zero_grad()
    monkeypatch.setattr("lvd_lightning.circuits.layers.CACHE_SIZE", 2 * len(case.x))
    found = case.circuit.log_prob(case.x, observed=case.observed)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=0)
    (weights * found).sum().backward()
    for gradient, parameter in zip(expected, case.circuit.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.float32])
def test_every_type_of_whole_numbers_is_read_alike(dtype: torch.dtype, discrete: Any) -> None:
    assert torch.equal(discrete.circuit.log_prob(discrete.x.to(dtype)), discrete.circuit.log_prob(discrete.x))


def test_empty_batch(case: Any) -> None:
    found = case.circuit.log_prob(case.x[:0])
    assert found.shape == (0, case.graph.num_heads)
    found.sum().backward()
    for parameter in case.circuit.parameters():
        assert parameter.grad is None or not parameter.grad.any()


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
            free = {pc.Gaussian: 2, pc.DiscretizedLogistic: 2, pc.Binomial: 1}.get(type(node.distribution))
            free = node.params.shape[1] - 1 if free is None else free
            expected += node.num_units * free
    assert case.circuit.num_parameters == expected


def test_number_of_parameters_of_an_hclt_by_hand() -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 0]), num_latents=4, leaf=pc.Categorical(256), num_heads=5)
    # three leaves of 4 units, two transition matrices, five root rows
    assert pc.Circuit(graph).num_parameters == 3 * 4 * 255 + 2 * 4 * 3 + 5 * 3


def test_logits_compute_the_same_and_learn(case: Any) -> None:
    circuit = pc.Circuit(case.graph, parameterization="logits")
    np.testing.assert_allclose(circuit.log_prob(case.x).detach(), case.reference.log_prob(case.x), **EXACT)
    optimizer = torch.optim.Adam(circuit.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -circuit.log_prob(case.x[:4]).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if case.x.dtype == torch.int64:
        np.testing.assert_allclose(circuit.log_prob(case.x).exp().sum(0).detach(), 1, **EXACT)


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.3, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("structure", ["sparse", "shared", "ragged"])
def test_structural_zeros_stay_under_gradient_optimizers(
    name: str, structure: str, build_case: Callable[..., Any]
) -> None:
    case = build_case(structure, "categorical", 2)
    circuit = pc.Circuit(case.graph, parameterization="logits").float()
    optimizer = OPTIMIZERS[name](circuit.parameters())
    for _ in range(10):
        optimizer.zero_grad()
        (-circuit.log_prob(case.x[:9]).sum()).backward()
        optimizer.step()
    zeros, moved = 0, 0.0
    for node, before in zip(circuit.to_graph().nodes, case.graph.nodes, strict=True):
        if node.kind == "sum" and node.mask is not None:
            assert not node.weight[~node.mask].any()
            zeros, moved = zeros + int((~node.mask).sum()), moved + float((node.weight - before.weight).abs().sum())
    assert zeros > 2
    assert moved > 0.1


@pytest.mark.parametrize(("structure", "leaf"), [("sparse", "categorical"), ("chain", "mixed")])
def test_gradient_of_logits(structure: str, leaf: str, build_case: Callable[..., Any]) -> None:
    case = build_case(structure, leaf, 2)
    circuit = pc.Circuit(case.graph, parameterization="logits")
    x = case.x[:7]
    circuit.log_prob(x).sum().backward()
    for parameter in circuit.parameters():
        flat = parameter.data.view(-1)
        for i in torch.randperm(len(flat))[:10].tolist():
            value, step, found = flat[i].item(), 1e-6, []
            for sign in (1, -1):
                flat[i] = value + sign * step
                found.append(circuit.log_prob(x).sum().item())
            flat[i] = value
            assert parameter.grad.view(-1)[i].item() == pytest.approx((found[0] - found[1]) / (2 * step), abs=1e-5)


# A batch of circuits.


@pytest.fixture
def folded(build_case: Callable[..., Any]) -> tuple[pc.Circuit, list[Any]]:
    """Different structures, widths and numbers of heads, over four variables."""
    names = (
        *(("chain", 1), ("star", 3), ("sparse", 2), ("shared", 1), ("tied", 2)),
        *(("rat", 2), ("rat-kronecker", 1), ("rectangles", 3), ("hmm", 1), ("mixed", 2), ("embedded", 1)),
        ("ragged", 4),
    )
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    return pc.Circuit([case.graph for case in cases]), cases


def test_batch_of_circuits(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    shared = cases[0].x
    found = circuit.log_prob(shared)
    assert found.shape == (len(cases), len(shared), 4)
    own = torch.stack([shared[torch.randperm(len(shared))[:9]] for _ in cases])
    observed = torch.rand(own.shape) < 0.5
    found_own = circuit.log_prob(own, observed=observed)
    assert found_own.shape == (len(cases), 9, 4)
    for g, case in enumerate(cases):
        heads = case.graph.num_heads
        np.testing.assert_allclose(found[g, :, :heads].detach(), case.reference.log_prob(shared), **EXACT)
        expected = case.reference.log_prob(own[g], observed[g])
        np.testing.assert_allclose(found_own[g, :, :heads].detach(), expected, **EXACT)
        assert (found[g, :, heads:] == -torch.inf).all()


def test_flows_of_a_batch_of_circuits(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    x = torch.randint(0, 3, (len(cases), 11, 4))
    heads = torch.stack([torch.randint(0, case.graph.num_heads, (11,)) for case in cases])
    weights = torch.rand(len(cases), 11)
    found = circuit.log_prob(x, head=heads)
    assert found.shape == (len(cases), 11)
    graphs = flows_by_gradient(circuit, -(weights * found).sum())
    for g, (graph, case) in enumerate(zip(graphs, cases, strict=True)):
        per_head = torch.nn.functional.one_hot(heads[g], case.graph.num_heads) * weights[g, :, None]
        assert_flows(graph, case.reference, case.reference.flows(x[g], per_head))


def test_absent_heads_leave_the_gradient_clean(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    found = circuit.log_prob(cases[0].x)
    torch.logsumexp(found, 2).sum().backward()  # a mixture over all heads, absent ones included
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())
    circuit.zero_grad()
    (found, weights) = circuit.log_prob(cases[0].x), torch.rand(len(cases), len(cases[0].x), 4)
    present = torch.tensor([[h < case.graph.num_heads for h in range(4)] for case in cases])[:, None]
    (graphs,) = [flows_by_gradient(circuit, -(weights * found.masked_fill(~present, 0)).sum())]
    for g, case in enumerate(cases):
        expected = case.reference.flows(cases[0].x, weights[g, :, : case.graph.num_heads])
        assert_flows(graphs[g], case.reference, expected)


def test_an_absent_head_of_one_circuit_is_impossible_without_nan(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    found = circuit.log_prob(cases[0].x, head=3)  # only the last circuit has four heads
    assert (found[:-1] == -torch.inf).all()
    weights = torch.zeros(found.shape)
    weights[-1] = 1.0
    found.backward(weights)
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_folded_circuits_round_trip(folded: tuple[pc.Circuit, list[Any]]) -> None:
    circuit, cases = folded
    x = cases[0].x
    graphs = circuit.to_graph()
    assert isinstance(graphs, list)
    assert len(graphs) == len(cases)
    assert torch.equal(pc.Circuit(graphs).log_prob(x), circuit.log_prob(x))
    assert circuit.num_parameters == sum(case.circuit.num_parameters for case in cases)
    for g, case in enumerate(cases):
        alone = pc.Circuit(graphs[g])
        torch.testing.assert_close(alone.log_prob(x), case.circuit.log_prob(x), rtol=1e-10, atol=0)


def test_a_list_of_one_graph_is_still_a_batch(build_case: Callable[..., Any]) -> None:
    case = build_case("chain", "categorical", 2)
    assert pc.Circuit([case.graph]).log_prob(case.x).shape == (1, len(case.x), 2)


# Soft evidence.


def evidence_tree(num_latents: int, num_heads: int) -> pc.CircuitGraph:
    return pc.hclt(torch.tensor([-1, 0, 0, 2]), num_latents, pc.SoftEvidence(3), num_heads)


def evidence_rat(num_leaves: int, num_heads: int, **settings: Any) -> pc.CircuitGraph:
    return pc.rat_spn(
        4, depth=2, num_repetitions=2, num_leaves=num_leaves, leaf=pc.SoftEvidence(3), num_heads=num_heads, **settings
    )


OVER_EVIDENCE: dict[str, Callable[[int], pc.CircuitGraph]] = {
    "direct": lambda heads: evidence_tree(3, heads),
    "emission": lambda heads: evidence_tree(2, heads),
    "rat-direct": lambda heads: evidence_rat(3, heads, num_sums=2, product="kronecker"),
    "rat-emission": lambda heads: evidence_rat(2, heads, num_sums=2),
    "homogeneous-direct": lambda heads: pc.hmm(4, 3, leaf=pc.SoftEvidence(3), homogeneous=True, num_heads=heads),
    "homogeneous-emission": lambda heads: pc.hmm(4, 2, leaf=pc.SoftEvidence(3), homogeneous=True, num_heads=heads),
}


@pytest.mark.parametrize("structure", OVER_EVIDENCE)
@pytest.mark.parametrize("num_heads", [1, 2])
def test_soft_evidence(structure: str, num_heads: int, enumerate_trees: Callable[..., Any]) -> None:
    graph = OVER_EVIDENCE[structure](num_heads)
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    evidence = (2 * torch.randn(6, 4, 3)).requires_grad_()
    observed = torch.rand(6, 4) < 0.7
    for mask in (None, observed):
        found = circuit.log_prob(evidence, observed=mask)
        np.testing.assert_allclose(found.detach(), reference.log_prob(evidence.detach(), mask), **EXACT)
    # p(z) is the circuit under one-hot evidence, and log p(e) = log sum_z p(z) prod_v e[v, z_v].
    worlds = torch.cartesian_prod(*[torch.arange(3)] * 4)
    hard = torch.nn.functional.one_hot(worlds, 3).double().log()
    log_prior = circuit.log_prob(hard)
    np.testing.assert_allclose(log_prior.exp().sum(0).detach(), 1, **EXACT)
    log_leaf = (
        evidence[:, None].expand(-1, 81, -1, -1).gather(3, worlds[None, :, :, None].expand(6, -1, -1, 1))[..., 0].sum(2)
    )
    joint = log_leaf[..., None] + log_prior
    torch.testing.assert_close(circuit.log_prob(evidence), joint.logsumexp(1), rtol=1e-8, atol=1e-12)
    # The gradient for the evidence is the posterior of z.
    (gradient,) = torch.autograd.grad(circuit.log_prob(evidence)[:, 0].sum(), evidence)
    posterior = joint[..., 0].softmax(1) @ torch.nn.functional.one_hot(worlds, 3).double().flatten(1)
    torch.testing.assert_close(gradient, posterior.view(6, 4, 3), rtol=1e-8, atol=1e-12)
    (gradient,) = torch.autograd.grad(circuit.log_prob(evidence, observed=observed)[:, 0].sum(), evidence)
    assert not gradient[~observed].any()
    np.testing.assert_allclose(gradient.sum(2)[observed].detach(), 1, **EXACT)


def test_a_frozen_prior_still_passes_gradients_on() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1)).requires_grad_(False)
    evidence = torch.randn(4, 2, 3, requires_grad=True)
    circuit.log_prob(evidence).sum().backward()
    torch.testing.assert_close(evidence.grad.sum(2), torch.ones(4, 2))
    assert all(parameter.grad is None for parameter in circuit.parameters())


def test_impossible_states_in_evidence(build_case: Callable[..., Any]) -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    evidence = torch.randn(4, 2, 3)
    evidence[0, 0, 1] = evidence[1, 1, :2] = evidence[2, 0] = -torch.inf
    evidence.requires_grad_()
    found = circuit.log_prob(evidence)[:, 0]
    assert found.isfinite().tolist() == [True, True, False, True]
    found[found.isfinite()].sum().backward()
    assert evidence.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())


def test_evidence_flows_into_a_network(build_case: Callable[..., Any]) -> None:
    """A prior over the heads of conditionals: the gradient of the whole passes both."""
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    conditional = build_case("chain", "categorical", 3)
    x = torch.randint(0, 3, (5, 2, 4))
    evidence = conditional.circuit.log_prob(x.view(10, 4)).view(5, 2, 3)
    prior.log_prob(evidence).sum().backward()
    gradients = [parameter.grad.clone() for parameter in conditional.circuit.parameters()]
    posterior = torch.autograd.functional.jacobian(lambda e: prior.log_prob(e)[:, 0].sum(), evidence.detach())
    conditional.circuit.zero_grad()
    (posterior.view(10, 3) * conditional.circuit.log_prob(x.view(10, 4))).sum().backward()
    for gradient, parameter in zip(gradients, conditional.circuit.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-9, atol=1e-12)


def test_a_batch_of_circuits_over_soft_evidence() -> None:
    graphs = [
        pc.hclt(torch.tensor(parents), 3, pc.SoftEvidence(3), heads) for parents, heads in (([-1, 0], 1), ([1, -1], 2))
    ]
    many, alone = pc.Circuit(graphs), [pc.Circuit(graph) for graph in graphs]
    evidence = torch.randn(5, 2, 3, requires_grad=True)
    (shared,) = torch.autograd.grad(many.log_prob(evidence, head=0).sum(), evidence)
    (expected,) = torch.autograd.grad(sum(one.log_prob(evidence, head=0).sum() for one in alone), evidence)
    torch.testing.assert_close(shared, expected)
    own = torch.randn(2, 5, 2, 3, requires_grad=True)
    (found,) = torch.autograd.grad(many.log_prob(own, head=0).sum(), own)
    (expected,) = torch.autograd.grad(sum(one.log_prob(own[g], head=0).sum() for g, one in enumerate(alone)), own)
    torch.testing.assert_close(found, expected)


# float32 where probabilities are extreme.


def extreme_circuits() -> list[Any]:
    return [pytest.param(*pair, id="-".join(pair)) for pair in itertools.product(EXTREME, ("comb", "bush"))]


def near_one_hot(graph: pc.CircuitGraph, rest: float = 1e-6) -> None:
    """State k emits category k, nearly always."""
    for node in graph.nodes:
        if node.kind == "input":
            eye = torch.eye(*node.params.shape, dtype=torch.float64)
            node.params = (eye * (1 - rest) + (1 - eye) * rest / (node.params.shape[1] - 1)).float()


def identity_transitions(graph: pc.CircuitGraph, off: float = 0.0) -> None:
    """States hardly (or never) change along the tree."""
    for index, node in enumerate(graph.nodes):
        if node.kind == "sum" and index != graph.root:
            eye = torch.eye(*node.weight.shape, dtype=torch.float64)
            node.weight = (eye * (1 - off) + (1 - eye) * off / (len(eye) - 1)).float()


EXTREME: dict[str, Callable[[pc.CircuitGraph], None]] = {
    "leaves": near_one_hot,
    "leaves-and-states": lambda graph: (near_one_hot(graph), identity_transitions(graph, 1e-6))[0],
    "exact-zeros": lambda graph: (near_one_hot(graph), identity_transitions(graph))[0],
    "sharp": lambda graph: (near_one_hot(graph, 1e-30), identity_transitions(graph, 1e-20))[0],
}


@pytest.mark.parametrize(("extreme", "tree"), extreme_circuits())
def test_single_precision_survives_leaves_that_disagree(
    extreme: str, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3,072 variables, half of which contradict the other half: float32 stays with float64."""
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr("lvd_lightning.circuits.layers.CACHE_SIZE", 500)  # several chunks per layer
    num_vars, num_states = 3072, 4
    v = torch.arange(num_vars)
    # a chain of spines that is 768 levels deep, or a binary tree
    parents = torch.where(v % 4 == 0, v - 4, v - v % 4).clamp_min(-1) if tree == "comb" else (v - 1) // 2
    parents[0] = -1
    graph = pc.hclt(parents, num_states, pc.Categorical(num_states), 2)
    EXTREME[extreme](graph)
    circuit = pc.Circuit(graph)
    x = torch.stack([v % num_states, (v >= num_vars // 2).long(), torch.zeros_like(v), v * 7 % 11 % num_states])
    double = copy.deepcopy(circuit).double()
    expected = double.log_prob(x)
    found = circuit.log_prob(x)
    assert expected.isfinite().all()
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    found[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    for single, reference in zip(circuit.parameters(), double.parameters(), strict=True):
        assert single.grad.isfinite().all()
        flow, wanted = single.detach() * single.grad, reference.detach() * reference.grad
        # Log-likelihoods reach 1e5 nats, where a float32 resolves 0.01: flows, their exponentials, are as uncertain.
        torch.testing.assert_close(flow.double(), wanted, rtol=1e-3, atol=2e-2)


@pytest.mark.parametrize("product", ["hadamard", "kronecker"])
@pytest.mark.parametrize("structure", ["rat", "rectangles"])
def test_single_precision_survives_disagreement_in_region_graphs(structure: str, product: Any) -> None:
    """768 variables whose halves contradict each other, below wide sums with many ways to split them."""
    torch.set_default_dtype(torch.float32)
    leaf, shape = pc.Categorical(4), (16, 16, 3)
    if structure == "rat":
        graph = pc.rat_spn(
            768, depth=6, num_repetitions=3, num_sums=4, num_leaves=4, leaf=leaf, num_heads=2, product=product
        )
    else:
        graph = pc.poon_domingos(shape, delta=4, num_units=4, leaf=leaf, num_heads=2, product=product)
    near_one_hot(graph)
    circuit = pc.Circuit(graph)
    double = copy.deepcopy(circuit).double()
    v = torch.arange(768)
    x = torch.stack([v % 4, (v % 256 >= 128).long(), torch.zeros_like(v), v * 7 % 11 % 4])
    found, expected = circuit.log_prob(x), double.log_prob(x)
    assert bool((expected.amin(0) < -2000).all())
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    found[:, 0].sum().backward()
    expected[:, 0].sum().backward()
    for single, reference in zip(circuit.parameters(), double.parameters(), strict=True):
        flow, wanted = single.detach() * single.grad, reference.detach() * reference.grad
        torch.testing.assert_close(flow.double(), wanted, rtol=1e-3, atol=2e-2)


def test_impossible_examples_are_minus_infinity_with_finite_gradients(build_case: Callable[..., Any]) -> None:
    graph = pc.hclt(torch.tensor([-1, 0, 1]), 2, pc.Categorical(2), 2)
    for node in graph.nodes:
        if node.kind == "input":
            node.params = torch.eye(2)
        elif node.num_units == 2 and node.weight is not None and node is not graph.nodes[graph.root]:
            node.weight = torch.eye(2)
    circuit = pc.Circuit(graph)
    x = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1]])
    found = circuit.log_prob(x)
    assert found.isfinite().all(1).tolist() == [True, False, True]
    # weight 0 is how ragged batches are padded, -inf or not
    found.backward(torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    assert all(parameter.grad.isfinite().all() for parameter in circuit.parameters())
    circuit.zero_grad()
    circuit.log_prob(x).sum().backward()  # and an impossible example has no flow
    (graph,) = flows_by_gradient(circuit, -circuit.log_prob(x).sum())
    assert graph.nodes[graph.root].weight.sum().item() == pytest.approx(4.0)


# Errors.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.tensor([[0, 1, 2, 3]])}, r"0\.\.2.*3"),
        ({"x": torch.tensor([[0, -1, 2, 1]])}, r"0\.\.2.*-1"),
        ({"x": torch.tensor([[0.0, 0.5, 2.0, 1.0]])}, "x"),
        ({"x": torch.tensor([[0.0, float("nan"), 2.0, 1.0]])}, "NaN"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, r"x.*4.*\(2, 3\)"),
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

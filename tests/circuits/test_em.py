"""The rules of CircuitEM and Anemone against NumPy, and where numbers get small."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_discrete_structures, few_structures, few_structures_and_a_batch
from helpers.em_steps import assert_parameters, optimizers, step
from torch import Tensor

import lvd_lightning.circuits as pc


def batches(case: Any, num_steps: int, num_examples: int = 13) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, masks, heads and weights of some steps; among them weight 0."""
    out = []
    for _ in range(num_steps):
        rows = torch.randint(0, len(case.x), (num_examples,))
        heads = torch.randint(0, case.graph.num_heads, (num_examples,))
        weights = torch.rand(num_examples) + 0.1
        weights[0] = 0.0
        out.append((case.x[rows], case.observed[rows], heads, weights))
    return out


def per_head(case: Any, heads: Tensor, weights: Tensor) -> np.ndarray:
    return (torch.nn.functional.one_hot(heads, case.graph.num_heads) * weights[:, None]).numpy()


@pytest.mark.parametrize(("lr", "pseudocount"), [(0.3, 0.5), (1.0, 0.0)])
def test_circuit_em(case: Any, lr: float, pseudocount: float) -> None:
    check_circuit_em(case, lr, pseudocount)


@few_structures
@pytest.mark.parametrize(("lr", "pseudocount"), [(0.3, 0.0), (1.0, 0.5)])
def test_circuit_em_with_other_settings(case: Any, lr: float, pseudocount: float) -> None:
    check_circuit_em(case, lr, pseudocount)


def check_circuit_em(case: Any, lr: float, pseudocount: float) -> None:
    optimizer = pc.CircuitEM(case.circuit, lr=lr, pseudocount=pseudocount)
    for x, observed, heads, weights in batches(case, 3):
        step(optimizer, -(weights * case.circuit.log_prob(x, head=heads, observed=observed)).sum())
        case.reference.em_step(case.reference.flows(x, per_head(case, heads, weights), observed), lr, pseudocount)
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("pseudocount", [0.0, 0.5])
def test_anemone(case: Any, anemone_reference: Callable[..., Any], pseudocount: float) -> None:
    check_anemone(case, anemone_reference, pseudocount)


@few_structures
def test_anemone_with_a_tiny_pseudocount(case: Any, anemone_reference: Callable[..., Any]) -> None:
    check_anemone(case, anemone_reference, 1e-6)


def check_anemone(case: Any, anemone_reference: Callable[..., Any], pseudocount: float) -> None:
    optimizer = pc.Anemone(case.circuit, lr=0.4, momentum=0.9, pseudocount=pseudocount)
    reference = anemone_reference([case.reference], 0.4, 0.9, pseudocount)
    for x, observed, heads, weights in batches(case, 4):
        step(optimizer, -(weights * case.circuit.log_prob(x, head=heads, observed=observed)).sum())
        shares = per_head(case, heads, weights)
        reference.step([case.reference.flows(x, shares, observed)], [shares.sum(0)])
        assert_parameters(case.circuit, [case.reference])


@pytest.mark.parametrize("rule", ["em", "anemone"])
def test_batch_of_circuits(rule: str, build_case: Callable[..., Any], anemone_reference: Callable[..., Any]) -> None:
    """Each circuit has its own examples and weights; Anemone's N is that of the whole batch."""
    names = (
        *(("chain", 2), ("star", 1), ("sparse", 3), ("tied", 1), ("shared", 2), ("ragged", 1)),
        *(("rat", 2), ("rectangles", 1), ("mixed", 2)),
    )
    cases = [build_case(name, "categorical", heads, seed) for seed, (name, heads) in enumerate(names)]
    circuit, references = pc.Circuit([case.graph for case in cases]), [case.reference for case in cases]
    if rule == "em":
        optimizer: torch.optim.Optimizer = pc.CircuitEM(circuit, lr=0.5, pseudocount=0.1)
    else:
        optimizer = pc.Anemone(circuit, lr=0.5, momentum=0.8, pseudocount=0.1)
        anemone = anemone_reference(references, 0.5, 0.8, 0.1)
    for _ in range(3):
        parts = [batches(case, 1)[0] for case in cases]
        x, observed, heads, weights = (torch.stack(part) for part in zip(*parts, strict=True))
        weights[1] = 0.0  # a circuit without examples
        step(optimizer, -(weights * circuit.log_prob(x, head=heads, observed=observed)).sum())
        shares = [per_head(case, heads[g], weights[g]) for g, case in enumerate(cases)]
        flows = [r.flows(x[g], shares[g], observed[g]) for g, r in enumerate(references)]
        if rule == "em":
            for reference, flow in zip(references, flows, strict=True):
                reference.em_step(flow, 0.5, 0.1)
        else:
            anemone.step(flows, [share.sum(0) for share in shares])
        assert_parameters(circuit, references)


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_what_has_no_flow_keeps_its_parameters(kind: int, build_case: Callable[..., Any]) -> None:
    """A head that is not used, a unit that no edge leads to, and a variable that nobody observes."""
    case = build_case("sparse", "categorical", 3)
    observed = torch.ones(case.x.shape, dtype=torch.bool)
    observed[:, 2] = False
    before = case.circuit.to_graph()
    optimizer = optimizers(case.circuit)[kind]
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(case.x, head=1, observed=observed).sum())
    after = case.circuit.to_graph()
    flows = case.reference.flows(case.x, np.eye(3)[[1] * len(case.x)], observed.numpy())
    stayed = moved = 0
    for index, flow in flows.items():
        for unit, total in enumerate(flow.sum(1)):
            pair = [
                (n.weight if n.kind == "sum" else n.params)[unit] for n in (before.nodes[index], after.nodes[index])
            ]
            assert torch.equal(*pair) == (total == 0) or (pair[0] > 0).sum() == 1
            stayed, moved = stayed + (total == 0), moved + (total > 0)
    assert stayed > 3
    assert moved > 3


@few_discrete_structures
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_structural_zeros_stay_and_rows_stay_normalised(kind: int, discrete: Any) -> None:
    optimizer = optimizers(discrete.circuit)[kind]
    for _ in range(3):
        step(optimizer, -discrete.circuit.log_prob(discrete.x).sum())
    for node in discrete.circuit.to_graph().nodes:
        if node.kind == "sum":
            assert node.mask is None or not node.weight[~node.mask].any()
            torch.testing.assert_close(node.weight.sum(1), torch.ones(node.num_units))
    np.testing.assert_allclose(discrete.circuit.log_prob(discrete.x).exp().sum(0).detach(), 1, rtol=1e-8)


def test_full_batch_em_never_lowers_the_likelihood(case: Any) -> None:
    check_monotonicity(case, share_observed=0.7)


@few_structures
def test_full_batch_em_never_lowers_the_likelihood_of_complete_examples(case: Any) -> None:
    check_monotonicity(case)


def check_monotonicity(case: Any, share_observed: float | None = None) -> None:
    x = case.x[torch.randint(0, len(case.x), (30,))]
    observed = None if share_observed is None else torch.rand(x.shape) < share_observed
    heads = torch.randint(0, case.graph.num_heads, (30,))
    optimizer = pc.CircuitEM(case.circuit, lr=1.0, pseudocount=0.0)
    values, gains = [], []
    for _ in range(15):
        loss = -case.circuit.log_prob(x, head=heads, observed=observed).sum()
        values.append(-loss.item())
        loss.backward()
        priors = prior_counts(case.circuit)
        before = values[-1] + log_prior(case.circuit, priors)
        optimizer.step()
        optimizer.zero_grad()
        after = case.circuit.log_prob(x, head=heads, observed=observed).sum().item()
        gains.append(after + log_prior(case.circuit, priors) - before)
    assert min(gains) > -1e-7
    assert values[-1] > values[0]


def prior_counts(circuit: pc.Circuit) -> dict[int, Tensor]:
    """What the priors of tables add to the flows that the last backward pass has left: held fixed for one step."""
    priors = [group.distribution and group.distribution.prior for group in circuit.plan.groups]
    return {
        number: prior.pseudocounts(-circuit.tables[number].detach() * circuit.tables[number].grad)
        for number, prior in enumerate(priors)
        if prior is not None
    }


def log_prior(circuit: pc.Circuit, priors: dict[int, Tensor]) -> float:
    """The sum of a_v log theta_v."""
    return sum(torch.xlogy(counts, circuit.tables[number].detach()).sum().item() for number, counts in priors.items())


@few_structures_and_a_batch
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_a_weight_counts_like_repetition(kind: int, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    rules = [optimizers(circuit)[kind] for circuit in (case.circuit, other)]
    for _ in range(2):
        counts = torch.randint(0, 4, (len(case.x),))
        step(rules[0], -(counts * case.circuit.log_prob(case.x, head=0)).sum())
        step(rules[1], -other.log_prob(case.x.repeat_interleave(counts, 0), head=0).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@few_structures
def test_full_batch_em_in_parts(case: Any) -> None:
    """Gradients of a whole data set, gathered part by part, and one step of size 1: the step in NumPy on all of it."""
    optimizer = pc.CircuitEM(case.circuit, lr=1.0, pseudocount=0.0)
    for _ in range(2):
        for x, observed in zip(case.x.split(5), case.observed.split(5), strict=True):
            (-case.circuit.log_prob(x, observed=observed).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shares = np.ones((len(case.x), case.graph.num_heads))
        case.reference.em_step(case.reference.flows(case.x, shares, case.observed), 1.0, 0.0)
        assert_parameters(case.circuit, [case.reference])


@few_structures
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_missing_values_may_be_anything(kind: int, case: Any, anemone_reference: Callable[..., Any]) -> None:
    """Learning with variables left out, whatever stands in their place, is EM in NumPy with them summed out."""
    junk = torch.tensor([torch.nan, torch.inf, -7.0, 1e30, 0.5])
    x = torch.where(case.observed, case.x.double(), junk[torch.arange(case.x.numel()).view(case.x.shape) % 5])
    optimizer, anemone = optimizers(case.circuit)[kind], anemone_reference([case.reference], 0.7, 0.9, 0.5)
    shares = np.ones((len(x), case.graph.num_heads))
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(x, observed=case.observed).sum())
        flows = case.reference.flows(case.x, shares, case.observed)
        if kind == 0:
            case.reference.em_step(flows, 0.7, 0.5)
        else:
            anemone.step([flows], [shares.sum(0)])
        assert_parameters(case.circuit, [case.reference])


def test_a_category_that_was_nearly_forgotten_comes_back() -> None:
    """Without pseudocounts a probability halves with every step that lacks its category, down to a denormal number."""
    torch.set_default_dtype(torch.float32)
    for kind in (pc.CircuitEM, pc.Anemone):
        for rare in (1e-36, 1e-38, 1e-41):
            graph = pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(3), 1)
            for node in graph.nodes:
                if node.kind == "input":
                    node.params = torch.tensor([[0.5, 0.5, rare], [0.3, 0.7, rare]])
            circuit = pc.Circuit(graph)
            step(kind(circuit, lr=0.5, pseudocount=0.0), -circuit.log_prob(torch.full((64, 2), 2)).sum())
            for node in circuit.to_graph().nodes:
                if node.kind == "input":
                    torch.testing.assert_close(node.params.sum(1), torch.ones(2), rtol=1e-5, atol=0)
                    assert (node.params[:, 2] > 0.4).any()


def test_a_deviation_has_a_floor() -> None:
    graph = pc.hclt(torch.tensor([-1]), 1, pc.Gaussian(min_std=0.01), 1)
    circuit = pc.Circuit(graph)
    optimizer = pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0)
    for _ in range(3):
        step(optimizer, -circuit.log_prob(torch.full((5, 1), 0.3)).sum())
    torch.testing.assert_close(circuit.to_graph().nodes[0].params, torch.tensor([[0.3, 0.01]]))


def test_tiny_pseudocounts_keep_single_precision_finite() -> None:
    """Leaves that have become one-hot meet a category they had never seen."""
    torch.set_default_dtype(torch.float32)
    for kind in (pc.CircuitEM, pc.Anemone):
        circuit = pc.Circuit(pc.hclt(torch.arange(200) - 1, 4, pc.Categorical(64), 1))
        optimizer = kind(circuit, lr=1.0, pseudocount=1e-6)
        for value in (3, 3, 60, 7):
            step(optimizer, -circuit.log_prob(torch.full((8, 200), value)).sum())
            assert all(parameter.isfinite().all() for parameter in circuit.parameters())
        found = circuit.log_prob(torch.tensor([[3] * 200, [60] * 200, [5] * 200]))
        assert found.isfinite().all()
        torch.testing.assert_close(
            found.double(),
            copy.deepcopy(circuit).double().log_prob(torch.tensor([[3] * 200, [60] * 200, [5] * 200])),
            rtol=1e-4,
            atol=1e-3,
        )

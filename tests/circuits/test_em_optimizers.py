"""CircuitEM and Anemone as optimizers: gradients that add up, states, groups, schedulers, bad settings."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.cases import few_structures, few_structures_and_a_batch
from helpers.em_steps import assert_parameters, optimizers, step

import lvd_lightning.circuits as pc


@few_structures_and_a_batch
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_a_step_without_examples_changes_nothing(kind: int, case: Any) -> None:
    before = [parameter.detach().clone() for parameter in case.circuit.parameters()]
    step(optimizers(case.circuit)[kind], -case.circuit.log_prob(case.x[:0]).sum())
    for first, second in zip(before, case.circuit.parameters(), strict=True):
        assert torch.equal(first, second)


@few_structures_and_a_batch
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_flows_accumulate_over_backward_passes(kind: int, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    half = len(case.x) // 3
    (-case.circuit.log_prob(case.x[:half]).sum()).backward()
    with torch.no_grad():
        case.circuit.log_prob(case.x)  # a validation pass in between leaves no trace
    step(optimizers(case.circuit)[kind], -case.circuit.log_prob(case.x[half:]).sum())
    step(optimizers(other)[kind], -other.log_prob(case.x).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@few_structures_and_a_batch
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
@pytest.mark.parametrize("who", ["optimizer", "module"])
def test_zero_grad_forgets_flows(kind: int, who: str, case: Any) -> None:
    other = copy.deepcopy(case.circuit)
    optimizer = optimizers(case.circuit)[kind]
    (-case.circuit.log_prob(case.x[:3]).sum()).backward()
    (optimizer if who == "optimizer" else case.circuit).zero_grad()
    step(optimizer, -case.circuit.log_prob(case.x[3:]).sum())
    step(optimizers(other)[kind], -other.log_prob(case.x[3:]).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(first, second, rtol=1e-9, atol=1e-12)


@few_structures_and_a_batch
@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_an_interrupted_optimizer_continues_bit_for_bit(kind: int, case: Any, tmp_path: Path) -> None:
    optimizer = optimizers(case.circuit)[kind]
    for _ in range(2):
        step(optimizer, -case.circuit.log_prob(case.x).sum())
    torch.save({"circuit": case.circuit.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = pc.Circuit(case.graph)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(state["circuit"])
    resumed = optimizers(other)[kind]
    resumed.load_state_dict(state["optimizer"])
    for circuit, rule in ((case.circuit, optimizer), (other, resumed)):
        step(rule, -circuit.log_prob(case.x[::2]).sum())
    for first, second in zip(case.circuit.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("leaf", ["gaussian", "binomial", "logistic", "mixed"])
def test_single_precision_is_continued_bit_for_bit(leaf: str, build_case: Callable[..., Any]) -> None:
    """Averaged statistics of inputs are double precision, also where parameters are not."""
    case = build_case("shared", leaf, 1)
    circuit = case.circuit.float()
    optimizer = pc.Anemone(circuit)
    for part in case.x.float().split(3)[:3]:
        step(optimizer, -circuit.log_prob(part).sum())
    other = copy.deepcopy(circuit)
    resumed = pc.Anemone(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for found, rule in ((circuit, optimizer), (other, resumed)):
        step(rule, -found.log_prob(case.x.float()).sum())
    for first, second in zip(circuit.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_groups_have_step_sizes_of_their_own(rule: type, build_case: Callable[..., Any]) -> None:
    """Two circuits in one optimizer learn as under two; its state holds the step sizes that a scheduler has changed."""
    cases, rates = [build_case("chain", "mixed", 1), build_case("sparse", "categorical", 2)], (0.7, 0.2)
    alone = [copy.deepcopy(case.circuit) for case in cases]
    optimizer = rule([{"params": case.circuit, "lr": lr} for case, lr in zip(cases, rates, strict=True)])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda epoch: 0.5**epoch, lambda epoch: 0.9**epoch])
    rules = [rule(circuit, lr=lr) for circuit, lr in zip(alone, rates, strict=True)]
    for number in range(4):
        if number == 2:  # an interruption
            state, learnt = copy.deepcopy(optimizer.state_dict()), [copy.deepcopy(case.circuit) for case in cases]
            optimizer = rule([{"params": circuit} for circuit in learnt])
            optimizer.load_state_dict(state)
            for case, circuit in zip(cases, learnt, strict=True):
                case.circuit = circuit
        step(optimizer, -sum(case.circuit.log_prob(case.x[number:]).sum() for case in cases))
        for case, circuit, one in zip(cases, alone, rules, strict=True):
            step(one, -circuit.log_prob(case.x[number:]).sum())
        if number == 0:
            scheduler.step()
            for one, factor in zip(rules, (0.5, 0.9), strict=True):
                one.param_groups[0]["lr"] *= factor
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.35, 0.18])
    for case, circuit in zip(cases, alone, strict=True):
        for first, second in zip(case.circuit.parameters(), circuit.parameters(), strict=True):
            torch.testing.assert_close(first, second, rtol=1e-12, atol=0)


@few_structures
def test_learning_rate_schedulers_set_the_step(case: Any) -> None:
    optimizer = pc.CircuitEM(case.circuit, lr=0.8, pseudocount=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    shares = np.ones((len(case.x), case.graph.num_heads))
    for epoch in range(3):
        step(optimizer, -case.circuit.log_prob(case.x).sum())
        scheduler.step()
        case.reference.em_step(case.reference.flows(case.x, shares), 0.8 * 0.5**epoch, 0.1)
    assert_parameters(case.circuit, [case.reference])


def test_every_circuit_of_a_module_learns(build_case: Callable[..., Any]) -> None:
    """A prior over a conditional: one loss, one optimizer, the flows of the conditional are posteriors."""
    conditional = build_case("chain", "categorical", 3)
    prior = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), 1))
    module = torch.nn.ModuleDict({"prior": prior, "conditional": conditional.circuit})
    x = torch.randint(0, 3, (40, 2, 4))
    optimizer = pc.CircuitEM(module, lr=1.0, pseudocount=0.0)
    values = []
    for _ in range(10):
        evidence = conditional.circuit.log_prob(x.view(80, 4)).view(40, 2, 3)
        loss = -prior.log_prob(evidence).sum()
        values.append(-loss.item())
        step(optimizer, loss)
    assert (np.diff(values) > -1e-8).all()
    assert values[-1] > values[0] + 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": 0.0}, "lr"), ({"lr": 1.5}, "lr"), ({"pseudocount": -1.0}, "pseudocount")],
)
def test_bad_settings_are_named(settings: dict[str, float], message: str, build_case: Callable[..., Any]) -> None:
    for kind in (pc.CircuitEM, pc.Anemone):
        with pytest.raises(ValueError, match=message):
            kind(build_case("pair", "categorical", 1).circuit, **settings)
    with pytest.raises(ValueError, match="momentum"):
        pc.Anemone(build_case("pair", "categorical", 1).circuit, momentum=1.0)


def test_a_module_without_circuits_is_refused() -> None:
    with pytest.raises(ValueError, match="Circuit"):
        pc.CircuitEM(torch.nn.Linear(2, 2))


def test_tensors_are_refused(build_case: Callable[..., Any]) -> None:
    circuit = build_case("pair", "categorical", 1).circuit
    for given in (circuit.parameters(), [{"params": list(circuit.parameters())}], [{"lr": 0.1}]):
        with pytest.raises(ValueError, match="Anemone: got .*expected a module"):
            pc.Anemone(given)


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
@pytest.mark.parametrize(
    ("name", "value"),
    [("lr", 5.0), ("lr", -0.1), ("lr", float("nan")), ("lr", "0.1"), ("pseudocount", -1.0), ("pseudocount", None)],
)
def test_settings_that_change_are_checked_at_the_step(
    kind: int, name: str, value: Any, build_case: Callable[..., Any]
) -> None:
    case = build_case("pair", "categorical", 1)
    optimizer = optimizers(case.circuit)[kind]
    before = [parameter.detach().clone() for parameter in case.circuit.parameters()]
    case.circuit.log_prob(case.x).sum().neg().backward()
    optimizer.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"{name}: got .*expected a number"):
        optimizer.step()
    assert all(map(torch.equal, before, case.circuit.parameters()))


@pytest.mark.parametrize("momentum", [1.0, -0.5, "0.9", float("nan")])
def test_momentum_is_checked_at_the_step(momentum: Any, build_case: Callable[..., Any]) -> None:
    case = build_case("pair", "categorical", 1)
    optimizer = pc.Anemone(case.circuit)
    case.circuit.log_prob(case.x).sum().neg().backward()
    optimizer.param_groups[0]["momentum"] = momentum
    with pytest.raises(ValueError, match="momentum: got"):
        optimizer.step()
    with pytest.raises(ValueError, match="momentum: got"):
        pc.Anemone(case.circuit, momentum=momentum)


def test_a_schedule_may_pass_through_0(build_case: Callable[..., Any]) -> None:
    """As a warm-up does that starts there."""
    case = build_case("pair", "categorical", 1)
    optimizer = pc.CircuitEM(case.circuit, lr=0.5)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: min(epoch, 1))
    before = [parameter.detach().clone() for parameter in case.circuit.parameters()]
    step(optimizer, -case.circuit.log_prob(case.x).sum())
    assert all(map(torch.equal, before, case.circuit.parameters()))
    scheduler.step()
    step(optimizer, -case.circuit.log_prob(case.x).sum())
    assert not all(map(torch.equal, before, case.circuit.parameters()))


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
def test_groups_cannot_be_added_later(kind: int, build_case: Callable[..., Any]) -> None:
    first, second = (build_case("pair", "categorical", heads).circuit for heads in (1, 2))
    optimizer = optimizers(first)[kind]
    for group in ({"params": second}, {"params": list(second.parameters())}):
        with pytest.raises(ValueError, match=f"{type(optimizer).__name__}: .*make a new optimizer over all modules"):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == len(optimizer.circuits) == 1


@pytest.mark.parametrize("kind", [0, 1], ids=["em", "anemone"])
@pytest.mark.parametrize("leaf", ["categorical", "gaussian"])
def test_copies_go_on_alone(kind: int, leaf: str, build_case: Callable[..., Any]) -> None:
    """A circuit and its optimizer copied together belong together; an optimizer copied alone has a copied circuit."""
    case = build_case("pair", leaf, 1)
    circuit, optimizer = case.circuit, optimizers(case.circuit)[kind]
    step(optimizer, -circuit.log_prob(case.x).sum())
    copied, rule = copy.deepcopy((circuit, optimizer))
    lonely = copy.deepcopy(optimizer)
    assert rule.circuits[0] is copied
    assert lonely.circuits[0] is not circuit
    step(optimizer, -circuit.log_prob(case.x[::2]).sum())
    for other in (rule, lonely):
        before = [parameter.detach().clone() for parameter in other.circuits[0].parameters()]
        step(other, -other.circuits[0].log_prob(case.x[::2]).sum())
        assert not all(map(torch.equal, before, other.circuits[0].parameters()))
        assert all(map(torch.equal, circuit.parameters(), other.circuits[0].parameters()))

"""NaN and infinity in a loss, a weight or a batch, and then an EM step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import bad_flows

RULES = {"em": pc.CircuitEM, "anemone": pc.Anemone}
LEAVES = {
    "categorical": pc.Categorical(3),
    "gaussian": pc.Gaussian(),
    "binomial": pc.Binomial(2),
    "logistic": pc.DiscretizedLogistic(3),
}


def model(leaf: str = "categorical", num_heads: int = 1) -> tuple[pc.Circuit, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(3, (10, 3), generator=generator)
    graph = pc.hclt([-1, 0, 1], 4, LEAVES[leaf], num_heads=num_heads, generator=generator)
    return pc.Circuit(graph), x.double() if leaf == "gaussian" else x


def backward(circuit: pc.Circuit, x: Tensor, poison: float = 1.0) -> None:
    weights = torch.ones(len(x), circuit.num_heads)
    weights[6, -1] = poison
    (-(weights * circuit.log_prob(x)).sum()).backward()


def tables_of(circuit: pc.Circuit) -> list[Tensor]:
    return [table.detach().clone() for table in circuit.tables]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_weight_is_refused_with_its_example(rule: str, leaf: str, poison: float) -> None:
    """Nothing moves, moving averages neither; what follows is as if the step had not been tried."""
    circuit, x = model(leaf, num_heads=2)
    twin = copy.deepcopy(circuit)
    optimizer, other = RULES[rule](circuit), RULES[rule](twin)
    for found, step in ((circuit, optimizer), (twin, other)):
        backward(found, x)
        step.step()
        step.zero_grad()
    before = tables_of(circuit)
    backward(circuit, x, poison)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"step is refused, .*first of example 6 under head 1; .*zero_grad"):
            optimizer.step()
        assert all(map(torch.equal, before, circuit.tables))
    for found, step in ((circuit, optimizer), (twin, other)):
        step.zero_grad()
        backward(found, x)
        step.step()
    assert all(map(torch.equal, circuit.tables, twin.tables))


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_loss_names_its_first_example(rule: str) -> None:
    circuit, x = model()
    loss = -circuit.log_prob(x).sum() * torch.tensor(torch.nan)
    loss.backward()
    with pytest.raises(ValueError, match=r"example 0 under head 0;"):
        RULES[rule](circuit).step()


def test_of_several_circuits_the_one_is_named_and_none_moves() -> None:
    graphs = [pc.hclt([-1, 0], 2, pc.Categorical(3), num_heads=2) for _ in range(3)]
    many, (alone, x) = pc.Circuit(graphs), model()
    module = torch.nn.ModuleList([alone, many])
    optimizer = pc.CircuitEM(module)
    before = [tables_of(alone), tables_of(many)]
    weights = torch.ones(3, 5)
    weights[2, 3] = torch.nan
    backward(alone, x)
    (-(weights * many.log_prob(torch.randint(3, (5, 2)), head=1)).sum()).backward()
    with pytest.raises(ValueError, match="example 3 under head 1 of circuit 2;"):
        optimizer.step()
    assert all(map(torch.equal, before[0] + before[1], [*alone.tables, *many.tables]))


def test_a_nan_between_prior_and_conditionals() -> None:
    """What a network or another circuit hands on is refused where it comes in, or as a gradient."""
    prior = pc.Circuit(pc.hclt([-1, 0], 3, pc.SoftEvidence(3)))
    evidence = torch.zeros(4, 2, 3)
    evidence[1, 1, 1] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        prior.log_prob(evidence)


def test_gradients_that_others_spoiled() -> None:
    """Clipping by a norm that is infinite: no example can be named, but a place can."""
    circuit, x = model(num_heads=2)
    optimizer = pc.CircuitEM(circuit)
    backward(circuit, x)
    torch.nn.utils.clip_grad_norm_([torch.nn.Parameter(torch.ones(1)), *circuit.parameters()], 1e-3)
    optimizer.step()
    backward(circuit, x)
    circuit.tables[0].grad.fill_(torch.inf)
    torch.nn.utils.clip_grad_norm_(circuit.parameters(), torch.inf)
    with pytest.raises(ValueError, match=r"first of head 0;"):
        optimizer.step()


def test_sums_for_em_that_overflow() -> None:
    """Their gradients are finite: the square of a value is not."""
    circuit, x = model("gaussian")
    backward(circuit, x)
    (statistics,) = circuit.engine.statistics.values()
    statistics[2, 1, 2] = torch.inf
    with pytest.raises(ValueError, match=r"first of unit 1 of node \d+;"):
        pc.Anemone(circuit).step()


def test_impossible_examples_and_sums_that_overflow_are_no_reason() -> None:
    graph = pc.CircuitGraph()
    leaf = graph.add_input(0, pc.Categorical(3), 2, params=[[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    graph.add_sum([leaf], 1)
    circuit = pc.Circuit(graph)
    optimizer = pc.CircuitEM(circuit)
    loss = -circuit.log_prob(torch.tensor([[0], [2]])).sum()
    assert loss.item() == torch.inf
    loss.backward()
    optimizer.step()
    circuit.tables[0].grad.fill_(-1e308)
    optimizer.step()
    assert all(table.isfinite().all() for table in circuit.tables)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("leaf", LEAVES)
def test_on_a_gpu_the_step_goes_without_flow_and_is_told_later(
    rule: str, leaf: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bad_flows, "is_late", lambda device: True)
    circuit, x = model(leaf)
    optimizer = RULES[rule](circuit)
    backward(circuit, x)
    optimizer.step()
    circuit.check_inputs()
    before = tables_of(circuit)
    optimizer.zero_grad()
    backward(circuit, x, torch.nan)
    optimizer.step()
    assert all(table.isfinite().all() for table in circuit.tables)
    if rule == "em":
        assert all(map(torch.equal, before, circuit.tables))
    with pytest.raises(ValueError, match=r"EM: gradients hold NaN or infinity .*earlier batch"):
        circuit.log_prob(x)
    optimizer.zero_grad()
    backward(circuit, x)
    optimizer.step()
    circuit.check_inputs()
    assert not any(map(torch.equal, before, circuit.tables))

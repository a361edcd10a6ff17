"""Parameters that something else than EM changed to what are none, or that were asked to be of another type."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import parameters

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda tables: torch.optim.Adam(tables, lr=1e-3),
    "adam-foreach": lambda tables: torch.optim.Adam(tables, lr=1e-3, foreach=True),
    "adam-fused": lambda tables: torch.optim.Adam(tables, lr=1e-3, fused=True),
    "adamw": lambda tables: torch.optim.AdamW(tables, lr=1e-3),
    "sgd": lambda tables: torch.optim.SGD(tables, lr=1e-3),
    "lbfgs": lambda tables: torch.optim.LBFGS(tables, lr=1e-3),
}
REFUSED = r"^Circuit: parameters were changed, not by EM .*parameterization='logits'"


def model(leaf: pc.Distribution = pc.Categorical(8)) -> tuple[pc.Circuit, Tensor]:  # noqa: B008 (it is immutable)
    x = torch.randint(2, (20, 3))
    return pc.Circuit(pc.hclt([-1, 0, 1], 4, leaf)), x if leaf.is_whole else x.double()


def gradient_step(circuit: pc.Circuit, x: Tensor, name: str) -> None:
    optimizer = OPTIMIZERS[name](list(circuit.parameters()))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -circuit.log_prob(x).sum()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("leaf", [pc.Categorical(8), pc.Gaussian()])
def test_one_step_of_a_gradient_optimizer_is_noticed(name: str, leaf: pc.Distribution) -> None:
    circuit, x = model(leaf)
    if name != "lbfgs":  # which asks for the loss after its own first move
        gradient_step(circuit, x, name)
    with pytest.raises(ValueError, match=REFUSED):
        gradient_step(circuit, x, name)


def test_every_query_refuses_what_are_no_probabilities() -> None:
    circuit, x = model()
    flows = pc.Flows(circuit)
    gradient_step(circuit, x, "adam")
    queries: list[Callable[[], Any]] = [
        lambda: circuit.log_prob(x),
        lambda: circuit.sample(3),
        lambda: circuit.mpe(x),
        lambda: circuit.posterior(x, 0),
        lambda: flows.add(x),
    ]
    for query in queries * 2:
        with pytest.raises(ValueError, match=REFUSED):
            query()


@pytest.mark.parametrize("layout", ["dense", "sparse"])
def test_drift_too_small_for_one_step_is_noticed_later(layout: Any, build_case: Callable[..., Any]) -> None:
    case = build_case("sparse", "categorical", 2)
    circuit = pc.Circuit(case.graph, layout=layout)
    optimizer = torch.optim.SGD(circuit.parameters(), lr=1e-6)

    def train(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            (-circuit.log_prob(case.x).sum()).backward()
            optimizer.step()

    train(1)
    with pytest.raises(ValueError, match=REFUSED):
        train(1000)


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        (pc.Categorical(2), -0.1, "non-negative and sum to one"),
        (pc.Categorical(2), torch.nan, "non-negative and sum to one"),
        (pc.Gaussian(), -1.0, "positive std"),
        (pc.Gaussian(), torch.nan, "finite"),
        (pc.Binomial(2), 1.5, r"probabilities of a success in \[0, 1\]"),
        (pc.DiscretizedLogistic(4), 0.0, "positive scale"),
    ],
)
def test_numbers_that_are_no_parameters(leaf: pc.Distribution, value: float, message: str) -> None:
    circuit, x = model(leaf)
    with torch.no_grad():
        circuit.tables[0][..., -1] = value
    with pytest.raises(ValueError, match=f"{REFUSED}.*{message}"):
        circuit.log_prob(x)


def test_right_numbers_are_welcome_whoever_wrote_them(tmp_path: Any) -> None:
    circuit, x = model()
    other, _ = model()
    expected = other.log_prob(x)
    with torch.no_grad():
        for table, source in zip(circuit.tables, other.tables, strict=True):
            table.copy_(source)
    assert torch.equal(circuit.log_prob(x), expected)
    for assign in (False, True):
        circuit, _ = model()
        circuit.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
        assert torch.equal(circuit.log_prob(x), expected)
    assert torch.equal(copy.deepcopy(other).log_prob(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(other)).log_prob(x), expected)
    file = io.BytesIO()
    torch.save(other, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).log_prob(x), expected)
    torch.testing.assert_close(other.float().log_prob(x), expected.float())
    with torch.inference_mode():
        made, _ = model()
        made.log_prob(x)
    with torch.no_grad():
        made.log_prob(x)
    circuit, _ = model()
    circuit.load_state_dict({key: 2 * value for key, value in circuit.state_dict().items()})
    with pytest.raises(ValueError, match=REFUSED):
        circuit.log_prob(x)
    circuit.load_state_dict(made.state_dict())
    with torch.no_grad():
        assert torch.equal(circuit.log_prob(x), made.log_prob(x))


def test_functional_call_takes_any_numbers() -> None:
    """Perturbed ones give gradients by differences."""
    circuit, x = model()
    doubled = {name: 2 * table.detach() for name, table in circuit.named_parameters()}
    found = torch.func.functional_call(circuit, doubled, (x,))
    assert (found > circuit.log_prob(x)).all()


@pytest.mark.parametrize("rule", [pc.CircuitEM, pc.Anemone])
def test_an_em_step_costs_no_look_at_the_numbers(rule: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    circuit, x = model()
    looks = []
    monkeypatch.setattr(parameters, "_check_values", lambda *arguments: looks.append(arguments))
    optimizer = rule(circuit, lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (-circuit.log_prob(x).sum()).backward()
        optimizer.step()
    circuit.sample(2)
    assert not looks
    with torch.no_grad():
        circuit.tables[1].mul_(1)
    for _ in range(2):
        circuit.log_prob(x)
    assert len(looks) == 1


def test_logits_are_free() -> None:
    graph = pc.hclt([-1, 0, 1], 4, pc.Categorical(8))
    circuit, x = pc.Circuit(graph, parameterization="logits"), torch.randint(2, (20, 3))
    gradient_step(circuit, x, "adam")
    circuit.log_prob(x)


@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.float16),
        lambda module: module.to("cpu", torch.bfloat16),
        lambda module: module.to(torch.zeros(1, dtype=torch.float16)),
        lambda module: module.type(torch.float16),
    ],
)
@pytest.mark.parametrize("parameterization", ["probabilities", "logits"])
def test_other_types_are_refused_in_one_sentence(convert: Callable[[nn.Module], Any], parameterization: Any) -> None:
    circuit = pc.Circuit(pc.hclt([-1, 0], 2, pc.Categorical(3)), parameterization=parameterization)
    x = torch.tensor([[0, 2]])
    before = circuit.log_prob(x)
    for module in (circuit, nn.ModuleDict({"prior": circuit})):
        with pytest.raises(ValueError, match=r"^Circuit: parameters are float32 or float64, got torch\.\w+, .*bf16"):
            convert(module)
    assert torch.equal(circuit.log_prob(x), before)
    for kind in (torch.float32, torch.float64):
        assert circuit.to(kind).dtype == kind
    assert circuit.to("meta").device.type == "meta"


def test_a_file_of_another_type_is_refused() -> None:
    circuit, x = model()
    circuit.load_state_dict({key: value.half() for key, value in circuit.state_dict().items()}, assign=True)
    with pytest.raises(ValueError, match=r"float32 or float64, got torch\.float16"):
        circuit.log_prob(x)


@pytest.mark.parametrize("reference", [False, True])
def test_autocast_leaves_probabilities_alone(reference: bool) -> None:
    circuit, x = model()
    circuit = circuit.float()
    expected = circuit.log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        if reference:
            with circuit.reference():
                found = circuit.log_prob(x)
        else:
            found = circuit.log_prob(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

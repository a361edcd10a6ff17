"""Values that are checked behind the computation, as on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.engine import batch as batches
from lvd_lightning.circuits.engine.late_checks import LateCheck


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check values behind the computation on the CPU, too."""
    monkeypatch.setattr(batches, "is_late", lambda device: True)


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize(
    ("leaf", "bad"),
    [
        (pc.Categorical(4), 4),
        (pc.Categorical(4), -1),
        (pc.Categorical(4), 0.5),
        (pc.Binomial(3), 4),
        (pc.DiscretizedLogistic(4), torch.nan),
        (pc.Gaussian(), torch.inf),
    ],
)
def test_late_checks_of_values(leaf: pc.Distribution, bad: float) -> None:
    """The call itself computes something; the next one raises, or whoever asks; then all is well again."""
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, leaf))
    good = torch.tensor([[0.0, 1.0]])
    circuit.log_prob(good)
    circuit.check_inputs()
    wrong = torch.tensor([[0.0, bad]])
    circuit.log_prob(wrong)
    with pytest.raises(ValueError, match=r"x: .* got values outside its support .*earlier batch"):
        circuit.check_inputs()
    circuit.log_prob(good)
    circuit.check_inputs()
    circuit.log_prob(wrong, observed=torch.tensor([[True, False]]))
    circuit.log_prob(wrong)
    with pytest.raises(ValueError, match="outside its support"):
        circuit.log_prob(good)
    circuit.log_prob(good)


@pytest.mark.usefixtures("late")
def test_late_checks_of_heads_and_evidence() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 3, pc.SoftEvidence(3), num_heads=2))
    evidence = torch.zeros(2, 2, 3)
    circuit.log_prob(evidence, head=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match=r"head: got .*expected 0\.\.1"):
        circuit.check_inputs()
    evidence[0, 0, 0] = torch.nan
    circuit.log_prob(evidence)
    with pytest.raises(ValueError, match="SoftEvidence"):
        copy.deepcopy(circuit).check_inputs() or circuit.check_inputs()


def test_one_copy_is_under_way_at_a_time() -> None:
    """A device that lags behind answers all the same: a copy that was started is not started anew."""

    class Arrival:
        done = False

        def query(self) -> bool:
            return self.done

    checks = LateCheck(["a", "b"])
    checks.add(0, [torch.tensor(True)])
    checks.arrival = Arrival()
    checks.add(1, [torch.tensor(True)])
    checks.ask()
    checks.arrival.done = True
    with pytest.raises(ValueError, match=r"^a \(in an earlier batch"):
        checks.ask()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    circuit = pc.Circuit(pc.hclt(torch.tensor([-1, 0]), 2, pc.Categorical(4))).cuda()
    circuit.log_prob(torch.tensor([[0, 9]]).cuda())
    with pytest.raises(ValueError, match="outside its support"):
        circuit.check_inputs()
    circuit.log_prob(torch.tensor([[0, 3]]).cuda())
    circuit.check_inputs()

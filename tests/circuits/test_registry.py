"""A family that this project does not know: in circuits, in EM, and in files once it is registered."""

import dataclasses
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.distributions import registry
from lvd_lightning.circuits.distributions.moments import unit_moments


@dataclasses.dataclass(frozen=True)
class Geometric(pc.Distribution):
    """p(x) = p (1 - p)^x over 0, 1, ...; the one parameter is p."""

    least: float = 1e-4
    is_whole: ClassVar[bool] = True
    num_statistics: ClassVar[int] = 2

    @property
    def size(self) -> int:
        return 1

    def initial(self, num_units: int, *, generator: torch.Generator | None = None) -> Tensor:
        return 0.1 + 0.8 * torch.rand(num_units, 1, generator=generator)

    def from_data(
        self,
        x_ND: Tensor,
        unit_ND: Tensor,
        num_units: int,
        *,
        weight_N: Tensor | None = None,
        smoothing: float = 0.5,
    ) -> Tensor:
        mean_DK, _ = unit_moments(x_ND, unit_ND, num_units, weight_N, smoothing)
        return self.maximise(mean_DK[..., None]).to(torch.get_default_dtype())

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        return params_FKS.log() + x_FB[:, None] * torch.log1p(-params_FKS)

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        out_FKB.copy_(self.log_prob(params_FKS, x_FB) / math.log(2.0))

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        slope_FKB = 1 / params_FKS - x_FB[:, None] / (1 - params_FKS)
        out_FKS[..., 0] = (grad_FKB * slope_FKB).sum(-1)

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        return torch.stack([grad_FKB.sum(-1), (grad_FKB * x_FB[:, None]).sum(-1)], -1).double()

    def expected(self, params: Tensor) -> Tensor:
        return (1 - params.double()) / params.double()

    def maximise(self, expected: Tensor) -> Tensor:
        return (1 / (1 + expected)).clamp(self.least, 1 - self.least)

    def sample(self, params_FBS: Tensor, generator: torch.Generator | None) -> Tensor:
        exponential_FB = torch.empty_like(params_FBS[..., 0]).exponential_(generator=generator)
        return (exponential_FB / -torch.log1p(-params_FBS[..., 0])).floor()

    def mode(self, params_FKS: Tensor) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(params_FKS[..., 0]), params_FKS[..., 0].log()

    def to_logits(self, params: Tensor) -> Tensor:
        return params.logit()

    def from_logits(self, logits: Tensor) -> Tensor:
        return logits.sigmoid()


@pytest.fixture
def circuit() -> pc.Circuit:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 5, (200, 3), generator=generator)
    return pc.Circuit(pc.hclt_from_data(x, [-1, 0, 1], 2, Geometric(), generator=generator))


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of families as it was, afterwards."""
    monkeypatch.setattr(registry, "_KNOWN", dict(registry._KNOWN))
    pc.register_distribution(Geometric)


def test_a_circuit_with_it_is_saved_loaded_and_trained(circuit: pc.Circuit, registered: None, tmp_path: Path) -> None:
    x = torch.randint(0, 5, (300, 3), generator=torch.Generator().manual_seed(1))
    loaded = pc.load(pc.save(circuit, tmp_path / "circuit"))
    assert torch.equal(loaded.log_prob(x), circuit.log_prob(x))
    optimizer, values = pc.CircuitEM(loaded, lr=1.0, pseudocount=0.0), []
    for _ in range(10):
        loss = -loaded.log_prob(x).sum()
        values.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(after <= before + 1e-9 for before, after in pairwise(values))
    assert values[-1] < values[0]
    drawn = loaded.sample(500, generator=torch.Generator().manual_seed(0))
    assert abs(drawn.double().mean() - x.double().mean()) < 0.4
    with loaded.reference():
        torch.testing.assert_close(loaded.log_prob(x), pc.load(pc.save(loaded, tmp_path / "again")).log_prob(x))


def test_files_name_only_registered_families(circuit: pc.Circuit, registered: None, tmp_path: Path) -> None:
    path = pc.save(circuit, tmp_path / "circuit")
    registry._KNOWN.pop("Geometric")
    with pytest.raises(ValueError, match="Geometric is no family that files may name: call register_distribution"):
        pc.save(circuit, tmp_path / "another")
    assert not (tmp_path / "another.safetensors").exists()
    with pytest.raises(ValueError, match="distribution 'Geometric' is unknown.* register_distribution"):
        pc.load(path)


WRONG: dict[str, tuple[Any, str]] = {
    "no family": (int, "expected a dataclass derived from Distribution"),
    "an object": (pc.Binomial(3), "expected a dataclass derived from Distribution"),
    "an abstract one": (pc.Distribution, "Distribution is abstract, it lacks .*backward"),
    "another of the same name": (
        dataclasses.make_dataclass("Gaussian", [], bases=(pc.Gaussian,), frozen=True),
        "there is a family Gaussian in lvd_lightning.* choose another",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_registered_is_named(name: str, registered: None) -> None:
    given, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        pc.register_distribution(given)


def test_a_family_may_be_defined_anew(registered: None) -> None:
    again = dataclasses.dataclass(frozen=True)(type("Geometric", (Geometric,), {"__module__": __name__}))
    assert pc.register_distribution(again) is again
    assert registry.find_distribution("Geometric") is again

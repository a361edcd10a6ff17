"""A flow as a model of a table: densities, features of columns, samples, files."""

from pathlib import Path

import pytest
import torch
from helpers.flows import disturbed

from lvd_lightning.teachers import TableFlow, load_teacher, save_teacher


def small(kind: str = "maf") -> TableFlow:
    torch.manual_seed(0)
    return disturbed(TableFlow(3, kind, 2, 8, 1, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("kind", ["maf", "nsf", "realnvp"])
def test_a_flow_is_saved_with_its_orders_and_standardisation(kind: str, tmp_path: Path) -> None:
    flow, rows = small(kind), 5 + 2 * torch.randn(20, 3)
    flow.start_from(rows)
    save_teacher(flow, tmp_path)
    loaded = load_teacher(tmp_path)
    assert isinstance(loaded, TableFlow)
    assert torch.equal(loaded.log_prob(rows), flow.log_prob(rows))
    assert torch.equal(loaded.flow.orders, flow.flow.orders)
    drawn = [made.sample(4, 0.7, torch.Generator().manual_seed(0)) for made in (flow, loaded)]
    assert torch.equal(*drawn)


def test_the_density_integrates_to_one() -> None:
    torch.manual_seed(0)
    flow = disturbed(TableFlow(2, "maf", 2, 8, 1), by=0.1)
    points = torch.cartesian_prod(*[torch.linspace(-12, 12, 301)] * 2)
    mass = flow.log_prob(points).double().exp().sum().item() * (24 / 300) ** 2
    assert mass == pytest.approx(1, abs=1e-3)


def test_features_of_a_column_are_what_it_is_after_each_step() -> None:
    flow, rows = small(), torch.randn(5, 3)
    features_BDK = flow.features(rows)
    assert features_BDK.shape == (5, 3, 2)
    assert torch.equal(features_BDK[..., -1], flow.flow.encode(rows).latents[0])


def test_whole_numbers_and_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows: got torch.int64 with shape \(2, 3\)"):
        small().log_prob(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"with shape \(2, 4\), expected real numbers with shape \(B, 3\)"):
        small().log_prob(torch.zeros(2, 4))

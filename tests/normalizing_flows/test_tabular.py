"""Flows of tables: inverses, determinants, orders."""

import pytest
import torch
from helpers.flows import disturbed
from torch import Tensor

from lvd_lightning.normalizing_flows import TabularFlow
from lvd_lightning.normalizing_flows.tabular import KINDS, random_orders

pytestmark = pytest.mark.usefixtures("double_precision")


@pytest.mark.parametrize("kind", KINDS)
def test_a_flow_has_an_inverse_and_the_determinant_of_autograd(kind: str) -> None:
    torch.manual_seed(0)
    flow = disturbed(TabularFlow(kind, 5, random_orders(5, 3), hidden_size=6, num_hidden_layers=1))
    x = 3 + 2 * torch.randn(6, 5)
    flow.start_from(x)
    found = flow.encode(x)
    assert (flow.decode(found.latents) - x).abs().max() < 1e-9
    assert len(found.hidden) == 3
    assert torch.equal(found.hidden[-1], found.latents[0])

    def latent(row: Tensor) -> Tensor:
        return flow.encode(row[None]).latents[0][0]

    expected = torch.linalg.slogdet(torch.autograd.functional.jacobian(latent, x[0])).logabsdet
    assert found.log_det[0].item() == pytest.approx(expected.item(), abs=1e-8)


def test_the_density_of_data_as_they_are_counts_how_columns_are_standardised() -> None:
    torch.manual_seed(0)
    flow = TabularFlow("maf", 2, [[0, 1]], hidden_size=4, num_hidden_layers=1)
    x = torch.randn(50, 2)
    flow.start_from(10 * x)
    wide = flow.encode(10 * x).log_prob
    flow.start_from(x)
    assert (flow.encode(x).log_prob - wide - 2 * torch.tensor(10.0).log()).abs().max() < 1e-9


def test_a_column_looks_at_those_before_it_in_the_order_of_the_step() -> None:
    torch.manual_seed(0)
    flow = disturbed(TabularFlow("maf", 3, [[2, 0, 1]], hidden_size=8, num_hidden_layers=1))
    jacobian = torch.autograd.functional.jacobian(lambda row: flow.encode(row[None]).latents[0][0], torch.randn(3))
    assert (jacobian != 0).tolist() == [[True, True, True], [False, True, False], [False, True, True]]


def test_a_coupling_changes_the_columns_at_odd_places() -> None:
    torch.manual_seed(0)
    flow = disturbed(TabularFlow("realnvp", 4, [[3, 0, 1, 2]], hidden_size=8, num_hidden_layers=1))
    x = torch.randn(2, 4)
    kept = flow.encode(x).latents[0] == x
    assert kept.tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("maf", 3, [[0, 1, 1]]), "orders: expected 1 permutations of 0..2"),
        (("glow", 3, [[0, 1, 2]]), "flow: got 'glow', expected one of maf, nsf, realnvp"),
        (("maf", 1, [[0]]), "num_columns: got 1, expected 2 or more"),
        (("maf", 3, []), "num_steps: got 0"),
    ],
)
def test_what_is_no_flow_is_refused(arguments: tuple[str, int, list[list[int]]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TabularFlow(*arguments, hidden_size=4, num_hidden_layers=1)

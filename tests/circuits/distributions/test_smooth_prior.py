"""A smooth prior against sums value by value."""

import pytest
import torch
from helpers.families import prior_counts

import lvd_lightning.circuits as pc
from lvd_lightning.circuits.distributions.smooth_prior import SmoothPrior


@pytest.mark.parametrize("size", [1, 2, 5, 40, 256, 2100])
@pytest.mark.parametrize("width", [0.05, 1.0, 4.1, 30.0, 1e6])
@pytest.mark.parametrize("constant", [0.0, 2.0])
def test_pseudocounts(size: int, width: float, constant: float) -> None:
    """Sums over offsets and matrix products alike; nothing is lost at the ends, and no flow gets none."""
    prior = SmoothPrior(0.3, width, constant)
    flow = torch.rand(2, 3, size) ** 8
    flow[0, 1] = 0
    flow[1, 2], flow[1, 2, 0] = 0, 1e-20
    found = prior.pseudocounts(flow)
    family = pc.OrderedCategorical(size, share=0.3, width=width, constant=constant)
    expected = torch.from_numpy(prior_counts(family, flow.view(6, size).numpy()))
    torch.testing.assert_close(found.view(6, size), expected, rtol=1e-10, atol=1e-14)
    total = flow.sum(-1)
    torch.testing.assert_close(found.sum(-1), torch.where(total > 0, 0.3 * total + constant, 0.0), rtol=1e-10, atol=0)
    single = prior.pseudocounts(flow.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), found, rtol=1e-4, atol=1e-6)


def test_next_to_no_flow_stays_finite() -> None:
    """A constant that is spread by the tiniest of flows."""
    prior = SmoothPrior(0.3, 1.0, 1000.0)
    for size in (1e-45, 1e-40, 1e-38):
        flow = torch.zeros(1, 40, dtype=torch.float32)
        flow[0, 3] = size
        assert prior.pseudocounts(flow).isfinite().all()
    assert not prior.pseudocounts(torch.zeros(2, 40)).any()

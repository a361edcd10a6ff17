"""Probabilities of leaves against those that circuits compute with."""

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.coding.leaf_tables import leaf_table

FAMILIES = [
    *(pc.Categorical(7), pc.Bernoulli(), pc.Binomial(6), pc.DiscretizedLogistic(256), pc.DiscretizedGaussian(31)),
    *(pc.OrderedCategorical(5), pc.Indicator(3)),
]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: type(family).__name__)
def test_they_are_those_of_the_family(family: pc.Distribution) -> None:
    params = family.initial(4, generator=torch.Generator().manual_seed(0)).double()
    if isinstance(family, pc.DiscretizedLogistic):
        params = torch.tensor([[3.0, 0.05], [120.25, 0.7], [255.0, 40.0], [-200.0, 25000.0]], dtype=torch.float64)
    found = leaf_table(family, params)
    torch.testing.assert_close(found, family.probabilities(params[None])[0], rtol=1e-9, atol=1e-100)
    torch.testing.assert_close(found.sum(1), torch.ones(4, dtype=torch.float64))


def test_what_has_no_list_of_values_cannot_be_coded() -> None:
    with pytest.raises(ValueError, match="has no list of values"):
        leaf_table(pc.Gaussian(), torch.ones(2, 2))

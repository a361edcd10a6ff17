"""A carried state makes of a text one long sequence."""

import pytest
import torch

from lvd_lightning.models.carried import carried_log_prob
from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.language import HiddenMarkovModel


def test_it_is_the_model_of_one_long_window() -> None:
    tables = random_tables(5, 3, 6, True, torch.Generator().manual_seed(0), torch.float64)
    text = torch.randint(6, (23,), generator=torch.Generator().manual_seed(1))
    long = HiddenMarkovModel.from_tables(tables, 23)
    assert carried_log_prob(tables, text) == pytest.approx(float(long.log_prob(text[None]).detach()), rel=1e-12)


def test_it_is_no_sum_of_windows() -> None:
    tables = random_tables(5, 3, 6, True, torch.Generator().manual_seed(0), torch.float64)
    text = torch.randint(6, (20,), generator=torch.Generator().manual_seed(1))
    windows = HiddenMarkovModel.from_tables(tables, 5).log_prob(text.view(4, 5)).sum()
    assert abs(carried_log_prob(tables, text) - float(windows)) > 1e-3


def test_only_homogeneous_models_have_it() -> None:
    with pytest.raises(ValueError, match="expected those of a homogeneous model"):
        carried_log_prob(random_tables(5, 3, 6, False), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"tokens: got \(1,\), expected a row of whole numbers 0..5"):
        carried_log_prob(random_tables(5, 3, 6, True), torch.tensor([6]))

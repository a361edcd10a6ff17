"""A model of words: what is missing is summed out, states and tokens together, files."""

import json
from pathlib import Path

import pytest
import torch

from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.language import HiddenMarkovModel

T, K, V = 4, 3, 5


def model_of(homogeneous: bool, reserved: int | None = None) -> HiddenMarkovModel:
    tables = random_tables(T, K, V, homogeneous, torch.Generator().manual_seed(0), torch.float64)
    return HiddenMarkovModel.from_tables(tables, T, reserved)


def worlds(size: int, length: int = T) -> torch.Tensor:
    return torch.cartesian_prod(*[torch.arange(size)] * length).view(-1, length)


@pytest.mark.parametrize("homogeneous", [False, True])
def test_states_and_tokens_together_sum_to_the_tokens(homogeneous: bool) -> None:
    model, x = model_of(homogeneous), worlds(V)[::37]
    joint = torch.stack([model.lvd_objective(x, z.expand_as(x)) for z in worlds(K)])
    torch.testing.assert_close(joint.logsumexp(0), model.log_prob(x))
    assert torch.equal(model.log_prob_and_objective(x, x % K)[1], model.lvd_objective(x, x % K))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_shorter_sequences_and_missing_words(homogeneous: bool) -> None:
    model = model_of(homogeneous)
    x = torch.tensor([[2, 4]])
    every = torch.cat([x.expand(V**2, 2), worlds(V, 2)], 1)
    torch.testing.assert_close(model.log_prob(x), model.log_prob(every).logsumexp(0)[None])
    gap = torch.tensor([[2, 99, 1, 0]])
    filled = gap.repeat(V, 1)
    filled[:, 1] = torch.arange(V)
    observed = torch.tensor([[True, False, True, True]])
    torch.testing.assert_close(model.log_prob(gap, observed), model.log_prob(filled).logsumexp(0)[None])


def test_posteriors_of_states_are_those_of_all_paths() -> None:
    model, x = model_of(False), torch.tensor([[2, 0, 1]])
    joint = torch.zeros(3, K, dtype=torch.float64)
    full = torch.cat([x.expand(V, 3), worlds(V, 1)], 1)
    for z in worlds(K):
        p = model.lvd_objective(full, z.expand_as(full)).exp().sum()
        joint[torch.arange(3), z[:3]] += p
    torch.testing.assert_close(model.posterior(x)[0], joint / joint.sum(1, keepdim=True))


def test_a_reserved_token_has_the_last_state() -> None:
    model = model_of(True, reserved=4)
    x, z = torch.tensor([[4, 1, 2, 4]]), torch.tensor([[0, 1, 0, 1]])
    known = model_of(True).lvd_objective(x, torch.tensor([[2, 1, 0, 2]]))
    assert torch.equal(model.lvd_objective(x, z), known)
    with pytest.raises(ValueError, match=r"reserved: got 5, expected a token 0..4"):
        model_of(True, reserved=5)


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of(True, reserved=1)
    model.save(tmp_path)
    again = HiddenMarkovModel.load(tmp_path)
    x = worlds(V)
    assert torch.equal(again.log_prob(x), model.log_prob(x))
    assert (again.reserved, again.parts.arguments) == (1, {"length": T, "vocabulary": V})
    saved = json.loads((tmp_path / "language.json").read_text())
    saved["parts"]["arguments"]["vocabulary"] = 9
    (tmp_path / "language.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="no complete hidden Markov model"):
        HiddenMarkovModel.load(tmp_path)
    (tmp_path / "language.json").unlink()
    with pytest.raises(ValueError, match=r"language.json is missing\); run its stage first"):
        HiddenMarkovModel.load(tmp_path)


def test_sequences_that_are_too_long_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: got shape \(1, 5\), expected \(batch, 4 tokens or fewer\)"):
        model_of(True).log_prob(torch.zeros(1, 5, dtype=torch.int64))

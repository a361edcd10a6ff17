"""Missing words against enumeration."""

import pytest
import torch

from lvd_lightning.models.hmm_graph import random_tables
from lvd_lightning.models.infilling import best_completion, next_word, sampled_completions
from lvd_lightning.models.language import HiddenMarkovModel

T, K, V = 4, 3, 4


def model_of(homogeneous: bool) -> HiddenMarkovModel:
    tables = random_tables(T, K, V, homogeneous, torch.Generator().manual_seed(0), torch.float64)
    sharp = type(tables)(*(table**3 / (table**3).sum(-1, keepdim=True) for table in vars(tables).values()))
    return HiddenMarkovModel.from_tables(sharp, T)


def filled(x: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Every way to fill in what is missing."""
    values = [x[t : t + 1] if observed[t] else torch.arange(V) for t in range(len(x))]
    return torch.cartesian_prod(*values).view(-1, len(x))


X = torch.tensor([2, 99, 1, 99])
OBSERVED = torch.tensor([True, False, True, False])


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("length", [3, 4])
def test_samples_come_as_often_as_they_are_likely(homogeneous: bool, length: int) -> None:
    model, x, observed = model_of(homogeneous), X[:length], OBSERVED[:length]
    every = filled(x, observed)
    p = model.log_prob(every).softmax(0).detach()
    found = sampled_completions(model, x, observed, 20_000, torch.Generator().manual_seed(1))
    for row, share in zip(every, p, strict=True):
        is_row_N = (found.tokens_NL == row).all(1)
        assert float(is_row_N.double().mean()) == pytest.approx(float(share), abs=0.012)
        if is_row_N.any():
            torch.testing.assert_close(found.log_prob_N[is_row_N][0], share.log())


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("length", [2, 3, 4])
def test_the_best_words_are_those_of_the_best_path(homogeneous: bool, length: int) -> None:
    model, x, observed = model_of(homogeneous), X[:length], OBSERVED[:length]
    every, tables = filled(x, observed), model.tables()
    place = [0] * T if homogeneous else list(range(T))
    scores = []
    for row in every.tolist():
        for z in torch.cartesian_prod(*[torch.arange(K)] * length).view(-1, length).tolist():
            p = tables.initial_K[z[0]]
            for t in range(length):
                p = p * tables.emission_SKV[place[t], z[t], row[t]]
                p = p * (tables.transition_SKK[place[t], z[t], z[t + 1]] if t + 1 < length else 1.0)
            scores.append((float(p), row))
    found = best_completion(model, x, observed)
    assert found.tokens_NL[0].tolist() == max(scores)[1]
    wanted = model.log_prob(found.tokens_NL) - model.log_prob(every).logsumexp(0)
    torch.testing.assert_close(found.log_prob_N, wanted.detach())


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_the_next_word(homogeneous: bool, length: int) -> None:
    model = model_of(homogeneous)
    context = torch.tensor([[2, 0, 1], [3, 3, 0]])[:, :length]
    every = torch.cat([context.repeat_interleave(V, 0), torch.arange(V).repeat(2)[:, None]], 1)
    wanted = model.log_prob(every).view(2, V).softmax(1)
    torch.testing.assert_close(next_word(model, context), wanted.detach())


def test_a_homogeneous_model_carries_its_state_on() -> None:
    model = model_of(True)
    context = torch.tensor([[2, 0, 1, 3, 3, 0, 1]])
    long = HiddenMarkovModel.from_tables(model.tables(), 8)
    torch.testing.assert_close(next_word(model, context), next_word(long, context))
    with pytest.raises(ValueError, match=r"context: got shape \(1, 7\), expected \(batch, fewer than 4 words\)"):
        next_word(model_of(False), context)


def test_words_that_are_none_are_refused() -> None:
    model = model_of(True)
    with pytest.raises(ValueError, match=r"context: got 2..4, expected 0..3"):
        next_word(model, torch.tensor([[2, 4]]))
    with pytest.raises(ValueError, match=r"got shapes \(4,\) and \(3,\), expected \(L,\) both"):
        sampled_completions(model, X, OBSERVED[:3])

"""Priors over latents: the tree's probabilities are those counted by hand."""

from itertools import product

import pytest
import torch
from torch import Tensor

from lvd_lightning.models.priors import chow_liu_prior, hidden_prior, latent_tree

STATES = 3
WORLDS = torch.tensor(list(product(range(STATES), repeat=4)))


def log_prob(prior: torch.nn.Module, z: Tensor) -> Tensor:
    certain = torch.full((*z.shape, STATES), -torch.inf).scatter_(2, z[..., None], 0.0)
    return prior.log_prob(certain)[:, 0].detach()


@pytest.fixture
def z(double_precision: None) -> Tensor:
    """A chain 0 - 1 - 2 - 3: each latent mostly repeats the one before; state 2 is rare and never comes first."""
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(2, (200,), generator=generator)]
    for _ in range(3):
        changed = torch.multinomial(torch.tensor([0.5, 0.4, 0.1]), 200, True, generator=generator)
        columns.append(torch.where(torch.rand(200, generator=generator) < 0.75, columns[-1], changed))
    return torch.stack(columns, 1)


def test_the_tree_follows_the_dependencies(z: Tensor) -> None:
    parents = latent_tree(z, STATES).tolist()
    assert {frozenset((v, p)) for v, p in enumerate(parents) if p >= 0} == {frozenset((v, v + 1)) for v in range(3)}


def test_probabilities_are_counted(z: Tensor) -> None:
    parents = torch.tensor([1, -1, 1, 2])
    prior = chow_liu_prior(z, STATES, parents, pseudocount=2.0)
    overall = torch.tensor([float((z == k).sum()) + 1e-3 for k in range(STATES)])
    extra = 2.0 * overall / overall.sum()
    root = torch.tensor([float((z[:, 1] == k).sum() + extra[k]) for k in range(STATES)]) / (len(z) + 2)
    for world in WORLDS[::7]:
        expected = root[world[1]].log()
        for v, above in enumerate(parents.tolist()):
            if above >= 0:
                rows = z[z[:, above] == world[above]]
                same = float((rows[:, v] == world[v]).sum())
                expected = expected + ((same + extra[world[v]]) / (len(rows) + 2)).log()
        torch.testing.assert_close(log_prob(prior, world[None])[0], expected)


def test_little_smoothing_is_maximum_likelihood(z: Tensor) -> None:
    parents = latent_tree(z, STATES)
    best = log_prob(chow_liu_prior(z, STATES, parents, 1e-9), z).mean()
    for pseudocount in (1.0, 30.0):
        assert log_prob(chow_liu_prior(z, STATES, parents, pseudocount), z).mean() < best


def test_states_that_never_came_are_possible(z: Tensor) -> None:
    prior = chow_liu_prior(z.clamp_max(1), STATES, latent_tree(z, STATES))
    assert torch.isfinite(log_prob(prior, WORLDS)).all()


@pytest.mark.parametrize("num_latents", [None, 2, 5])
def test_normalised(z: Tensor, num_latents: int | None) -> None:
    parents = latent_tree(z, STATES)
    if num_latents is None:
        prior = chow_liu_prior(z, STATES, parents)
    else:
        prior = hidden_prior(STATES, num_latents, parents, torch.Generator().manual_seed(0))
    assert log_prob(prior, WORLDS).exp().sum().item() == pytest.approx(1.0)


def test_without_smoothing_is_refused(z: Tensor) -> None:
    with pytest.raises(ValueError, match="pseudocount: got 0, expected more than 0"):
        chow_liu_prior(z, STATES, torch.tensor([-1, 0, 1, 2]), 0)

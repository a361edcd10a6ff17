"""Priors over latents: the tree's probabilities are those counted by hand."""

from itertools import product

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.models.priors import chow_liu_prior, edge_kinds, hidden_prior, latent_tree
from lvd_lightning.parts import ImagePatches, Tokens

STATES = 3
WORLDS = torch.tensor(list(product(range(STATES), repeat=4)))


def log_prob(prior: pc.Circuit, z: Tensor) -> Tensor:
    states = prior.plan.inputs[0].distribution.num_states
    certain = torch.full((*z.shape, states), -torch.inf).scatter_(2, z[..., None], 0.0)
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
        prior = hidden_prior(z, STATES, num_latents, parents, torch.Generator().manual_seed(0))
    assert log_prob(prior, WORLDS).exp().sum().item() == pytest.approx(1.0)


def test_latents_begin_as_groups_of_like_states(double_precision: None) -> None:
    """States 2 y and 2 y + 1 come with the same neighbours: three latent states are as good as all six states."""
    generator = torch.Generator().manual_seed(0)
    y = [torch.randint(3, (3000,), generator=generator)]
    for _ in range(3):
        other = torch.randint(3, (3000,), generator=generator)
        y.append(torch.where(torch.rand(3000, generator=generator) < 0.8, y[-1], other))
    z = 2 * torch.stack(y, 1) + torch.randint(2, (3000, 4), generator=generator)
    parents = torch.tensor([-1, 0, 1, 2])

    def mean(prior: pc.Circuit) -> float:
        certain = torch.full((*z.shape, 6), -torch.inf).scatter_(2, z[..., None], 0.0)
        return float(prior.log_prob(certain).detach().mean())

    tree = mean(chow_liu_prior(z, 6, parents))
    hidden = hidden_prior(z, 6, 3, parents, generator)
    assert tree - 0.25 < mean(hidden) < tree  # the share that is spread costs about 4 log(1 - 0.05)
    alone = sum(torch.bincount(z[:, v]).div(3000).log()[z[:, v]].mean() for v in range(4))
    assert mean(hidden) > float(alone) + 1.0
    assert mean(hidden_prior(z, 6, 6, parents, generator)) == pytest.approx(tree)
    single = hidden_prior(z[:, :1], 6, 2, torch.tensor([-1]), generator)
    one = torch.full((6, 1, 6), -torch.inf).scatter_(2, torch.arange(6).view(6, 1, 1), 0.0)
    assert float(single.log_prob(one).exp().sum()) == pytest.approx(1.0)


def test_without_smoothing_is_refused(z: Tensor) -> None:
    with pytest.raises(ValueError, match="pseudocount: got 0, expected more than 0"):
        chow_liu_prior(z, STATES, torch.tensor([-1, 0, 1, 2]), 0)
    with pytest.raises(ValueError, match="pseudocount: got 0, expected more than 0"):
        hidden_prior(z, STATES, 2, torch.tensor([-1, 0, 1, 2]), torch.Generator(), 0)


def test_edges_that_lie_alike() -> None:
    """In a grid of two rows of three; by number where parts have no grid."""
    parents = torch.tensor([1, -1, 1, 0, 3, 2])
    kinds = edge_kinds(parents, ImagePatches((1, 4, 6), 2))
    assert kinds[1] == -1
    left, right, below = kinds[0], kinds[2], kinds[3]
    assert len({int(left), int(right), int(below)}) == 3
    assert kinds[4] == right
    assert kinds[5] == below
    of_words = edge_kinds(torch.tensor([-1, 0, 1]), Tokens(3, 5))
    assert of_words[1] == of_words[2] >= 0 > of_words[0]


def walks(number: int, length: int, states: int, seed: int) -> torch.Tensor:
    """A step up or down from one position to the next, the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(-1, 2, (number, length), generator=generator)
    return (torch.randint(states, (number, 1), generator=generator) + steps.cumsum(1)) % states


def test_shrinkage_is_that_of_its_formula() -> None:
    z, parents, kinds = walks(40, 3, 5, 0), torch.tensor([-1, 0, 1]), torch.tensor([-1, 0, 0])
    prior = chow_liu_prior(z, 5, parents, pseudocount=2.0, kinds=kinds, shrinkage=7.0)
    overall = torch.bincount(z.flatten(), minlength=5) + 1e-3
    overall = overall / overall.sum()
    counts = [torch.zeros(5, 5), torch.zeros(5, 5)]
    for row in z.tolist():
        for edge in range(2):
            counts[edge][row[edge], row[edge + 1]] += 1
    together = counts[0] + counts[1] + 20 * overall
    together = together / together.sum(1, keepdim=True)
    root = torch.bincount(z[:, 0], minlength=5) + 2 * overall
    tables = [root / root.sum()]
    for edge in range(2):
        table = counts[edge] + 2 * overall + 7 * together
        tables.append(table / table.sum(1, keepdim=True))
    one = torch.tensor([[2, 3, 3]])
    expected = tables[0][2] * tables[1][2, 3] * tables[2][3, 3]
    assert float(log_prob(prior, one).exp()) == pytest.approx(float(expected), rel=1e-5)


def test_shrinkage_chosen_helps_where_edges_are_alike_and_keeps_out_where_not() -> None:
    parents, kinds = torch.arange(-1, 7), torch.tensor([-1] + [0] * 7)
    few, many = walks(60, 8, 12, 1), walks(2000, 8, 12, 2)
    alone = log_prob(chow_liu_prior(few, 12, parents), many).mean()
    shrunk = log_prob(chow_liu_prior(few, 12, parents, kinds=kinds), many).mean()
    assert shrunk > alone + 1  # nats
    shift = torch.tensor([0, 3, 1, 7, 2, 9, 4, 8])  # the step means something else at every position
    few, many = (walks(3000, 8, 12, 1) + shift) % 12, (walks(2000, 8, 12, 2) + shift) % 12
    alone = log_prob(chow_liu_prior(few, 12, parents), many).mean()
    shrunk = log_prob(chow_liu_prior(few, 12, parents, kinds=kinds), many).mean()
    assert shrunk > alone - 0.01

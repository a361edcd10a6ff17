"""Counts are the maximum of the likelihood of tokens and states together."""

import pytest
import torch

from lvd_lightning.models.hmm_counts import HMMCounts
from lvd_lightning.models.language import HiddenMarkovModel


def examples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, (40, 4), generator=generator), torch.randint(6, (40, 4), generator=generator)


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_against_loops(homogeneous: bool, dtype: torch.dtype) -> None:
    z_NT, x_NT = examples()
    counts = HMMCounts(4, 3, 6, homogeneous)
    counts.add(z_NT[:15], x_NT[:15])
    counts.add(z_NT[15:], x_NT[15:])
    found = counts.tables(0.5, dtype)
    initial = torch.full((3,), 0.5 / 3)
    transition = torch.full((3, 3, 3), 0.5 / 3)
    emission = torch.full((4, 3, 6), 0.5 / 6)
    if homogeneous:
        transition, emission = transition[:1], emission[:1]
    for z_T, x_T in zip(z_NT.tolist(), x_NT.tolist()):
        initial[z_T[0]] += 1
        for t in range(4):
            emission[0 if homogeneous else t, z_T[t], x_T[t]] += 1
            if t < 3:
                transition[0 if homogeneous else t, z_T[t], z_T[t + 1]] += 1
    for got, wanted in zip(
        (found.initial_K, found.transition_SKK, found.emission_SKV), (initial, transition, emission)
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, (wanted / wanted.sum(-1, keepdim=True)).to(dtype))


@pytest.mark.parametrize("homogeneous", [False, True])
def test_no_other_parameters_make_it_likelier(homogeneous: bool) -> None:
    z_NT, x_NT = examples()
    counts = HMMCounts(4, 3, 6, homogeneous)
    counts.add(z_NT, x_NT)
    model = HiddenMarkovModel.from_tables(counts.tables(0.0, torch.float64), 4)
    best = model.lvd_objective(x_NT, z_NT).sum()
    generator = torch.Generator().manual_seed(1)
    for table in model.circuit.tables:
        with torch.no_grad():
            before = table.clone()
            table.mul_(1 + 0.1 * torch.rand(table.shape, generator=generator, dtype=table.dtype))
            table.div_(table.sum(-1, keepdim=True))
            assert model.lvd_objective(x_NT, z_NT).sum() < best
            table.copy_(before)


def test_a_state_that_never_came_is_uniform() -> None:
    counts = HMMCounts(2, 3, 4, False)
    counts.add(torch.tensor([[0, 1]]), torch.tensor([[3, 0]]))
    assert counts.tables(0.0).emission_SKV[0, 2].tolist() == [0.25] * 4


def test_what_is_no_state_or_token_is_refused() -> None:
    counts = HMMCounts(2, 3, 4, False)
    with pytest.raises(ValueError, match=r"z: got 0..3, expected 0..2"):
        counts.add(torch.tensor([[0, 3]]), torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"got shapes \(1, 2\) and \(1, 3\), expected \(windows, 2\)"):
        counts.add(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))

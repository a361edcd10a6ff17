"""Tables of hidden Markov models become circuits and are read from them again."""

import pytest
import torch

import lvd_lightning.circuits as pc
from lvd_lightning.models.hmm_graph import HMMTables, hmm_from_tables, random_tables, tables_of


@pytest.mark.parametrize("homogeneous", [False, True])
@pytest.mark.parametrize(("length", "num_states"), [(2, 1), (2, 3), (4, 1), (4, 3)])
def test_tables_come_back_as_they_were(homogeneous: bool, length: int, num_states: int) -> None:
    tables = random_tables(length, num_states, 5, homogeneous, torch.Generator().manual_seed(0), torch.float64)
    found = tables_of(pc.Circuit(hmm_from_tables(tables, length)))
    for name in ("initial_K", "transition_SKK", "emission_SKV"):
        assert torch.equal(getattr(found, name), getattr(tables, name)), name
    assert found.homogeneous == homogeneous


def test_the_circuit_is_that_of_the_structure() -> None:
    circuit = pc.Circuit(pc.hmm(4, 3, 5, generator=torch.Generator().manual_seed(0)))
    again = pc.Circuit(hmm_from_tables(tables_of(circuit), 4))
    x = torch.randint(5, (20, 4), generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.log_prob(x), circuit.log_prob(x))


def test_other_circuits_are_refused() -> None:
    for graph in (pc.hclt([-1, 0, 0, 2, 0], 2, pc.Categorical(5)), pc.hmm(4, 3, 5, num_heads=2), pc.hmm(1, 3, 5)):
        with pytest.raises(ValueError, match="expected a hidden Markov model"):
            tables_of(pc.Circuit(graph))


def test_tables_that_are_none_are_refused() -> None:
    good = random_tables(4, 3, 5, False)
    with pytest.raises(ValueError, match=r"transition_SKK: got shape \(3, 3, 3\), expected \(4, 3, 3\) for 5 tokens"):
        hmm_from_tables(HMMTables(good.initial_K, good.transition_SKK, torch.full((5, 3, 5), 0.2)), 5)
    with pytest.raises(ValueError, match="initial_K: rows must be probabilities"):
        hmm_from_tables(HMMTables(good.initial_K * 2, good.transition_SKK, good.emission_SKV), 4)
    with pytest.raises(ValueError, match="2 tokens or more"):
        hmm_from_tables(good, 1)

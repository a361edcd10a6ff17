"""Where a latent value is found, against counting through the heads one by one."""

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.models.priors import clusters_tree, latent_tree

POSITIONS = 3
#: Heads per circuit: shared by all positions; a set for each position, with different numbers of circuits.
SHARED, OWN = [2, 1, 3], [2, 2, 1, 3, 1, 1, 1, 1]
KINDS = pytest.mark.parametrize(("heads", "num_sets"), [(SHARED, 1), (OWN, POSITIONS)], ids=["shared", "own"])


def counted(heads: list[int], num_sets: int) -> list[list[tuple[int, int]]]:
    """Circuit and head of each value, at each position."""
    through = [(circuit, head) for circuit, number in enumerate(heads) for head in range(number)]
    size = len(through) // num_sets
    return [through[(p if num_sets > 1 else 0) * size :][:size] for p in range(POSITIONS)]


def every_value(index: HeadIndex) -> Tensor:
    """Each value at each position, (K, P)."""
    return torch.arange(index.num_values)[:, None].expand(-1, POSITIONS)


@KINDS
def test_values_are_located_at_every_position(heads: list[int], num_sets: int) -> None:
    index = HeadIndex(heads, num_sets)
    expected_KP2 = torch.tensor(counted(heads, num_sets)).transpose(0, 1)
    assert (index.num_values, index.num_circuits, index.tied) == (len(expected_KP2), len(heads), num_sets == 1)
    assert torch.equal(torch.stack(index.locate(every_value(index)), dim=-1), expected_KP2)


@KINDS
def test_a_position_may_be_named(heads: list[int], num_sets: int) -> None:
    index = HeadIndex(heads, num_sets)
    expected = counted(heads, num_sets)
    for p in range(POSITIONS):
        circuit, head = index.locate(torch.arange(index.num_values), torch.tensor(p))
        assert list(zip(circuit.tolist(), head.tolist(), strict=True)) == expected[p]


@KINDS
def test_values_come_back(heads: list[int], num_sets: int) -> None:
    index = HeadIndex(heads, num_sets)
    circuit, head = index.locate(every_value(index))
    found = index.value(circuit, head.to(torch.int16))  # as the heads of parts are kept
    assert found.dtype == torch.int64
    assert torch.equal(found, every_value(index))


@KINDS
def test_clusters_are_counted_anew_where_positions_have_their_own_circuits(heads: list[int], num_sets: int) -> None:
    index = HeadIndex(heads, num_sets)
    for p, found in enumerate(counted(heads, num_sets)):
        circuits = sorted({circuit for circuit, _ in found})
        cluster = torch.arange(len(circuits))
        assert index.circuit(cluster, torch.tensor(p)).tolist() == circuits
        assert set(index.position(torch.tensor(circuits)).tolist()) == {p if num_sets > 1 else 0}
        wide = torch.zeros(2, POSITIONS, dtype=torch.int64)
        assert index.circuit(wide)[:, p].tolist() == [circuits[0]] * 2


@KINDS
def test_answers_are_where_the_question_was(heads: list[int], num_sets: int) -> None:
    index = HeadIndex(heads, num_sets)
    value = torch.zeros(2, POSITIONS, dtype=torch.int64, device="meta")
    found = (*index.locate(value), index.value(value, value), index.circuit(value), index.position(value))
    assert {one.device.type for one in found} == {"meta"}
    assert index.locate(torch.zeros(2, POSITIONS, dtype=torch.int64))[0].device.type == "cpu"


def test_circuits_say_whether_positions_share_them() -> None:
    def circuits(heads: list[int]) -> pc.Circuit:
        return pc.Circuit([pc.hclt([-1, 0], 2, pc.Bernoulli(), num_heads=number) for number in heads])

    assert HeadIndex.of(circuits([2, 1]), 3, 2).tied
    own = HeadIndex.of(circuits([2, 1, 3]), 3, 2)
    assert (own.tied, own.num_values) == (False, 3)
    with pytest.raises(ValueError, match=r"has 3 heads, expected 4 \(tied over positions\) or 8"):
        HeadIndex.of(circuits([2, 1]), 4, 2)


@pytest.mark.parametrize(("heads", "num_sets"), [([2, 2, 2], 2), ([1, 1, 1, 1, 1, 1, 1], 3)])
def test_circuits_of_two_positions_are_refused(heads: list[int], num_sets: int) -> None:
    with pytest.raises(ValueError, match=f"heads of two positions.* got {sum(heads)} heads for {num_sets} positions"):
        HeadIndex(heads, num_sets)


def test_the_tree_of_clusters_is_over_shared_circuits() -> None:
    """Heads are noise here, which circuits know nothing of; values that every position counts anew are left alone."""
    generator = torch.Generator().manual_seed(0)
    circuit_N1 = torch.randint(3, (500, 1), generator=generator)
    far_N1 = torch.where(torch.rand(500, 1, generator=generator) < 0.8, circuit_N1, 0)
    circuit_NP = torch.cat([circuit_N1, circuit_N1, far_N1, far_N1], dim=1)
    index = HeadIndex([4, 4, 4])
    z_NP = index.value(circuit_NP, torch.randint(4, circuit_NP.shape, generator=generator))
    assert torch.equal(clusters_tree(z_NP, index), latent_tree(circuit_NP, 3))
    own = HeadIndex([12] * 4, num_sets=4)
    assert torch.equal(clusters_tree(z_NP, own), latent_tree(z_NP, 12))

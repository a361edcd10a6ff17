"""Evidence of pairs equals that of the whole circuit; caches keep it, and an interrupted one does not count."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.circuits import circuit as limits
from lvd_lightning.circuits.engine import sparse
from lvd_lightning.models import evidence as module
from lvd_lightning.models.assembled import MARGIN
from lvd_lightning.models.evidence import Candidates, CircuitGroups, EvidenceCache, candidate_table

DIMS = 6


@pytest.fixture
def whole(double_precision: None) -> pc.Circuit:
    """Seven circuits of different trees, widths and numbers of heads."""
    generator = torch.Generator().manual_seed(0)
    graphs = []
    for g in range(7):
        tree = torch.arange(-1, DIMS - 1) if g % 2 else torch.tensor([-1, *[0] * (DIMS - 1)])
        graphs.append(pc.hclt(tree, 2 + g, pc.Categorical(4), num_heads=1 + g % 3, generator=generator))
    return pc.Circuit(graphs)


def pairs(circuit: pc.Circuit, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Item, circuit and head of `count` pairs; two circuits get most of them, one gets none."""
    share = torch.tensor([0.5, 0.3, 0.0, 0.1, 0.05, 0.03, 0.02])
    chosen = torch.multinomial(share, count, True, generator=generator)
    heads = torch.tensor([structure.num_heads for structure in circuit.structures])[chosen]
    return (
        torch.randint(20, (count,), generator=generator),
        chosen,
        torch.rand(count, generator=generator).mul(heads).long(),
    )


class TestGroups:
    def check(self, whole: pc.Circuit, groups: CircuitGroups) -> None:
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(4, (20, DIMS), generator=generator)
        item, circuit, head = pairs(whole, 300, generator)
        expected = whole.log_prob(x).detach()[circuit, item, head]
        torch.testing.assert_close(groups.log_prob(x, item, circuit, head), expected)

    @pytest.mark.parametrize("ratio", [1.0, 2.0, 1e9])
    def test_pairs_have_the_likelihood_of_the_whole(self, whole: pc.Circuit, ratio: float) -> None:
        groups = CircuitGroups(whole, torch.tensor([500, 300, 0, 100, 50, 30, 20]), ratio)
        assert sorted(torch.cat(groups.members).tolist()) == list(range(7))
        assert len(groups.members) == {1.0: 7, 2.0: 4, 1e9: 1}[ratio]
        self.check(whole, groups)

    def test_in_little_memory(self, whole: pc.Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
        groups = CircuitGroups(whole, torch.tensor([500, 300, 0, 100, 50, 30, 20]))
        given: list[int] = []
        for part in groups.circuits:
            log_prob = part.log_prob
            monkeypatch.setattr(
                part, "log_prob", lambda x, log_prob=log_prob, **more: given.append(x.shape[1]) or log_prob(x, **more)
            )
        rows = max(part.plan.num_value_rows for part in groups.circuits)
        monkeypatch.setitem(limits.MAX_NUMBERS, "cpu", 8 * rows)
        self.check(whole, groups)
        for part in groups.circuits:
            assert min(given) <= 8 * rows // part.plan.num_value_rows
        assert max(given) <= 8 * rows // min(part.plan.num_value_rows for part in groups.circuits)

    @pytest.mark.parametrize("memory", [1, 4])
    def test_passes_take_every_example_once(
        self, whole: pc.Circuit, monkeypatch: pytest.MonkeyPatch, memory: int
    ) -> None:
        groups = CircuitGroups(whole, torch.tensor([500, 300, 0, 100, 50, 30, 20]))
        monkeypatch.setitem(limits.MAX_NUMBERS, "cpu", 16 * max(part.plan.num_value_rows for part in groups.circuits))
        _, circuit, _ = pairs(whole, 300, torch.Generator().manual_seed(1))
        taken, widest = [], 0
        for number, index, filled in groups.passes(circuit, memory):
            assert filled.shape[1] <= max(1, groups.circuits[number].batch_limit // memory)
            widest = max(widest, filled.shape[1])
            own = groups.members[number][:, None].expand(filled.shape)
            assert torch.equal(circuit[index[filled]], own[filled])
            taken += index[filled].tolist()
        assert sorted(taken) == list(range(300))
        assert widest > 1

    def test_pruned_circuits_are_refreshed(self, whole: pc.Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
        """Groups hold live edges only in tables of their own, which are not those of the whole."""
        monkeypatch.setattr(sparse, "LEAST_WIDTH", 1)
        generator = torch.Generator().manual_seed(5)
        graphs = whole.to_graph()
        for g, graph in enumerate(graphs):
            for node in graph.nodes:
                if node.weight is not None and g % 3:
                    live = torch.rand(node.weight.shape, generator=generator) < 0.5
                    node.mask = live.scatter_(1, node.weight.argmax(1, keepdim=True), True)
                    node.weight = node.weight * node.mask / (node.weight * node.mask).sum(1, keepdim=True)
        pruned = pc.Circuit(graphs)
        groups = CircuitGroups(pruned, torch.tensor([500, 300, 0, 100, 50, 30, 20]))
        for circuits in ([pruned], groups.circuits):
            assert any(group.edges is not None for circuit in circuits for group in circuit.plan.groups)
        x = torch.randint(4, (200, DIMS), generator=generator)
        before = pruned.log_prob(x).detach()
        (-pruned.log_prob(x, head=0).sum()).backward()
        pc.CircuitEM(pruned, lr=0.9).step()
        assert not torch.allclose(pruned.log_prob(x)[..., 0], before[..., 0])
        groups.refresh()
        self.check(pruned, groups)

    def test_heads_of_one_circuit_share_a_pass(self, whole: pc.Circuit, monkeypatch: pytest.MonkeyPatch) -> None:
        """All three heads of circuit 2 for four items take four examples."""
        groups = CircuitGroups(whole, torch.ones(7), ratio=1.0)
        given: list[int] = []
        for part in groups.circuits:
            log_prob = part.log_prob
            monkeypatch.setattr(
                part,
                "log_prob",
                lambda x, log_prob=log_prob, **more: given.append(x.shape[:2].numel()) or log_prob(x, **more),
            )
        x = torch.randint(4, (20, DIMS), generator=torch.Generator().manual_seed(1))
        item, head = torch.cartesian_prod(torch.arange(4), torch.arange(3)).unbind(1)
        found = groups.log_prob(x, item, torch.full_like(item, 2), head)
        torch.testing.assert_close(found, whole.log_prob(x).detach()[2, item, head])
        assert sum(given) == 4 * len(groups.members[0])

    def test_all_heads_of_a_circuit(self, whole: pc.Circuit) -> None:
        groups = CircuitGroups(whole, torch.tensor([500, 300, 0, 100, 50, 30, 20]))
        generator = torch.Generator().manual_seed(1)
        x = torch.randint(4, (20, DIMS), generator=generator)
        item, circuit, _ = pairs(whole, 50, generator)
        found = groups.log_prob_of_heads(x, item, circuit)
        torch.testing.assert_close(found, whole.log_prob(x).detach()[circuit, item])
        assert torch.equal(found.isinf().sum(1), 3 - (1 + circuit % 3))

    def test_refresh_follows_the_whole(self, whole: pc.Circuit) -> None:
        groups = CircuitGroups(whole, torch.tensor([500, 300, 0, 100, 50, 30, 20]))
        optimizer = pc.CircuitEM(whole, lr=0.5)
        x = torch.randint(4, (30, DIMS), generator=torch.Generator().manual_seed(2))
        (-whole.log_prob(x, head=0).sum()).backward()
        optimizer.step()
        with pytest.raises(AssertionError):
            self.check(whole, groups)
        groups.refresh()
        self.check(whole, groups)

    def test_no_pairs(self, whole: pc.Circuit) -> None:
        groups = CircuitGroups(whole, torch.ones(7))
        none = torch.empty(0, dtype=torch.int64)
        assert groups.log_prob(torch.zeros(1, DIMS, dtype=torch.int64), none, none, none).shape == (0,)


def as_data(images: Tensor) -> Any:
    return SimpleNamespace(batch=lambda split, index: images[index])


def test_candidates_start_with_the_own_value(assembled: Any, images: Tensor) -> None:
    z = torch.randint(3, (len(images), 4), generator=torch.Generator().manual_seed(0))
    table = candidate_table(assembled.circuit, images, z, 2)
    assert table.shape == (3, 2)
    assert table[:, 0].tolist() == [0, 1, 2]
    # The other candidate is the value with the larger mean posterior, value by value.
    share = z.flatten().bincount() + 1.0
    posterior = (assembled.given(images) + share.log()).softmax(-1)
    for k in range(3):
        mean = posterior[z == k].sum(0)
        mean[k] = -1
        assert table[k, 1] == mean.argmax()


def test_values_that_never_came_have_frequent_candidates(make_assembly: Callable[..., Any], images: Tensor) -> None:
    z = torch.tensor([[0, 1, 1, 1]] * len(images))
    assert candidate_table(make_assembly("tied").circuit, images, z, 3)[2].tolist() == [2, 1, 0]


def test_values_far_below_the_best_may_be_lost(
    make_assembly: Callable[..., Any], images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither candidates nor what is kept ask for digits below the margin, which cost the time of all the others."""
    circuit, z = make_assembly("tied").circuit, torch.randint(3, (len(images), 4))
    exact = circuit.evidence

    def lossy(images: Tensor, observed: Tensor | None = None, margin: float | None = None) -> Tensor:
        found = exact(images, observed) - 100.0 * torch.arange(3)  # two of three values lie below the margin
        return found if margin is None else found.masked_fill(found < found.amax(-1, keepdim=True) - margin, -torch.inf)

    monkeypatch.setattr(circuit, "evidence", lossy)
    assert candidate_table(circuit, images, z, 2)[1:].tolist() == [[1, 0], [2, 0]]
    fill(tmp_path, circuit, images, None, z)
    cache = EvidenceCache.open(tmp_path)
    assert cache is not None
    found = cache.evidence(torch.arange(len(images)), "cpu")
    assert bool((found[..., 1:] < found[..., :1] - MARGIN).all())
    torch.testing.assert_close(found[..., 0].double(), exact(images)[..., 0].double(), rtol=1e-6, atol=0)


def fill(folder: Path, circuit: Any, images: Tensor, candidates: Candidates | None, z: Tensor, splits: int = 1) -> None:
    kept = 3 if candidates is None else candidates.table.shape[1]
    EvidenceCache.begin(folder, (len(images), 4, kept), 3, candidates is not None)
    bounds = torch.linspace(0, len(images), splits + 1).long().tolist()
    for low, high in pairwise(bounds):
        assert EvidenceCache.open(folder) is None
        EvidenceCache.fill(
            folder, circuit, as_data(images), "train", rows=range(low, high), z_NP=z, candidates=candidates
        )
    EvidenceCache.complete(folder, 3)


@pytest.mark.parametrize("splits", [1, 2])
def test_dense_cache(
    assembled: Any, images: Tensor, tmp_path: Path, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_IMAGES", 4)
    fill(tmp_path, assembled.circuit, images, None, torch.zeros(len(images), 4).long(), splits)
    cache = EvidenceCache.open(tmp_path)
    assert cache is not None
    assert (len(cache), cache.shape) == (len(images), (len(images), 4, 3))
    index = torch.tensor([7, 2, 2])
    expected = assembled.given(images[index])
    found = cache.evidence(index, "cpu").double()
    best = expected.amax(-1, keepdim=True)
    # Half a unit in the last place of the distance from the best (float16), and of the best itself (float32).
    assert ((found - expected).abs() <= (best - expected) * 2**-11 + best.abs() * 2**-23).all()
    torch.testing.assert_close(found.amax(-1), best[..., 0], rtol=1e-6, atol=0)


def test_sparse_cache(assembled: Any, images: Tensor, tmp_path: Path) -> None:
    z = torch.randint(3, (len(images), 4), generator=torch.Generator().manual_seed(0))
    table = torch.tensor([[0, 2], [1, 0], [2, 1]])
    groups = CircuitGroups(assembled.circuit.conditional, torch.ones(assembled.circuit.conditional.num_circuits))
    fill(tmp_path, assembled.circuit, images, Candidates(table, groups), z, 2)
    cache = EvidenceCache.open(tmp_path)
    assert cache is not None
    index = torch.tensor([3, 0, 8])
    expected = assembled.given(images[index])
    kept = torch.zeros(expected.shape, dtype=torch.bool).scatter_(2, table[z[index]], True)
    torch.testing.assert_close(
        cache.evidence(index, "cpu").double(), expected.masked_fill(~kept, -torch.inf), rtol=1e-3, atol=1e-3
    )


def test_what_an_interrupted_run_left_is_not_taken(
    make_assembly: Callable[..., Any], images: Tensor, tmp_path: Path
) -> None:
    """A sparse cache that was never completed, then a dense one in its place."""
    circuit, z = make_assembly("tied").circuit, torch.zeros(len(images), 4).long()
    EvidenceCache.begin(tmp_path, (len(images), 4, 2), 3, True)
    assert EvidenceCache.open(tmp_path) is None
    fill(tmp_path, circuit, images, None, z)
    cache = EvidenceCache.open(tmp_path)
    assert cache is not None
    assert cache.states is None
    torch.testing.assert_close(cache.evidence(torch.arange(9), "cpu"), circuit.evidence(images), rtol=1e-3, atol=1e-3)
    EvidenceCache.begin(tmp_path, (len(images), 4, 2), 3, True)
    assert EvidenceCache.open(tmp_path) is None


def test_damaged_caches_are_named(make_assembly: Callable[..., Any], images: Tensor, tmp_path: Path) -> None:
    fill(tmp_path, make_assembly("tied").circuit, images, None, torch.zeros(len(images), 4).long())
    content = (tmp_path / "excess.npy").read_bytes()
    (tmp_path / "excess.npy").write_bytes(content[:-10])
    with pytest.raises(ValueError, match=r"excess.npy: cannot be read"):
        EvidenceCache.open(tmp_path)
    np.save(tmp_path / "excess.npy", np.zeros((2, 4, 3), np.float16))
    with pytest.raises(ValueError, match=r"excess.npy has the shape \(2, 4, 3\)"):
        EvidenceCache.open(tmp_path)


def test_impossible_values_and_patches(images: Tensor, tmp_path: Path) -> None:
    """A value that cannot be is far below the best one; a patch that no value explains is impossible, not NaN."""
    log_BPM = torch.zeros(len(images), 4, 3)
    log_BPM[0, 0, 1] = -torch.inf
    log_BPM[1, 2] = -torch.inf
    circuit = SimpleNamespace(conditional=SimpleNamespace(device="cpu"), evidence=lambda images, margin: log_BPM)
    fill(tmp_path, circuit, images, None, torch.zeros(len(images), 4).long())
    cache = EvidenceCache.open(tmp_path)
    assert cache is not None
    found = cache.evidence(torch.arange(len(images)), "cpu")
    assert found[0, 0].tolist() == pytest.approx([0.0, -6e4, 0.0], rel=1e-3)
    assert (found[1, 2] == -torch.inf).all()
    assert not found.isnan().any()


def test_many_states_fit(tmp_path: Path) -> None:
    EvidenceCache.begin(tmp_path, (1, 1, 2), 40_000, True)
    assert np.load(tmp_path / "states.npy").dtype == np.int32
    EvidenceCache.begin(tmp_path, (1, 1, 2), 32_768, True)
    assert np.load(tmp_path / "states.npy").dtype == np.int16

"""Heads by K-means inside circuits: the first ones and those beside growing ones."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lvd_lightning.growing import Examples, PatchFeatures, clustering, features, first_heads, recluster
from lvd_lightning.growing.clustering import nearest_centroids
from lvd_lightning.latents.transform import AffineMap

N, P, E = 100, 4, 5


class Vectors:
    """Features that are given."""

    shape = (N, P, E)

    def __init__(self, values: Tensor) -> None:
        self.values = values.view(N, P, E).float()

    def read(self, start: int, stop: int) -> Tensor:
        return self.values[start:stop]

    def gather(self, images: Tensor, positions: Tensor) -> Tensor:
        return self.values[images, positions]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def blobs(label: Tensor) -> PatchFeatures:
    """Features near one of some distant points, by label."""
    centers = torch.randn(int(label.max()) + 1, E, generator=generator(7)) * 20
    noise = torch.randn(*label.shape, E, generator=generator(8))
    return PatchFeatures(Vectors(centers[label] + noise), AffineMap(torch.zeros(1, E), None))


def labels(count: int, seed: int = 0) -> Tensor:
    return torch.randint(count, (N, P), generator=generator(seed))


def same_partition(one: Tensor, other: Tensor) -> bool:
    pairs = torch.stack([one.flatten().long(), other.flatten().long()]).unique(dim=1)
    return len(pairs[0]) == len(pairs[0].unique()) == len(pairs[1].unique())


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "CHUNK_ENTRIES", 7 * P * E)
    monkeypatch.setattr(clustering, "CHUNK_ENTRIES", 50)


def test_the_nearest_centroid_of_the_own_circuit() -> None:
    found = blobs(labels(4))
    circuit = labels(3, 1)
    centroids = [torch.randn(count, E, generator=generator(count)) * 20 for count in (3, 1, 5)]
    expected = torch.stack(
        [
            (x - centroids[g].float()).square().sum(1).argmin()
            for x, g in zip(found.vectors.values.view(-1, E), circuit.flatten().tolist())  # type: ignore[attr-defined]
        ]
    )
    assert torch.equal(nearest_centroids(found, circuit, centroids), expected.view(N, P).int())


def test_first_heads_are_the_clusters_inside_each_circuit() -> None:
    """Six blobs, three to a circuit."""
    label = labels(6)
    circuit = label // 3
    heads = first_heads(blobs(label), circuit, 2, 3, generator=generator())
    assert heads.dtype == torch.int16
    assert same_partition(circuit * 3 + heads, label)
    assert torch.equal(heads, first_heads(blobs(label), circuit, 2, 3, generator=generator()))


def test_few_or_equal_patches_give_fewer_heads() -> None:
    circuit = torch.zeros(N, P, dtype=torch.int64)
    circuit[0] = 1  # four patches
    circuit[1:20] = 2
    found = blobs(labels(4))
    found.vectors.values[1:20] = 1.0  # type: ignore[attr-defined]
    heads = first_heads(found, circuit, 4, 4, min_examples=2, generator=generator())  # circuit 3 has none
    for g, count in enumerate((4, 2, 1)):
        assert heads[circuit == g].unique().tolist() == list(range(count))


def grown(label: Tensor, heads: Tensor, circuit: Tensor, wanted: list[list[int]], num_heads: list[int]) -> Tensor:
    data: Any = None
    examples = Examples(data, circuit, heads)
    return recluster(blobs(label), examples, wanted, num_heads, generator=generator())


def test_copies_take_over_a_part_of_their_heads_patches() -> None:
    """Head 0 of circuit 0 holds two blobs, head 1 one, and does not grow; in circuit 1 head 1 grows before head 0."""
    label = labels(7)
    circuit = (label >= 3).long()
    heads = torch.tensor([0, 0, 1, 0, 0, 1, 1])[label].short()
    found = grown(label, heads, circuit, [[0], [1, 0]], [2, 2])
    assert found.dtype == torch.int16
    assert same_partition(circuit * 10 + found, label)
    assert torch.equal(found[label == 2], heads[label == 2])
    assert set(found[(circuit == 0) & (heads == 0)].tolist()) == {0, 2}
    # The copy of head 1 is head 2, that of head 0 is head 3.
    assert set(found[(circuit == 1) & (heads == 1)].tolist()) == {1, 2}
    assert set(found[(circuit == 1) & (heads == 0)].tolist()) == {0, 3}


def test_the_old_head_keeps_the_cluster_nearer_to_its_mean() -> None:
    """Nine tenths of its patches are in one blob: that stays the old head's."""
    label = (torch.rand(N, P, generator=generator()) < 0.1).long()
    zeros = torch.zeros(N, P, dtype=torch.int64)
    found = grown(label, zeros.short(), zeros, [[0]], [1])
    assert torch.equal(found.long(), label)


def test_copies_of_heads_with_equal_patches_stay_empty() -> None:
    zeros = torch.zeros(N, P, dtype=torch.int64)
    data: Any = None
    same = PatchFeatures(Vectors(torch.ones(N, P, E)), AffineMap(torch.zeros(1, E), None))
    found = recluster(same, Examples(data, zeros, zeros.short()), [[0]], [1], generator=generator())
    assert torch.equal(found.long(), zeros)


def test_nothing_grows() -> None:
    label = labels(2)
    assert torch.equal(grown(label, label.short(), torch.zeros_like(label), [[]], [2]), label.short())

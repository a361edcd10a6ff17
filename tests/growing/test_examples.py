"""Patches are walked over once each, with their circuits and heads."""

from typing import Any

import pytest
import torch

from lvd_lightning.growing import CircuitSize, examples


def test_every_patch_comes_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "CHUNK_IMAGES", 7)
    found = list(small.examples.chunks(torch.device("cpu")))
    assert len(found) == 8
    flat = torch.cat([chunk.flat for chunk in found])
    assert torch.equal(flat, torch.arange(200))
    assert torch.equal(torch.cat([chunk.x for chunk in found]), small.patches)
    assert torch.equal(torch.cat([chunk.circuit for chunk in found]), small.examples.circuit_NP.flatten())
    assert torch.equal(torch.cat([chunk.head for chunk in found]), small.examples.head_NP.flatten().long())


def test_patches_of_some_heads(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "CHUNK_IMAGES", 7)
    heads = torch.zeros(4, 3, dtype=torch.bool)
    heads[0, 1] = heads[2, 0] = True
    found = list(small.examples.chunks(torch.device("cpu"), heads))
    flat = torch.cat([chunk.flat for chunk in found])
    circuit, head = small.examples.circuit_NP.flatten(), small.examples.head_NP.flatten()
    wanted = ((circuit == 0) & (head == 1)) | ((circuit == 2) & (head == 0))
    assert torch.equal(flat, wanted.nonzero()[:, 0])
    assert torch.equal(torch.cat([chunk.x for chunk in found]), small.patches[wanted])


def test_patches_of_every_head_are_counted(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "CHUNK_IMAGES", 7)
    counts = small.examples.counts(4, 3)
    circuit, head = small.examples.circuit_NP, small.examples.head_NP
    for g in range(4):
        for h in range(3):
            assert int(counts[g, h]) == int(((circuit == g) & (head == h)).sum())
    assert int(counts[3].sum()) == int(counts[2, 2]) == 0


def test_the_size_of_circuits(small: Any) -> None:
    """HCLTs over 12 variables of H states: 11 inner edges of H x H, a root of heads x H."""
    size = CircuitSize.of(small.circuit)
    assert (size.clusters, size.heads) == (4, 8)
    assert size.edges == sum(11 * h * h + heads * h for h, heads in zip((2, 3, 4, 5), (2, 1, 3, 2)))
    assert size.parameters == small.circuit.num_parameters
    assert size.figures("after")["heads_after"] == 8.0


def test_masked_edges_do_not_count(small: Any) -> None:
    before = CircuitSize.of(small.circuit).edges
    node = small.graphs[1].nodes[small.graphs[1].root]
    node.mask = torch.tensor([[True, False, True]])
    node.weight = node.weight * node.mask / (node.weight * node.mask).sum()
    assert CircuitSize.of(small.circuit).edges == before - 1

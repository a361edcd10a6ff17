"""Means of heads and best heads are those of one circuit and patch at a time."""

from typing import Any

import pytest
import torch

from lvd_lightning.growing import best_heads, examples, mean_log_probs


@pytest.fixture(autouse=True)
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examples, "CHUNK_IMAGES", 7)


def test_means_over_own_patches(small: Any) -> None:
    mean, count = mean_log_probs(small.circuit, small.examples)
    log_nH = small.log_probs()
    circuit, head = small.examples.circuit_NP.flatten(), small.examples.head_NP.flatten()
    for g in range(4):
        for h in range(3):
            own = log_nH[(circuit == g) & (head == h), h]
            assert int(count[g, h]) == len(own)
            assert float(mean[g, h]) == pytest.approx(float(own.mean()), nan_ok=True)
    assert mean[2, 2].isnan()


def test_the_best_head_of_the_own_circuit(small: Any) -> None:
    found, mean = best_heads(small.circuit, small.examples)
    log_nH = small.log_probs()
    assert torch.equal(found.flatten().long(), log_nH.argmax(1))
    assert mean == pytest.approx(float(log_nH.amax(1).mean()))
    assert bool((found == 2).any())
    assert not torch.equal(found, small.examples.head_NP)


def test_another_head_has_to_be_better_by_the_reluctance(small: Any) -> None:
    log_nH = small.log_probs()
    own = small.examples.head_NP.flatten().long()
    stays = log_nH.amax(1) < log_nH.gather(1, own[:, None])[:, 0] + 1.0
    expected = torch.where(stays, own, log_nH.argmax(1))
    found, mean = best_heads(small.circuit, small.examples, reluctance=1.0)
    assert torch.equal(found.flatten().long(), expected)
    assert not torch.equal(expected, log_nH.argmax(1))
    assert mean == pytest.approx(float(log_nH.gather(1, expected[:, None]).mean()))
    unmoved, _ = best_heads(small.circuit, small.examples, reluctance=1e6)
    assert torch.equal(unmoved, small.examples.head_NP)


def test_a_patch_that_no_head_explains_stays(small: Any) -> None:
    """Circuits that know no value but 0: all other patches are impossible."""
    for graph in small.graphs:
        for node in graph.nodes:
            if node.params is not None:
                node.params = torch.eye(4)[torch.zeros(len(node.params), dtype=torch.int64)]
    found, mean = best_heads(small.circuit, small.examples, reluctance=1.0)
    assert torch.equal(found, small.examples.head_NP)
    assert mean == -torch.inf

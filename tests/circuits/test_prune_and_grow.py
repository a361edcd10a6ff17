"""Rounds of training, pruning and growing, and devices that decide the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import few_growing_structures
from helpers.edits import assert_same, assert_sound, count, draw, put_zeros

import lvd_lightning.circuits as pc


def test_structures_of_kronecker_products_are_pruned_but_do_not_grow(kronecker: Any) -> None:
    circuit = kronecker.circuit
    x, head = draw(circuit, [0, 1])
    with pytest.raises(ValueError, match=r"grow: node \d+ of circuit 0 is a Kronecker product"):
        pc.grow(circuit, count(circuit, x, head), [0])
    pruned = pc.prune(circuit, count(circuit, x, head), 0.08)
    assert_sound(pruned)
    assert sum(node.num_units for node in pruned.nodes) < sum(node.num_units for node in kronecker.graph.nodes)
    again = pc.Circuit(pruned)
    torch.testing.assert_close(again.log_prob(kronecker.x).logsumexp(0), torch.zeros(2), rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="Kronecker"):
        pc.grow(again, count(again, x, head), [0])


def test_rounds_of_training_pruning_and_growing(growing: Any, tmp_path: Path) -> None:
    check_rounds(pc.Anemone, growing, tmp_path)


@few_growing_structures
def test_rounds_of_mini_batch_em(growing: Any, tmp_path: Path) -> None:
    check_rounds(pc.CircuitEM, growing, tmp_path)


def check_rounds(rule: type, growing: Any, tmp_path: Path) -> None:
    graph = put_zeros(growing.graph)
    x = draw(pc.Circuit(graph), [0], 40)[0]
    for number in range(3):
        circuit = pc.Circuit(graph)
        best = circuit.log_prob(x).argmax(1)
        optimizer = rule(circuit, lr=0.5)
        for _ in range(2):
            optimizer.zero_grad()
            (-circuit.log_prob(x, head=best)).sum().backward()
            optimizer.step()
        pruned = pc.prune(circuit, count(circuit, x, best), 0.01)
        assert_sound(pruned)
        circuit = pc.Circuit(pruned)
        grown = pc.grow(
            circuit, count(circuit, x[best == 0], best[best == 0]), [0], 0.1, torch.Generator().manual_seed(number)
        )
        assert_sound(grown)
        assert grown.num_heads == graph.num_heads + 1
        graph = grown
    circuit = pc.Circuit(graph)
    assert bool((circuit.log_prob(x).amax(1) > -torch.inf).all())
    if not growing.x.is_floating_point():
        torch.testing.assert_close(
            circuit.log_prob(growing.x).logsumexp(0), torch.zeros(graph.num_heads), rtol=0, atol=1e-9
        )
    loaded = pc.load(pc.save(circuit, tmp_path / "circuit"))
    assert_same(loaded.to_graph(), graph, rtol=0)
    assert_same(circuit.to_graph(), graph, rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_decides_the_same(build_case: Callable[..., Any]) -> None:
    cases = [build_case("ragged", "categorical", 2), build_case("tied", "categorical", 1)]
    x = torch.stack([draw(case.circuit, [0], 20)[0] for case in cases])
    found = []
    for device in ("cpu", "cuda"):
        circuit = pc.Circuit([case.graph for case in cases]).to(device)
        flows = count(circuit, x.to(device), torch.zeros(2, 20, dtype=torch.int64))
        grown = pc.grow(circuit, flows, [[0], [0]], generator=torch.Generator().manual_seed(0))
        found.append([*pc.prune(circuit, flows, 0.01), *grown])
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert_same(on_cpu, on_gpu)

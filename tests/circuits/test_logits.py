"""Circuits with logits for gradient optimizers."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gradients import EXACT

import lvd_lightning.circuits as pc


def test_logits_compute_the_same_and_learn(case: Any) -> None:
    circuit = pc.Circuit(case.graph, parameterization="logits")
    np.testing.assert_allclose(circuit.log_prob(case.x).detach(), case.reference.log_prob(case.x), **EXACT)
    optimizer = torch.optim.Adam(circuit.parameters(), lr=0.05)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = -circuit.log_prob(case.x[:4]).sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if case.x.dtype == torch.int64:
        np.testing.assert_allclose(circuit.log_prob(case.x).exp().sum(0).detach(), 1, **EXACT)


OPTIMIZERS = {
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.3),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.3, weight_decay=0.5),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("structure", ["sparse", "shared", "ragged"])
def test_structural_zeros_stay_under_gradient_optimizers(
    name: str, structure: str, build_case: Callable[..., Any]
) -> None:
    case = build_case(structure, "categorical", 2)
    circuit = pc.Circuit(case.graph, parameterization="logits").float()
    optimizer = OPTIMIZERS[name](circuit.parameters())
    for _ in range(10):
        optimizer.zero_grad()
        (-circuit.log_prob(case.x[:9]).sum()).backward()
        optimizer.step()
    zeros, moved = 0, 0.0
    for node, before in zip(circuit.to_graph().nodes, case.graph.nodes, strict=True):
        if node.kind == "sum" and node.mask is not None:
            assert not node.weight[~node.mask].any()
            zeros, moved = zeros + int((~node.mask).sum()), moved + float((node.weight - before.weight).abs().sum())
    assert zeros > 2
    assert moved > 0.1


@pytest.mark.parametrize(("structure", "leaf"), [("sparse", "categorical"), ("chain", "mixed")])
def test_gradient_of_logits(structure: str, leaf: str, build_case: Callable[..., Any]) -> None:
    case = build_case(structure, leaf, 2)
    circuit = pc.Circuit(case.graph, parameterization="logits")
    found = torch.autograd.grad(circuit.log_prob(case.x).sum(), list(circuit.parameters()))
    with circuit.reference():
        expected = torch.autograd.grad(circuit.log_prob(case.x).sum(), list(circuit.parameters()))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)

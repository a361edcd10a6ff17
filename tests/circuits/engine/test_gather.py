"""Products that are stored, as several nodes use them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import lvd_lightning.circuits as pc


def test_stored_products_that_others_use_in_another_order(enumerate_trees: Callable[..., Any]) -> None:
    """Their rows are gathered from, and their gradients to, rows of the same matrix in no regular order."""
    graph = pc.CircuitGraph()
    leaves = [graph.add_input(v, pc.Categorical(3), 3) for v in range(4)]
    inner = graph.add_product(leaves[:2], torch.tensor([[2, 0], [0, 1], [1, 1], [0, 2]]))
    stored = graph.add_product([inner, leaves[2]], torch.tensor([[3, 1], [0, 0], [1, 2]]))
    turned = graph.add_product([stored, leaves[3]], torch.tensor([[2, 0], [0, 1], [1, 2]]))
    straight = graph.add_product([stored, leaves[3]])
    graph.root = graph.add_sum([turned, straight], 2)
    circuit, reference = pc.Circuit(graph), enumerate_trees(graph)
    x = torch.cartesian_prod(*[torch.arange(3)] * 4)
    log_prob = circuit.log_prob(x)
    np.testing.assert_allclose(log_prob.detach(), reference.log_prob(x), atol=1e-12)
    log_prob[:, 1].sum().backward()
    flows = reference.flows(x, np.array([[0.0, 1.0]]).repeat(len(x), 0))
    for group, table in zip(circuit.plan.groups, circuit.tables, strict=True):
        for row, (_, index) in enumerate(group.owners):
            np.testing.assert_allclose((table * table.grad)[row].detach(), flows[index], atol=1e-9)

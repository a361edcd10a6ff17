"""Flows as gradients, and how exactly they have to be those of enumeration."""

import copy
from typing import Any

import numpy as np
from torch import Tensor

import lvd_lightning.circuits as pc

__all__ = ["EXACT", "assert_flows", "flows_by_gradient"]


EXACT = {"rtol": 1e-8, "atol": 1e-12}


def flows_by_gradient(circuit: pc.Circuit, loss: Tensor) -> list[pc.CircuitGraph]:
    """Graphs whose parameters are theta * gradient of the log-likelihood, after `loss.backward()`."""
    circuit.zero_grad()
    loss.backward()
    flows = copy.deepcopy(circuit)
    for flow, parameter in zip(flows.parameters(), circuit.parameters(), strict=True):
        flow.data.copy_(-parameter.detach() * parameter.grad)
    graphs = flows.to_graph()
    return graphs if isinstance(graphs, list) else [graphs]


def assert_flows(graph: pc.CircuitGraph, reference: Any, expected: dict[int, np.ndarray]) -> None:
    for index, flow in expected.items():
        node = graph.nodes[index]
        found = (node.weight if node.kind == "sum" else node.params).numpy()
        if isinstance(node.distribution, pc.Binomial):
            p, total = reference.params[index][:, 0], node.distribution.total
            flow = ((flow[:, 1] - total * p * flow[:, 0]) / (1 - p))[:, None]
        elif isinstance(node.distribution, pc.Gaussian | pc.DiscretizedGaussian | pc.DiscretizedLogistic):
            mean, spread = reference.params[index].T
            weight, first, second = flow[:, -3:].T  # sums of (r, r y, r y^2) of a normal y with precision r / spread^2
            square = second - 2 * mean * first + mean**2 * weight
            flow = np.stack([mean * (first - mean * weight) / spread**2, square / spread**2 - flow[:, 0]], 1)
        np.testing.assert_allclose(found, flow, rtol=1e-8, atol=1e-11)

"""Steps of EM, optimizers of both rules, and parameters compared with those of enumeration."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

import lvd_lightning.circuits as pc

__all__ = ["assert_parameters", "optimizers", "step"]


def assert_parameters(circuit: pc.Circuit, references: list[Any], rtol: float = 1e-8) -> None:
    graphs = circuit.to_graph()
    for graph, reference in zip(graphs if isinstance(graphs, list) else [graphs], references, strict=True):
        for index, expected in reference.params.items():
            node = graph.nodes[index]
            found = (node.weight if node.kind == "sum" else node.params).numpy()
            np.testing.assert_allclose(found, expected, rtol=rtol, atol=1e-12, err_msg=f"node {index}")


def step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def optimizers(circuit: pc.Circuit) -> list[torch.optim.Optimizer]:
    return [pc.CircuitEM(circuit, lr=0.7, pseudocount=0.5), pc.Anemone(circuit, lr=0.7, pseudocount=0.5)]

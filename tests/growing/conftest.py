"""Small circuits with several heads, and patches that they model.

Shapes: N images, P = 4 patches, D = 12 variables of a patch, G = 4 circuits, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures
from torch import Tensor

import lvd_lightning.circuits as pc
from lvd_lightning.color import patchify
from lvd_lightning.growing import Examples

HEADS, CATEGORIES, IMAGES = (2, 1, 3, 2), 4, 50


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(threads)


class Images(Pictures):
    """Random 4 x 4 images of few values."""

    image_shape = (3, 4, 4)

    def __init__(self, count: int = IMAGES) -> None:
        generator = torch.Generator().manual_seed(3)
        self.x = torch.randint(CATEGORIES, (count, 3, 4, 4), dtype=torch.uint8, generator=generator)

    def batch(self, split: str, indices: Tensor) -> Tensor:
        assert split == "train"
        return self.x[indices]

    def num_examples(self, split: str) -> int:
        return len(self.x)


@dataclass
class Small:
    """Circuits, the patches that they model, and these as one table.

    The last circuit has no examples, nor has the last head of the third.
    """

    graphs: list[pc.CircuitGraph]
    examples: Examples

    @property
    def circuit(self) -> pc.Circuit:
        return pc.Circuit(self.graphs)

    @property
    def patches(self) -> Tensor:
        """(N P, D)."""
        return patchify(self.examples.data.x, 2).flatten(0, 1)  # type: ignore[attr-defined]

    def log_probs(self) -> Tensor:
        """log p of every patch under the heads of its circuit, one circuit at a time; (N P, 3)."""
        out = torch.full((len(self.patches), max(HEADS)), -torch.inf)
        of = self.examples.circuit_NP.flatten()
        for g, graph in enumerate(self.graphs):
            found = pc.Circuit(graph).log_prob(self.patches[of == g]).detach()
            out[of == g, : found.shape[1]] = found
        return out


@pytest.fixture
def small() -> Small:
    generator = torch.Generator().manual_seed(1)
    graphs = []
    for number, heads in enumerate(HEADS):
        tree = torch.arange(-1, 11) if number % 2 else torch.tensor([-1, *[0] * 11])
        graph = pc.hclt(tree, 2 + number, pc.Categorical(CATEGORIES), heads, generator=generator)
        for node in graph.nodes:
            if node.params is not None:
                node.params = node.params**3 / (node.params**3).sum(1, keepdim=True)
        graphs.append(graph)
    data: Any = Images()
    circuit_NP = torch.tensor([0, 0, 1, 2])[torch.randint(4, (IMAGES, 4), generator=generator)]
    last = torch.tensor([2, 1, 2, 1])
    head_NP = (torch.rand(circuit_NP.shape, generator=generator) * last[circuit_NP]).short()
    return Small(graphs, Examples(data, circuit_NP, head_NP))

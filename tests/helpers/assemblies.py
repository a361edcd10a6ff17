"""Small assembled circuits with their mathematics by brute force, and small runs of the circuit students.

Shapes: B images, P = 4 patches, D = 12 variables of a patch, K = 3 latent values.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from helpers.small_runs import DIMS, PATCH, POSITIONS, SIDE, STATES, Run, SmallImages
from lvd_lightning.color import patchify
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches

CATEGORIES = 4
#: Heads of the circuits of one set of conditionals, and whether positions share it.
KINDS = {"tied": ([1, 1, 1], True), "untied": ([1, 1, 1], False), "heads": ([2, 1], True), "both": ([1, 2], False)}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@dataclass
class Assembly:
    """An assembled circuit, and the same as single graphs."""

    circuit: AssembledCircuit
    graphs: list[pc.CircuitGraph]

    def given(self, images: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(observed part of x_i | z_i = k) one circuit at a time, (B, P, K)."""
        patches_BPD = patchify(images, PATCH)
        mask_BPD = None if observed is None else patchify(observed, PATCH)
        out_BPK = torch.zeros(len(images), POSITIONS, STATES)
        for p in range(POSITIONS):
            mask = None if mask_BPD is None else mask_BPD[:, p]
            found = [pc.Circuit(graph).log_prob(patches_BPD[:, p], observed=mask) for graph in self.graphs]
            heads = torch.cat(found, 1).detach()
            out_BPK[:, p] = heads if self.circuit.head_index.tied else heads[:, STATES * p : STATES * (p + 1)]
        return out_BPK

    def log_joint(self, images: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x, z) of every z, (B, K ** P)."""
        given_BPK = self.given(images, observed)
        z_TP = torch.tensor(list(itertools.product(range(STATES), repeat=POSITIONS)))
        certain = torch.full((len(z_TP), POSITIONS, STATES), -torch.inf).scatter_(2, z_TP[..., None], 0.0)
        log_z_T = pc.Circuit(self.circuit.prior.to_graph()).log_prob(certain)[:, 0].detach()
        return log_z_T + sum(given_BPK[:, p, z_TP[:, p]] for p in range(POSITIONS))


def assembly(kind: str, num_latents: int | None = None, seed: int = 0) -> Assembly:
    """Random circuits over 4 x 4 images of values below `CATEGORIES`."""
    generator = torch.Generator().manual_seed(seed)
    heads, tied = KINDS[kind]
    parents = torch.tensor([-1, 0, 0, 2])
    # Uneven ones: random parameters make every latent value as good as any other.
    prior = sharpened(pc.hclt(parents, num_latents or STATES, pc.SoftEvidence(STATES), generator=generator))
    graphs = []
    for number, count in enumerate(heads * (1 if tied else POSITIONS)):
        tree = torch.arange(-1, DIMS - 1) if number % 2 else torch.tensor([-1, *[0] * (DIMS - 1)])
        leaf = pc.Categorical(CATEGORIES)
        graphs.append(sharpened(pc.hclt(tree, 2 + number % 2, leaf, num_heads=count, generator=generator)))
    return Assembly(
        AssembledCircuit(pc.Circuit(prior), pc.Circuit(graphs), ImagePatches((3, SIDE, SIDE), PATCH)), graphs
    )


def sharpened(graph: pc.CircuitGraph) -> pc.CircuitGraph:
    """Further from uniform; several heads prefer different states of the root's latent."""
    for node in graph.nodes:
        if node.weight is not None:
            node.weight = node.weight**2 / (node.weight**2).sum(1, keepdim=True)
        if node.params is not None:
            node.params = node.params**3 / (node.params**3).sum(1, keepdim=True)
    root = graph.nodes[graph.root]
    assert root.weight is not None
    if graph.num_heads > 1:
        root.weight = 0.05 / root.weight.shape[1] + 0.95 * torch.eye(*root.weight.shape)
    return graph


@pytest.fixture
def make_assembly() -> Callable[..., Assembly]:
    """`make_assembly(kind, num_latents, seed)`; kind: one of tied, untied, heads, both."""
    return assembly


@pytest.fixture(params=KINDS)
def assembled(request: pytest.FixtureRequest, double_precision: None) -> Assembly:
    """Every kind of conditional, in float64."""
    return assembly(request.param)


@pytest.fixture
def images() -> Tensor:
    """Images whose values the small circuits know."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(CATEGORIES, (9, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run on small images."""
    return Run(tmp_path / "run")


@pytest.fixture
def make_run() -> type[Run]:
    """`Run(folder, data, num_states, seed)` for tests that choose."""
    return Run


@pytest.fixture
def small_images() -> type[SmallImages]:
    """`SmallImages(num_train, num_val, batch_size, num_states)`."""
    return SmallImages

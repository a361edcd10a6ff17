"""Small circuits of every structure with every family of leaves, their enumeration, and examples."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import lvd_lightning.circuits as pc
from helpers.enumeration import Reference
from helpers.families import table_of
from helpers.structures import ALL, COMPOSED, KRONECKER, STRUCTURES
from lvd_lightning.circuits.distributions.discretized import Discretized

__all__ = [
    "LEAVES",
    "Case",
    "few_discrete_structures",
    "few_growing_structures",
    "few_structures",
    "few_structures_and_a_batch",
    "list_cases",
    "make_batch",
    "make_case",
]


# A floor that EM reaches, yet wide enough for the reference's linear densities.
LEAVES = {"categorical": pc.Categorical(3), "bernoulli": pc.Bernoulli(), "gaussian": pc.Gaussian(min_std=0.3)}
# Leaves that meet some structures only, which saves time: a tree, shared and tied nodes, padded layers.
LEAVES |= {"binomial": pc.Binomial(2), "logistic": pc.DiscretizedLogistic(3, min_scale=0.2), "mixed": pc.Gaussian()}
LEAVES |= {"rounded": pc.DiscretizedGaussian(3, min_std=0.2)}
LEAVES |= {"ordered": pc.OrderedCategorical(3, share=0.3, width=0.8, constant=0.2)}
SOME = {"binomial": ("star", "tied", "ragged"), "logistic": ("star", "shared", "tied"), "mixed": ("chain", "shared")}
SOME |= {"rounded": ("star", "shared", "tied"), "ordered": ("star", "tied", "ragged")}
MIXTURE = (pc.Categorical(4), pc.Binomial(5), pc.Gaussian(min_std=0.3), pc.DiscretizedLogistic(6))


def mix(graph: pc.CircuitGraph) -> pc.CircuitGraph:
    """Give every variable a family of its own; of a graph without tied inputs."""
    for node in graph.nodes:
        if node.kind == "input":
            node.distribution = MIXTURE[node.variable]
            node.params = node.distribution.initial(node.num_units)
    return graph


def draw_values(distribution: pc.Distribution, number: int) -> Tensor:
    """Values of one variable, (number,)."""
    if isinstance(distribution, pc.Gaussian):
        return torch.randn(number)
    return torch.randint(0, num_values(distribution), (number,)).to(torch.get_default_dtype())


def num_values(distribution: pc.Distribution) -> int:
    """How many values a discrete variable has."""
    return len(table_of(distribution, distribution.initial(1).double().numpy())[0])


@dataclass
class Case:
    """A circuit, its enumeration, and examples: all worlds of discrete variables, or random rows.

    Of a batch of circuits there are lists of graphs and of enumerations.
    """

    graph: pc.CircuitGraph | list[pc.CircuitGraph]
    circuit: pc.Circuit
    reference: Reference | list[Reference]
    x: Tensor
    observed: Tensor


def make_case(structure: str, leaf: str, num_heads: int, seed: int = 0) -> Case:
    """Build a case; masks hold a row with nothing and one with everything observed."""
    torch.manual_seed(seed)
    distribution = LEAVES[leaf]
    graph = ALL[structure](distribution, num_heads)
    if leaf == "mixed":
        mix(graph)
    num_vars = graph.num_variables
    families = {node.variable: node.distribution for node in graph.nodes if node.kind == "input"}
    for node in graph.nodes:  # distinct spreads: the initial ones are all alike
        if isinstance(node.distribution, pc.Gaussian | Discretized) and node.tied_to is None:
            node.params[:, 1] = 0.5 + torch.rand(node.num_units)
    if leaf in ("gaussian", "mixed"):
        x = torch.stack([draw_values(families[v], 12) for v in range(num_vars)], 1)
    else:
        values = torch.arange(num_values(distribution))
        x = torch.cartesian_prod(*[values] * num_vars).view(-1, num_vars)
    observed = torch.rand(x.shape) < 0.6
    observed[0], observed[-1] = False, True
    return Case(graph, pc.Circuit(graph), Reference(graph), x, observed)


def list_cases(leaves: tuple[str, ...], skip: frozenset[str] = frozenset()) -> list[Any]:
    """Pairs of structure and leaf; one, two and three heads in turn."""
    names = itertools.product(enumerate(STRUCTURES), enumerate(leaves))
    cases = [
        (structure, leaf, 1 + (i + j) % 3)
        for (i, structure), (j, leaf) in names
        if structure in SOME.get(leaf, STRUCTURES)
    ]
    for i, (structure, (_, some)) in enumerate(COMPOSED.items()):
        cases += [(structure, leaf, 1 + (i + j) % 3) for j, leaf in enumerate(some) if leaf in leaves]
    return [pytest.param(found, id="{}-{}-{}heads".format(*found)) for found in cases if found[0] not in skip]


def make_batch() -> Case:
    """A tree and a DAG of two heads each, folded into one; both see all examples."""
    parts = [make_case(structure, "categorical", 2) for structure in ("chain", "shared")]
    graphs = [part.graph for part in parts]
    return Case(graphs, pc.Circuit(graphs), [part.reference for part in parts], parts[0].x, parts[0].observed)


#: A tree, leaves of several families, structural zeros, a DAG with shared nodes, padded layers, tied nodes of a hidden
#: Markov model, Kronecker products; with them every family of leaves.
FEW = (
    ("star", "categorical", 2),
    ("chain", "mixed", 3),
    ("sparse", "categorical", 3),
    ("shared", "logistic", 2),
    ("ragged", "binomial", 3),
    ("homogeneous", "gaussian", 2),
    ("tied", "rounded", 2),
    ("rat-kronecker", "bernoulli", 3),
)


def few(fixture: str, cases: Iterable[Any]) -> pytest.MarkDecorator:
    """Run a test of `fixture` on these cases instead of all: for what does not depend on the structure."""
    named = [pytest.param(found, id=found if found == "batch" else "{}-{}-{}heads".format(*found)) for found in cases]
    return pytest.mark.parametrize(fixture, named, indirect=True)


few_structures = few("case", FEW)
few_structures_and_a_batch = few("case", (*FEW, "batch"))
few_growing_structures = few("growing", [found for found in FEW if found[0] not in KRONECKER])
few_discrete_structures = few("discrete", [found for found in FEW if found[1] not in ("gaussian", "mixed")])

"""Random parameters of new nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_leaf
from lvd_lightning.circuits.distributions import Distribution, SoftEvidence
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["add_leaf", "add_mixture", "in_type", "leaf_families", "random_parameters", "random_rows"]


def leaf_families(caller: str, leaf: Distribution | Sequence[Distribution], size: int) -> list[Distribution]:
    """The distribution of every variable."""
    if isinstance(leaf, Distribution):
        return [leaf] * size
    given: object = leaf
    if not isinstance(given, Iterable):
        check_leaf(f"{caller}: leaf", given)
    found = list(leaf)
    for variable, family in enumerate(found):
        check_leaf(f"{caller}: leaf: of variable {variable}", family)
    if len(found) != size or any(family.is_evidence for family in found):
        raise ValueError(f"{caller}: leaf: got {found}, expected one distribution, or {size} without soft evidence")
    return found


def random_rows(shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype) -> Tensor:
    """Positive rows (the last dimension) that sum to one, none of their entries close to zero."""
    weight = torch.rand(shape, generator=generator, dtype=dtype) + 0.05
    return weight / weight.sum(-1, keepdim=True)


def in_type(leaf: Distribution, params: Tensor, dtype: torch.dtype) -> Tensor:
    """Parameters (..., size) in another type; in a wider one the rows of a table are made to sum to one there."""
    found = params.to(dtype)
    if not leaf.is_table or torch.finfo(dtype).eps >= torch.finfo(params.dtype).eps:
        return found
    return found / found.sum(-1, keepdim=True)


def random_parameters(
    leaf: Distribution, num_units: int, generator: torch.Generator | None, dtype: torch.dtype
) -> Tensor:
    """`Distribution.initial`, whose draws are of the default type, in the type asked for."""
    return in_type(leaf, leaf.initial(num_units, generator=generator), dtype)


def add_mixture(
    graph: CircuitGraph,
    children: list[int],
    num_units: int,
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    like: int | None = None,
) -> int:
    """Add a sum over `children` with random weights, or with those of the node `like`."""
    if like is not None:
        return graph.add_sum(children, num_units, tied_to=like)
    width = sum(graph.nodes[child].num_units for child in children)
    return graph.add_sum(children, num_units, weight=random_rows((num_units, width), generator, dtype))


def add_leaf(
    graph: CircuitGraph,
    variable: int,
    leaf: Distribution,
    num_units: int,
    *,
    generator: torch.Generator | None,
    dtype: torch.dtype,
    like: int | None = None,
) -> int:
    """Add `num_units` random distributions of a variable; returns the id of the node that has them.

    Soft evidence with another number of states gets a sum on top, the emission p(z | unit). `like`: the id returned for
    another variable, whose parameters this one shares.
    """
    if isinstance(leaf, SoftEvidence):
        states = graph.add_input(variable, leaf, leaf.num_states)
        if leaf.num_states == num_units:
            return states
        return add_mixture(graph, [states], num_units, generator=generator, dtype=dtype, like=like)
    if like is not None:
        return graph.add_input(variable, leaf, num_units, tied_to=like)
    params = random_parameters(leaf, num_units, generator, dtype)
    return graph.add_input(variable, leaf, num_units, params=params)

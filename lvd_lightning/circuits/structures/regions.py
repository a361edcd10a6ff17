"""From a region graph to a circuit: what RAT-SPNs and Poon-Domingos structures have in common.

A region is a set of variables; a partition of a region is a pair of disjoint regions that make it up. A region that has
partitions becomes a sum node over all of them, a partition a product node, a region that has none a factorised leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import torch

from lvd_lightning.circuits.checks import check_counts, check_generator, float_type
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.drawing import add_leaf, add_mixture, leaf_families

__all__ = ["ProductKind", "region_circuit"]

ProductKind = Literal["hadamard", "kronecker"]
Region = TypeVar("Region", bound=Hashable)


def region_circuit(
    caller: str,
    partitions: Mapping[Region, Sequence[tuple[Region, Region]]],
    variables: Callable[[Region], Sequence[int]],
    *,
    num_sums: int,
    num_leaves: int,
    leaf: Distribution | Sequence[Distribution],
    num_heads: int,
    product: ProductKind,
    generator: torch.Generator | None,
    dtype: torch.dtype | None,
) -> CircuitGraph:
    """Build the circuit of a region graph, with random parameters.

    Hadamard products need equal widths: where `num_leaves` differs from `num_sums`, a leaf region gets a sum node of
    `num_sums` units on top.

    Args:
        caller: named in errors.
        partitions: of every region, none of a leaf; smaller regions before those that contain them, the root last.
        variables: the variables of a leaf region.
        num_sums: units of every region with partitions, except for the root.
        num_leaves: units of every leaf region.
        leaf: input distribution of every variable, or a list with one for each.
        num_heads: units of the root.
        product: "hadamard" multiplies unit k of both regions; "kronecker" has a unit for every pair of units.
        generator: on the CPU.
        dtype: of all parameters; the default type if not given.

    Returns:
        The graph; `latents[i]` is the product node of the i-th partition.
    """
    check_counts(caller, num_sums=num_sums, num_leaves=num_leaves, num_heads=num_heads)
    num_variables = 1 + max(v for region, found in partitions.items() if not found for v in variables(region))
    families = leaf_families(caller, leaf, num_variables)
    if product not in ("hadamard", "kronecker"):
        raise ValueError(f"{caller}: product: got {product!r}, expected 'hadamard' or 'kronecker'")
    dtype = float_type(caller, dtype)
    check_generator(caller, generator)
    graph = CircuitGraph()
    node_of: dict[Region, int] = {}
    root = list(partitions)[-1]
    for region, found in partitions.items():
        width = num_heads if region == root else num_sums
        if found:
            children = [_add_product(graph, [node_of[part] for part in parts], product) for parts in found]
            graph.latents.update(enumerate(children, len(graph.latents)))
        else:
            inputs = [
                add_leaf(graph, v, families[v], num_leaves, generator=generator, dtype=dtype) for v in variables(region)
            ]
            children = [inputs[0] if len(inputs) == 1 else graph.add_product(inputs)]
            if region != root and (product == "kronecker" or num_leaves == num_sums):
                node_of[region] = children[0]
                continue
        node_of[region] = add_mixture(graph, children, width, generator=generator, dtype=dtype)
    return graph


def _add_product(graph: CircuitGraph, children: list[int], product: ProductKind) -> int:
    if product == "hadamard":
        return graph.add_product(children)
    first, second = (torch.arange(graph.nodes[child].num_units) for child in children)
    return graph.add_product(children, torch.cartesian_prod(first, second))

"""RAT-SPNs: random and tensorized sum-product networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lvd_lightning.circuits.checks import check_counts, check_generator
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.regions import ProductKind, region_circuit

__all__ = ["rat_spn"]

Region = tuple[int, ...]


def rat_spn(
    num_vars: int,
    *,
    depth: int,
    num_repetitions: int,
    num_sums: int,
    num_leaves: int,
    leaf: Distribution | Sequence[Distribution],
    num_heads: int = 1,
    product: ProductKind = "hadamard",
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> CircuitGraph:
    """Random region splits, several times over, mixed at the root.

    Each repetition splits all variables into two random halves, each half again, and so on for `depth` levels or until
    single variables are left. The regions that are left are leaves: products of one input node per variable, which no
    other region uses. A region is the set of its variables: repetitions that arrive at the same one share its node,
    which then mixes the partitions of all of them.

    Structure and parameters are drawn at random, from `generator` alone if there is one.

    Args:
        num_vars: number of variables.
        depth: how often a repetition splits, at least 1.
        num_repetitions: how many trees of regions.
        num_sums: units of a region between root and leaves.
        num_leaves: units of a leaf region. With Hadamard products, if it is not `num_sums`, a sum node of `num_sums`
            units follows.
        leaf: input distribution of every variable, or a list with one for each.
        num_heads: units of the root.
        product: "hadamard": unit k of a product multiplies unit k of both parts. "kronecker": a unit for every pair of
            units of the two parts, as published; such a circuit can be pruned but does not grow.
        generator: on the CPU.
        dtype: of all parameters, float32 or float64; the default type if not given.

    Returns:
        The graph; `latents[i]` is the product node of the i-th partition, smaller regions first. Partitions of one
        region exclude each other, so posteriors are joint ones with reaching them.

    Raises:
        ValueError: a count that is no whole number of at least 1, a leaf that is no distribution, an unknown
            product, or a generator or type of another kind.

    References:
        Peharz et al., Random Sum-Product Networks: A Simple and Effective Approach to Probabilistic Deep Learning,
        2019 (arXiv 1806.01910), section 3.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.rat_spn(6, depth=2, num_repetitions=3, num_sums=4, num_leaves=4, leaf=pc.Gaussian())
        >>> pc.Circuit(graph).sample(10).shape
        torch.Size([10, 6])
    """
    check_generator("rat_spn", generator)
    check_counts("rat_spn", num_vars=num_vars, depth=depth, num_repetitions=num_repetitions)
    return region_circuit(
        "rat_spn",
        _random_regions(num_vars, depth, num_repetitions, generator),
        lambda region: region,
        num_sums=num_sums,
        num_leaves=num_leaves,
        leaf=leaf,
        num_heads=num_heads,
        product=product,
        generator=generator,
        dtype=dtype,
    )


def _random_regions(
    num_vars: int, depth: int, num_repetitions: int, generator: torch.Generator | None
) -> dict[Region, list[tuple[Region, Region]]]:
    """The partitions of every region, smaller regions first."""
    root = tuple(range(num_vars))
    partitions: dict[Region, list[tuple[Region, Region]]] = {root: []}
    for _ in range(num_repetitions):
        level = [root]
        for _ in range(depth):
            below: list[Region] = []
            for region in level:
                if len(region) == 1:
                    continue
                parts = _halves(region, generator)
                if parts not in partitions[region]:
                    partitions[region].append(parts)
                below += parts
            for region in below:
                partitions.setdefault(region, [])
            level = below
    return {region: partitions[region] for region in sorted(partitions, key=lambda found: (len(found), found))}


def _halves(region: Region, generator: torch.Generator | None) -> tuple[Region, Region]:
    """Two random parts whose sizes differ by at most one; the one that holds the first variable comes first."""
    order = torch.randperm(len(region), generator=generator).tolist()
    half = len(region) // 2
    one, other = (tuple(sorted(region[place] for place in part)) for part in (order[:half], order[half:]))
    return (one, other) if one < other else (other, one)

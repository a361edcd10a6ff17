"""Hidden Chow-Liu trees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import as_indices, check_counts, check_generator, float_type
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.circuits.structures.drawing import leaf_families, random_parameters, random_rows

__all__ = ["hclt"]


def hclt(
    parents: Tensor | Sequence[int],
    num_latents: int,
    leaf: Distribution | Sequence[Distribution],
    num_heads: int = 1,
    *,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> CircuitGraph:
    r"""Hidden Chow-Liu tree: every variable v hangs on a latent y_v, and the latents form the tree.

    .. math:: p(x) = \sum_y p(y_{root}) \prod_v p(x_v | y_v) \prod_{v \ne root} p(y_v | y_{pa(v)})

    Parameters are drawn at random. With `leaf=SoftEvidence(K)` and `num_latents == K` the latents are the variables
    themselves (a Chow-Liu tree over z).

    Args:
        parents: int (D,), the parent of every variable, -1 at the root (see `chow_liu_tree`); a list will do.
        num_latents: states of each latent.
        leaf: input distribution of every variable, or a list of D of them, one for each; then none is soft evidence.
        num_heads: rows p(y_root | head), one circuit each, that share everything below.
        generator: on the CPU.
        dtype: of all parameters, float32 or float64; the default type if not given. The parameters of leaves are drawn
            in the default type and, if that is narrower, normalised again.

    Returns:
        The graph; `latents[v]` is the node whose unit k stands for y_v = k.

    Raises:
        ValueError: parents that are no tree, a count that is no whole number of at least 1, a leaf that is no
            distribution, or a generator or type of another kind.

    References:
        Liu and Van den Broeck, Tractable Regularization of Probabilistic Circuits, 2021 (arXiv 2106.02264), section 5.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(256))
        >>> pc.Circuit(graph).num_parameters  # three leaves, two transitions, the root
        3087
    """
    parent_list = as_indices("hclt: parents", parents).tolist()
    order = _topological(parent_list)
    check_counts("hclt", num_latents=num_latents, num_heads=num_heads)
    dtype = float_type("hclt", dtype)
    check_generator("hclt", generator)
    size = len(parent_list)
    families = leaf_families("hclt", leaf, size)
    leaves = _leaf_parameters(families, num_latents, generator, dtype)
    states = getattr(families[0], "num_states", num_latents) if families[0].is_evidence else num_latents
    emission = states != num_latents
    weights = random_rows((size, num_latents, num_latents), generator, dtype)
    emissions = random_rows((size, num_latents, states), generator, dtype) if emission else None
    graph = CircuitGraph()
    above: list[list[int]] = [[] for _ in range(size)]
    for v in order:
        node = Node("input", states, variable=v, distribution=families[v], params=leaves[v])
        below = _append(graph, node)
        if emissions is not None:
            below = _append(graph, Node("sum", num_latents, (below,), weight=emissions[v]))
        graph.latents[v] = _append(graph, Node("product", num_latents, (below, *above[v])))
        if parent_list[v] >= 0:
            found = _append(graph, Node("sum", num_latents, (graph.latents[v],), weight=weights[v]))
            above[parent_list[v]].append(found)
    root = random_rows((num_heads, num_latents), generator, dtype)
    graph.root = _append(graph, Node("sum", num_heads, (graph.latents[order[-1]],), weight=root))
    return graph


def _append(graph: CircuitGraph, node: Node) -> int:
    """Straight into the list: thousands of nodes that are right by construction."""
    graph.nodes.append(node)
    return len(graph.nodes) - 1


def _leaf_parameters(
    families: list[Distribution], num_units: int, generator: torch.Generator | None, dtype: torch.dtype
) -> list[Tensor | None]:
    """Random parameters of every variable's units, (num_units, size of its family)."""
    if len(set(families)) == 1:  # all at once: thousands of variables take no loop
        family = families[0]
        if family.size == 0:
            return [None] * len(families)
        params = random_parameters(family, len(families) * num_units, generator, dtype)
        return list(params.view(len(families), num_units, family.size))
    return [random_parameters(family, num_units, generator, dtype) for family in families]


def _topological(parents: list[int]) -> list[int]:
    """Variables with children before parents; raises if `parents` is not one tree."""
    roots = [v for v, parent in enumerate(parents) if parent == -1]
    for v, parent in enumerate(parents):
        if not -1 <= parent < len(parents):
            raise ValueError(
                f"hclt: parents: variable {v} has parent {parent}, expected -1 (the root) or 0..{len(parents) - 1}"
            )
    if len(roots) != 1:
        raise ValueError(f"hclt: parents: expected one root (-1), got {len(roots)}: variables {roots[:8]}")
    children: list[list[int]] = [[] for _ in parents]
    for v, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(v)
    order = [roots[0]]
    for v in order:
        order.extend(children[v])
    if len(order) != len(parents):
        raise ValueError(f"hclt: parents: variables {sorted(set(range(len(parents))) - set(order))[:8]} form a cycle")
    return order[::-1]

"""Hidden Chow-Liu trees whose first parameters come from data: latents start as quantiles of their variables.

Shapes: N examples, D variables, H latent states.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import as_indices, check_generator, check_type, plain_integers
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.counting import check_examples, check_heads, leaves_from_data
from lvd_lightning.circuits.structures.drawing import leaf_families
from lvd_lightning.circuits.structures.hclt import hclt

__all__ = ["hclt_from_data"]


def hclt_from_data(
    x: Tensor,
    parents: Tensor | Sequence[int],
    num_latents: int,
    leaf: Distribution | Sequence[Distribution],
    *,
    num_heads: int = 1,
    head: Tensor | None = None,
    smoothing: float = 0.5,
    generator: torch.Generator | None = None,
) -> CircuitGraph:
    """An HCLT whose latent y_v is, to begin with, the quantile of x_v among `num_latents`.

    Ranks (ties in random order) cut every variable's examples into `num_latents` equal parts. Leaves come from the
    values in each part (`Distribution.from_data`: counts, or moments), edges count which parts occur together, and both
    are smoothed: towards the variable's marginal and towards uniform. From there EM needs few steps, where random
    parameters need epochs, because neighbouring variables already agree on what their latents mean. Heads, if there are
    several, differ in how often the root's parts came among their own examples (each smoothed towards uniform by
    `smoothing` times the mean count).

    Args:
        x: (N, D), whole numbers for families over these, with N of a few hundred or more.
        parents: (D,), from `chow_liu_tree`.
        num_latents: H.
        leaf: input distribution of every variable, or a list of D of them, one for each.
        num_heads: heads, which share everything below the root.
        head: int (N,), the head of every example; may be left away if there is one.
        smoothing: what the smoothing adds, as a share of the counts; for leaves see `Distribution.from_data`.
        generator: on the CPU.

    Raises:
        ValueError: the data are no values of the leaf, or fit no tree over their variables.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> x = (torch.arange(400) % 4)[:, None].repeat(1, 3)  # three copies of one variable: log 4 = 1.39 nats
        >>> graph = pc.hclt_from_data(x, [-1, 0, 1], num_latents=4, leaf=pc.Categorical(4), smoothing=0.01)
        >>> print(f"{pc.Circuit(graph).log_prob(x).mean():.2f}")
        -1.42
    """
    if not smoothing > 0:
        raise ValueError(
            f"smoothing: got {smoothing}, expected a positive number, or some parameters are zero for good"
        )
    check_type("hclt_from_data: x", x, Tensor)
    x, head = plain_integers(x), plain_integers(head)
    check_generator("hclt_from_data", generator)
    parents = as_indices("hclt_from_data: parents", parents)
    graph = hclt(parents, num_latents, leaf, num_heads, generator=generator)
    families = leaf_families("hclt_from_data", leaf, len(parents))
    check_examples(x, families)
    head_N = check_heads(head, num_heads, len(x))
    x, parents = x.cpu(), parents.cpu()
    is_whole_D = torch.tensor([family.is_whole for family in families])
    state_ND = _quantiles(x, is_whole_D, num_latents, generator)
    leaves = leaves_from_data(families, x, state_ND, num_latents, smoothing)
    edges_DHH = _edge_counts(state_ND, parents, num_latents) + smoothing * len(x) / num_latents**2
    edges_DHH /= edges_DHH.sum(-1, keepdim=True)
    variable_of = {node: v for v, node in graph.latents.items()}
    shape = (num_heads, num_latents)
    for node in graph.nodes:
        if node.kind == "input":
            node.params = leaves[node.variable]
        elif node.kind == "sum":
            v = variable_of[node.children[0]]
            node.weight = edges_DHH[v] if int(parents[v]) >= 0 else _root_rows(state_ND[:, v], head_N, shape, smoothing)
    return graph


def _root_rows(state_N: Tensor, head_N: Tensor, shape: tuple[int, int], smoothing: float) -> Tensor:
    """p(state of the root | head) from counts, (heads, H); uniform for a head without examples, or a single one."""
    num_heads, num_latents = shape
    if num_heads == 1:  # its parts are equal by construction
        return torch.full(shape, 1.0 / num_latents)
    counts = torch.bincount(head_N * num_latents + state_N, minlength=num_heads * num_latents).view(shape)
    rows = counts.to(torch.get_default_dtype())
    rows = rows + (smoothing * rows.mean(1, keepdim=True)).clamp_min(1.0 / num_latents)
    return rows / rows.sum(1, keepdim=True)


def _quantiles(x_ND: Tensor, is_whole_D: Tensor, num_latents: int, generator: torch.Generator | None) -> Tensor:
    """Which of `num_latents` equal parts each value falls into, ties in random order; int64 (N, D)."""
    noise_ND = torch.rand(x_ND.shape, generator=generator, dtype=torch.float64)
    order_ND = (x_ND.double() + noise_ND).argsort(0)
    if not bool(is_whole_D.all()):  # values that lie as close as the noise is large are sorted themselves
        mixed_ND = noise_ND.argsort(0)
        sorted_ND = mixed_ND.gather(0, x_ND.double().gather(0, mixed_ND).argsort(dim=0, stable=True))
        order_ND = torch.where(is_whole_D, order_ND, sorted_ND)
    return order_ND.argsort(0) * num_latents // len(x_ND)


def _edge_counts(state_ND: Tensor, parents: Tensor, num_latents: int) -> Tensor:
    """How often each part came with each part of the parent, (D, H, H); the root's entry means nothing."""
    size = state_ND.shape[1]
    above_ND = state_ND[:, parents.clamp_min(0)]
    cell = (torch.arange(size) * num_latents + above_ND) * num_latents + state_ND
    counts = torch.bincount(cell.reshape(-1), minlength=size * num_latents**2)
    return counts.view(size, num_latents, num_latents).to(torch.get_default_dtype())

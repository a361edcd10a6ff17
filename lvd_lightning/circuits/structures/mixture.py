"""Mixtures of whole circuits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_counts, check_generator, check_type, described
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["mixture"]


def mixture(
    graphs: Sequence[CircuitGraph],
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
    num_heads: int = 1,
    *,
    generator: torch.Generator | None = None,
) -> CircuitGraph:
    r"""One sum over the heads of several circuits, such as hidden Chow-Liu trees over different trees.

    .. math:: p_h(x) = \sum_i w_{hi} p_i(x)

    Parameters are copied: training the mixture leaves `graphs` as they are.

    Args:
        graphs: circuits over the same variables.
        weights: of all heads of all graphs one after another, shape (heads of all graphs,), the same for all heads of
            the mixture, or (num_heads, heads of all graphs). Rows are normalised; drawn at random if not given. An
            edge of weight 0 is no structural zero: pseudocounts of EM may give it weight again.
        num_heads: heads of the mixture.
        generator: on the CPU, for the weights.

    Returns:
        The graph. Latents of the first circuit keep their names; those of the others follow, each circuit's behind the
        largest name before it. For trees over D variables latent v of circuit i is called `i * D + v`.

    Raises:
        ValueError: no graphs, graphs over different variables, weights of another shape, negative or not finite.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> trees = [pc.hclt(parents, 2, pc.Bernoulli()) for parents in ([-1, 0, 1], [1, -1, 1])]
        >>> both = pc.Circuit(pc.mixture(trees, weights=[0.3, 0.7]))
        >>> x = torch.tensor([[0, 1, 1]])
        >>> first, second = (pc.Circuit(tree).log_prob(x).exp() for tree in trees)
        >>> torch.allclose(both.log_prob(x).exp(), 0.3 * first + 0.7 * second)
        True
    """
    check_counts("mixture", num_heads=num_heads)
    check_generator("mixture", generator)
    if not isinstance(graphs, Iterable):
        raise ValueError(f"mixture: graphs: got {described(graphs)}, expected a list of graphs")
    graphs = list(graphs)
    if not graphs:
        raise ValueError("mixture: graphs is empty, expected at least one")
    for number, found in enumerate(graphs):
        check_type(f"mixture: graphs[{number}]", found, CircuitGraph)
    scopes = [_variables(found) for found in graphs]
    odd = [i for i, scope in enumerate(scopes) if scope != scopes[0]]
    if odd:
        raise ValueError(
            f"mixture: graphs must have the same variables; those of graph {odd[0]} are {_few(scopes[odd[0]])}, those "
            f"of graph 0 are {_few(scopes[0])}"
        )
    out = CircuitGraph()
    roots = [out.embed(found, latents=1 + max(out.latents, default=-1)) for found in graphs]
    out.add_sum(roots, num_heads, weight=_weights(weights, out, roots, num_heads, generator))
    return out


def _weights(
    weights: Tensor | Sequence[float] | Sequence[Sequence[float]] | None,
    graph: CircuitGraph,
    roots: list[int],
    num_heads: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Weights (num_heads, heads of all components) in the type of the components' own; not yet normalised."""
    width = sum(graph.nodes[root].num_units for root in roots)
    tensors = (found for node in graph.nodes for found in (node.weight, node.params) if found is not None)
    first = next(tensors, None)
    dtype = torch.get_default_dtype() if first is None else first.dtype
    if weights is None:
        return torch.rand(num_heads, width, generator=generator, dtype=dtype) + 0.05
    try:
        given = torch.as_tensor(weights, dtype=dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"mixture: weights: got {described(weights)}, expected numbers in rows of one length"
        ) from error
    if tuple(given.shape) not in ((width,), (num_heads, width)):
        raise ValueError(
            f"mixture: weights must have shape ({width},) or ({num_heads}, {width}), as the graphs have {width} heads "
            f"together; got {tuple(given.shape)}"
        )
    if not bool(given.isfinite().all()) or bool((given < 0).any()) or not bool((given.sum(-1) > 0).all()):
        raise ValueError(
            f"mixture: weights: got {given.tolist()}, expected finite numbers of 0 or more and a positive sum per row"
        )
    return given.expand(num_heads, width).clone()


def _variables(graph: CircuitGraph) -> set[int]:
    return {node.variable for node in graph.nodes if node.kind == "input"}


def _few(variables: set[int]) -> str:
    found = sorted(variables)
    return f"{found[:8]}{' ...' if len(found) > 8 else ''}"

"""First parameters of RAT-SPNs and Poon-Domingos structures from data: units start as clusters of their regions.

Shapes: N examples, D variables, K units, H rows of a sum, M its columns, R groups of units, S numbers stored per
unit.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_generator, plain_integers
from lvd_lightning.circuits.distributions import Distribution
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.circuits.structures.counting import check_examples, check_heads
from lvd_lightning.circuits.structures.drawing import in_type

__all__ = ["regions_from_data"]

#: Steps of power iteration towards the first principal component, and of K-means from its quantiles.
POWER_STEPS, CLUSTER_STEPS = 10, 2


def regions_from_data(
    graph: CircuitGraph,
    x: Tensor,
    *,
    head: Tensor | None = None,
    smoothing: float = 0.5,
    generator: torch.Generator | None = None,
) -> CircuitGraph:
    """A RAT-SPN or Poon-Domingos structure whose units are, to begin with, clusters of the values in their regions.

    The examples are cut into as many parts as a region has units, by what its variables are: quantiles of their first
    principal component, from which a few steps of K-means start, all of it on variables divided by their deviations
    (plus one where values are whole, so that noise of a single step does not count). So parts come in an order that is
    about the same in every region, which matters where several partitions share one. With Hadamard products a product's
    unit stands for a part of the region that is partitioned, with Kronecker products for a part of each factor. Weights
    of sums count which parts occur together, inputs come from the values in a part (`Distribution.from_data`: counts,
    or moments), and both are smoothed: towards uniform and towards the variable's marginal. As with `hclt_from_data`,
    EM needs far fewer steps from there than from random parameters.

    Args:
        graph: from `rat_spn` or `poon_domingos`, without soft evidence, nothing pruned or tied; it stays as it is.
        x: (N, D), whole numbers for families over these, with N of a few hundred or more.
        head: int (N,), the head of every example; may be left away if there is one.
        smoothing: what the smoothing adds, as a share of the counts; for leaves see `Distribution.from_data`.
        generator: on the CPU, for the order of ties.

    Returns:
        The same structure with other parameters.

    Raises:
        ValueError: the data are no values of the inputs or have another number of variables, no `head` for several
            heads, a graph whose sums are no sums over regions.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> x = (torch.arange(400) % 4)[:, None].repeat(1, 4)  # copies of one variable
        >>> graph = pc.rat_spn(4, depth=1, num_repetitions=2, num_sums=4, num_leaves=4, leaf=pc.Categorical(4))
        >>> better = pc.regions_from_data(graph, x)
        >>> bool((pc.Circuit(better).log_prob(x) > pc.Circuit(graph).log_prob(x)).all())
        True
    """
    check_generator("regions_from_data", generator)
    if not smoothing > 0:
        raise ValueError(
            f"smoothing: got {smoothing}, expected a positive number, or some parameters are zero for good"
        )
    _check_graph(graph)
    families = _families(graph)
    x, head = plain_integers(x), plain_integers(head)
    check_examples(x, families)
    head_N = check_heads(head, graph.num_heads, len(x))
    parts = _Parts(graph, x.cpu(), torch.tensor([family.is_whole for family in families]), generator)
    meanings = _meanings(graph)
    nodes = [dataclasses.replace(node) for node in graph.nodes]
    for index, node in enumerate(nodes):
        if node.kind == "product":
            continue
        rows = [head_N] if index == graph.root else [parts.of(*found) for found in sorted(meanings[index])]
        if node.kind == "sum":
            node.weight = _weights(node, rows, [parts.of_child(child) for child in node.children], graph, smoothing)
        else:
            node.params = _inputs(node, rows, parts.x_ND[:, node.variable], smoothing)
    return CircuitGraph(nodes, graph.root, dict(graph.latents))


class _Parts:
    """Which part of each region every example belongs to, computed once per region and number of parts."""

    def __init__(
        self, graph: CircuitGraph, x_ND: Tensor, is_whole_D: Tensor, generator: torch.Generator | None
    ) -> None:
        self.graph, self.x_ND, self.generator = graph, x_ND, generator
        self.scopes = graph.scopes()
        x_ND = x_ND.float()
        deviation_D = x_ND.std(0, unbiased=False)
        deviation_D += torch.where(is_whole_D, 1.0, torch.finfo(deviation_D.dtype).tiny)
        self.scaled_ND = (x_ND - x_ND.mean(0)) / deviation_D
        self.found: dict[tuple[frozenset[int], int], Tensor] = {}

    def of(self, node: int, size: int) -> Tensor:
        """The part of each example among `size` parts of a node's region, int64 (N,)."""
        scope = self.scopes[node]
        if (scope, size) not in self.found:
            self.found[scope, size] = _clusters(self.scaled_ND[:, sorted(scope)], size, self.generator)
        return self.found[scope, size]

    def of_child(self, index: int) -> Tensor:
        """The unit of a sum's child that each example belongs to, int64 (N,)."""
        node = self.graph.nodes[index]
        if not node.kronecker:
            return self.of(index, node.num_units)
        out_N = torch.zeros(len(self.x_ND), dtype=torch.int64)
        for child in node.children:
            size = self.graph.nodes[child].num_units
            out_N = out_N * size + self.of(child, size)
        return out_N


def _clusters(x_ND: Tensor, size: int, generator: torch.Generator | None) -> Tensor:
    """Clusters of the rows of centred data, in the order of their first principal component; int64 (N,)."""
    direction_D = torch.ones(x_ND.shape[1], dtype=x_ND.dtype)
    for _ in range(POWER_STEPS):
        following_D = x_ND.T @ (x_ND @ direction_D)
        if not float(following_D.norm()) > 0:  # all rows are equal
            break
        direction_D = following_D / following_D.norm()
    shuffled_N = torch.randperm(len(x_ND), generator=generator)  # ties come in random order
    order_N = shuffled_N[(x_ND @ direction_D)[shuffled_N].argsort(stable=True)]
    part_N = torch.empty_like(order_N)
    part_N[order_N] = torch.arange(len(order_N)) * size // len(order_N)
    if x_ND.shape[1] == 1:  # quantiles are as good, and of equal size
        return part_N
    for _ in range(CLUSTER_STEPS):
        count_K = torch.bincount(part_N, minlength=size).clamp_min(1)
        centre_KD = x_ND.new_zeros(size, x_ND.shape[1]).index_add_(0, part_N, x_ND) / count_K[:, None]
        part_N = torch.addmm(centre_KD.square().sum(1), x_ND, centre_KD.T, alpha=-2).argmin(1)
    return part_N


def _families(graph: CircuitGraph) -> list[Distribution]:
    """The family of every variable."""
    found = {node.variable: node.distribution for node in graph.nodes if node.distribution is not None}
    for index, node in enumerate(graph.nodes):
        if node.distribution is not None and node.distribution != found[node.variable]:
            raise ValueError(
                f"graph: input {index} is {node.distribution}, another one of variable {node.variable} is "
                f"{found[node.variable]}; expected one family per variable"
            )
    return [found[variable] for variable in range(graph.num_variables)]


def _check_graph(graph: CircuitGraph) -> None:
    for index, node in enumerate(graph.nodes):
        if node.tied_to is not None or node.mask is not None:
            raise ValueError(f"graph: node {index} is tied or pruned, expected a structure as it is first made")
        if node.units is not None:
            sizes = [graph.nodes[child].num_units for child in node.children]
            grid = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).view(-1, len(sizes))
            if not node.kronecker or not torch.equal(node.units.cpu(), grid):
                raise ValueError(f"graph: product {index} picks units, expected Hadamard or Kronecker products")


def _meanings(graph: CircuitGraph) -> list[set[tuple[int, int]]]:
    """What the units of every node stand for: the parts of the regions of these nodes, in how many parts.

    The unit k of a factor of a Hadamard product stands for what that of the product does; everything else, what a sum
    mixes included, for the part of its own region.
    """
    meanings: list[set[tuple[int, int]]] = [set() for _ in graph.nodes]
    for index in reversed(range(len(graph.nodes))):
        node = graph.nodes[index]
        for child in node.children:
            own = (child, graph.nodes[child].num_units)
            meanings[child] |= meanings[index] if node.kind == "product" and not node.kronecker else {own}
    return meanings


def _weights(node: Node, rows: list[Tensor], columns: list[Tensor], graph: CircuitGraph, smoothing: float) -> Tensor:
    """Smoothed p(part of a child | part above), every child with the same share, (H, M)."""
    blocks = []
    for child, column_N in zip(node.children, columns, strict=True):
        width = graph.nodes[child].num_units
        counts_HM = torch.zeros(node.num_units, width, dtype=torch.float64)
        for row_N in rows:
            cell_N = row_N * width + column_N
            counts_HM += torch.bincount(cell_N, minlength=counts_HM.numel()).view(counts_HM.shape)
        counts_HM += smoothing * len(rows) * len(column_N) / counts_HM.numel()
        blocks.append(counts_HM / counts_HM.sum(1, keepdim=True))
    weight_HM = torch.cat(blocks, 1) / len(blocks)
    return weight_HM.to(torch.get_default_dtype() if node.weight is None else node.weight.dtype)


def _inputs(node: Node, rows: list[Tensor], value_N: Tensor, smoothing: float) -> Tensor:
    """First parameters from the values in the parts, (K, S)."""
    assert node.distribution is not None
    value_RN = value_N.repeat(len(rows))
    params_KS = node.distribution.from_data(
        value_RN[:, None], torch.cat(rows)[:, None], node.num_units, smoothing=smoothing
    )[0]
    return params_KS if node.params is None else in_type(node.distribution, params_KS, node.params.dtype)

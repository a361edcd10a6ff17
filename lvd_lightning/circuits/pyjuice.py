"""Circuits to node graphs of PyJuice and back: training on a GPU with its kernels, or reading what it trained.

PyJuice (https://github.com/Tractables/pyjuice) is imported by the functions that need it and by nothing else.

Shapes: N units of a node, M units of all its children together, J factors of a product, E edges between blocks,
b and c units of a block of parents and of children.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_type
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Bernoulli, Categorical, Distribution, Gaussian
from lvd_lightning.circuits.graph import CircuitGraph, Node

__all__ = ["from_pyjuice", "to_pyjuice"]

SUPPORTED = "Categorical, Bernoulli and Gaussian"


def to_pyjuice(circuit: Circuit, *, max_block_size: int = 1024) -> Any:
    """The circuit as a node graph of PyJuice, ready for `pyjuice.compile` (which needs a GPU; this does not).

    PyJuice wants sums and products in turn: a product of products becomes one product, and an input or sum below a sum
    gets a product with one factor. Ties become PyJuice's ties. All nodes are cut into blocks of one size, the largest
    power of two that divides the widths of all nodes but the root (or a smaller one, where `pyjuice.load` would misread
    it). Blocks without a live edge are left out, dead edges of other blocks are in the `zero_param_mask`. That mask
    does not reach PyJuice's compiled kernels: an EM step with a pseudocount gives dead edges of such blocks weight
    again there, which `max_block_size=1` rules out.

    PyJuice's parameters are float32, and its Bernoulli stores p(x = 1) alone, which loses p(x = 0) below 1e-7. Names of
    latents are not carried over. `pyjuice.save(root, "circuit.jpc")` and `pyjuice.load` work without a GPU; such files
    are pickles, so load none from a source that you do not trust.

    Args:
        circuit: with inputs that are Categorical, Bernoulli or Gaussian.
        max_block_size: a power of two; smaller blocks store fewer zeros where a circuit is pruned, larger ones are
            faster. PyJuice's own structures end at 1024.

    Returns:
        A `pyjuice.nodes.SumNodes` whose units are the heads; for a batch of circuits a list of them.

    Raises:
        ValueError: an input of another distribution, or a block size that is no power of two.
        ImportError: PyJuice is not installed.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.Bernoulli(), num_heads=3))
        >>> root = pc.to_pyjuice(circuit)
        >>> root.num_nodes  # the heads
        3
    """
    check_type("to_pyjuice: circuit", circuit, Circuit)
    if max_block_size < 1 or max_block_size & (max_block_size - 1):
        raise ValueError(f"max_block_size: got {max_block_size}, expected a power of two")
    juice = _import_pyjuice("to_pyjuice")
    graphs = circuit.to_graph()
    if isinstance(graphs, list):
        return [_Exporter(juice, graph, max_block_size).run() for graph in graphs]
    return _Exporter(juice, graphs, max_block_size).run()


def from_pyjuice(root: Any) -> CircuitGraph:
    """The graph of a PyJuice circuit with its parameters, on the CPU and in PyJuice's precision, float32.

    The units of `root` are the heads. Edges of blocks are live, except where a `zero_param_mask` marks a zero. Products
    with one factor that pass all its units on are left out. For a compiled circuit call `model.update_parameters()` and
    give `model.root_ns`. The graph has no `latents`.

    Raises:
        ValueError: `root` is no node of PyJuice; an input of another distribution than Categorical, Bernoulli and
            Gaussian, or of several variables; a sum with external parameters; parameters that are not set; tied sums
            with different edges.
        ImportError: PyJuice is not installed.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.Bernoulli(), num_heads=3))
        >>> pc.from_pyjuice(pc.to_pyjuice(circuit)).num_heads
        3
    """
    juice = _import_pyjuice("from_pyjuice")
    if not isinstance(root, juice.nodes.CircuitNodes):
        raise ValueError(
            f"root: expected a node of PyJuice, got {type(root).__name__} (of a compiled circuit, give its root_ns)"
        )
    return _Importer(juice).run(root)


def _import_pyjuice(caller: str) -> Any:
    try:
        import pyjuice
    except ImportError as error:
        raise ImportError(f"{caller}: PyJuice cannot be imported ({error}); pip install pyjuice") from error
    return pyjuice


class _Factors(NamedTuple):
    """What the units of a node multiply: `nodes` are inputs and sums, `units` the units of each, int (N, J)."""

    nodes: tuple[int, ...]
    units: Tensor

    @property
    def is_plain(self) -> bool:
        """Whether unit k multiplies unit k of every factor."""
        return bool((self.units == torch.arange(len(self.units))[:, None]).all())


class _Exporter:
    """Builds the nodes of PyJuice for one graph."""

    def __init__(self, juice: Any, graph: CircuitGraph, max_block_size: int) -> None:
        self.juice = juice
        self.graph = graph
        self.factors = _factor(graph)
        self.block_size = _block_size(graph, self.factors, max_block_size)
        self.built: dict[int, Any] = {}
        self.elements: dict[tuple[int, int], Any] = {}

    def run(self) -> Any:
        for index, node in enumerate(self.graph.nodes):
            if node.kind == "input":
                self.built[index] = self._input(index, node)
            elif node.kind == "sum":
                self.built[index] = self._sum(node)
        return self.built[self.graph.root]

    def _input(self, index: int, node: Node) -> Any:
        if node.tied_to is not None:
            return self.built[node.tied_to].duplicate(node.variable, tie_params=True)
        family, params = _to_family(self.juice, index, node)
        size = self.block_size
        found = self.juice.inputs(node.variable, num_node_blocks=node.num_units // size, dist=family, block_size=size)
        found.set_params(params.reshape(-1), normalize=False)
        return found

    def _sum(self, node: Node) -> Any:
        children = self._elements(node)
        if node.tied_to is not None:
            owner = self.built[node.tied_to]
            edges_2E = owner.edge_ids.clone()
            return self.juice.summate(
                *children,
                num_node_blocks=owner.num_node_blocks,
                edge_ids=edges_2E,
                block_size=owner.block_size,
                source_node=owner,
            )
        assert node.weight is not None
        below = self.block_size
        size = math.gcd(below, node.num_units)
        weight = _cut(node.weight.float().cpu(), size, below)
        live = torch.ones_like(weight, dtype=torch.bool) if node.mask is None else _cut(node.mask.cpu(), size, below)
        edges_2E = live.any(-1).any(-1).nonzero().T.contiguous()
        dead = ~live[edges_2E[0], edges_2E[1]]
        found = self.juice.summate(
            *children,
            num_node_blocks=len(weight),
            edge_ids=edges_2E,
            block_size=size,
            zero_param_mask=dead if bool(dead.any()) else None,
        )
        found.set_params(weight[edges_2E[0], edges_2E[1]], normalize=False)
        return found

    def _elements(self, node: Node) -> list[Any]:
        """The children of a sum as products; PyJuice counts a child that comes twice once, so it gets a copy."""
        seen: Counter[int] = Counter()
        found = []
        for child in node.children:
            key = (child, seen[child])
            seen[child] += 1
            if key not in self.elements:
                self.elements[key] = self._product(self.factors[child])
            found.append(self.elements[key])
        return found

    def _product(self, factors: _Factors) -> Any:
        nodes = [self.built[index] for index in factors.nodes]
        if factors.is_plain and all(node.num_nodes == len(factors.units) for node in nodes):
            return self.juice.multiply(*nodes)
        return self.juice.multiply(*nodes, edge_ids=factors.units, sparse_edges=True)


def _factor(graph: CircuitGraph) -> list[_Factors]:
    """The factors of every node; products of products are multiplied out."""
    found: list[_Factors] = []
    for index, node in enumerate(graph.nodes):
        plain = torch.arange(node.num_units)
        if node.kind != "product":
            found.append(_Factors((index,), plain[:, None]))
            continue
        units = plain[:, None].expand(-1, len(node.children)) if node.units is None else node.units.cpu()
        nodes = tuple(factor for child in node.children for factor in found[child].nodes)
        found.append(_Factors(nodes, torch.cat([found[c].units[units[:, j]] for j, c in enumerate(node.children)], 1)))
    return found


def _block_size(graph: CircuitGraph, factors: list[_Factors], largest: int) -> int:
    """The largest power of two that divides the widths of all nodes but the root, and is safe in PyJuice.

    One size for all: PyJuice 2.6.3 takes the children of a product for padding, and gives them no flow, where products
    of several block sizes meet in one layer or a sum's blocks are larger than those of all products.

    `pyjuice.load` tells edges between units from edges between blocks by comparing their number with that of the first
    factor's blocks; where a product has just as many units, smaller blocks avoid the mistake.
    """
    nodes = graph.nodes
    divisor = math.gcd(*(node.num_units for index, node in enumerate(nodes) if index != graph.root))
    products = {child for node in nodes if node.kind == "sum" for child in node.children}
    clashes = {nodes[factors[index].nodes[0]].num_units / nodes[index].num_units for index in products}
    size = min(divisor & -divisor, largest)
    while size > 1 and size in clashes:
        size //= 2
    return size


def _cut(matrix_NM: Tensor, size: int, below: int) -> Tensor:
    """Blocks of a matrix, shape (N / b, M / c, b, c)."""
    rows, columns = matrix_NM.shape
    return matrix_NM.reshape(rows // size, size, columns // below, below).transpose(1, 2)


def _to_family(juice: Any, index: int, node: Node) -> tuple[Any, Tensor]:
    """PyJuice's distribution of an input and its parameters, float32."""
    families = juice.distributions
    distribution, params = node.distribution, node.params
    if params is not None:
        params = params.float().cpu()
        if isinstance(distribution, Bernoulli):
            return families.Bernoulli(), params[:, 1].contiguous()
        if isinstance(distribution, Categorical):
            return families.Categorical(num_cats=distribution.num_categories), params
        if isinstance(distribution, Gaussian):
            mean, std = params.mean(0).tolist()
            return families.Gaussian(mu=mean, sigma=std, min_sigma=distribution.min_std), params
    raise ValueError(
        f"to_pyjuice: input node {index} is {distribution}, which has no counterpart; supported are {SUPPORTED}"
    )


class _Importer:
    """Builds a graph from nodes of PyJuice."""

    def __init__(self, juice: Any) -> None:
        self.juice = juice
        self.graph = CircuitGraph()
        self.index: dict[Any, int] = {}
        self.owner: dict[Any, Any] = {}

    def run(self, root: Any) -> CircuitGraph:
        for node in _children_first(root):
            if node.is_input():
                self.index[node] = self._input(node)
            elif node.is_prod():
                self.index[node] = self._product(node)
            else:
                self.index[node] = self._sum(node)
        self.graph.root = self.index[root]
        self.graph.validate()
        return self.graph

    def _input(self, node: Any) -> int:
        variables = [int(v) for v in node.scope]
        if len(variables) != 1:
            raise ValueError(f"from_pyjuice: an input has the variables {variables}; expected one")
        source, owner = self._tie(node)
        distribution, params = self._from_family(source)
        return self.graph.add_input(variables[0], distribution, node.num_nodes, params=params, tied_to=owner)

    def _product(self, node: Any) -> int:
        units = node.edge_ids
        if node.is_block_sparse():
            within = torch.arange(node.block_size)[None, :, None]
            units = (units[:, None, :] * node.block_size + within).flatten(0, 1)
        children = [self.index[child] for child in node.chs]
        plain = bool((units == torch.arange(len(units))[:, None]).all())
        if not plain or any(self.graph.nodes[child].num_units != len(units) for child in children):
            return self.graph.add_product(children, units)
        return children[0] if len(children) == 1 else self.graph.add_product(children)

    def _sum(self, node: Any) -> int:
        if type(node) is not self.juice.nodes.SumNodes:
            raise ValueError(
                f"from_pyjuice: cannot read {type(node).__name__}, a sum whose parameters come with the data"
            )
        children = [self.index[child] for child in node.chs]
        source, owner = self._tie(node)
        if owner is not None:
            if not torch.equal(node.edge_ids, self.owner[source].edge_ids):
                raise ValueError("from_pyjuice: tied sums have different edges; tie only sums with the same `edge_ids`")
            return self.graph.add_sum(children, node.num_nodes, tied_to=owner)
        weight_NM, live_NM = _dense(node, _parameters(source), source.get_zero_param_mask())
        mask = None if bool(live_NM.all()) else live_NM
        return self.graph.add_sum(children, node.num_nodes, weight=weight_NM, mask=mask)

    def _tie(self, node: Any) -> tuple[Any, int | None]:
        """The node of PyJuice that holds the parameters, and the first node of the graph that uses them already."""
        source = node
        while source.is_tied():
            source = source.get_source_ns()
        first = self.owner.setdefault(source, node)
        return source, None if first is node else self.index[first]

    def _from_family(self, source: Any) -> tuple[Distribution, Tensor]:
        families, family = self.juice.distributions, source.dist
        if type(family) not in (families.Bernoulli, families.Categorical, families.Gaussian):
            raise ValueError(f"from_pyjuice: an input is {type(family).__name__}; supported are {SUPPORTED}")
        params = _parameters(source).view(source.num_nodes, -1)
        if type(family) is families.Bernoulli:
            return Bernoulli(), torch.cat([1 - params, params], 1)
        if type(family) is families.Categorical:
            return Categorical(family.num_cats), params
        return Gaussian(min_std=family.min_sigma), params


def _children_first(root: Any) -> Iterator[Any]:
    """All nodes below the root and the root itself, without recursion: chains of variables are deep."""
    stack = [(root, iter(root.chs))]
    seen = {root}
    while stack:
        node, rest = stack[-1]
        child = next((found for found in rest if found not in seen), None)
        if child is None:
            stack.pop()
            yield node
        else:
            seen.add(child)
            stack.append((child, iter(child.chs)))


def _parameters(source: Any) -> Tensor:
    params = source.get_params()
    if params is None:
        raise ValueError(f"from_pyjuice: {source} has no parameters yet; call root.init_parameters() first")
    return params.detach().to("cpu", torch.float32, copy=True)


def _dense(node: Any, params_Ebc: Tensor, dead_Ebc: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights and live edges of a sum, both of shape (N, M); parallel edges add up."""
    columns = sum(child.num_node_blocks for child in node.chs)
    place_E = node.edge_ids[0] * columns + node.edge_ids[1]
    live_Ebc = torch.ones_like(params_Ebc)
    if dead_Ebc is not None:  # PyJuice itself looks at the parameter alone
        live_Ebc = (~dead_Ebc.cpu() | (params_Ebc > 0)).to(params_Ebc.dtype)
    size = tuple(params_Ebc.shape[1:])
    found = []
    for values in (params_Ebc, live_Ebc):
        blocks = values.new_zeros(node.num_node_blocks * columns, *size).index_add_(0, place_E, values)
        blocks = blocks.view(node.num_node_blocks, columns, *size).transpose(1, 2)
        found.append(blocks.reshape(node.num_nodes, columns * size[1]))
    return found[0], found[1] > 0

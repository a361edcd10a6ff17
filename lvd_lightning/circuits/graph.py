"""CircuitGraph: vector nodes and their unit-level edges, the only thing that structure code edits."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import (
    are_whole,
    as_tensor,
    check_counts,
    check_generator,
    check_leaf,
    check_type,
    described,
    is_whole,
)
from lvd_lightning.circuits.distributions import Distribution

__all__ = ["CircuitGraph", "Node", "graph_dtype", "with_sum_root"]


@dataclass(eq=False)
class Node:
    """A vector of `num_units` units of one kind and one scope.

    kind "input": `distribution` of `variable`, with `params` of shape (num_units, distribution.size) or None.
    kind "product": unit k multiplies unit `units[k, j]` of every child j; `units` None means unit k of every child.
        `kronecker` marks products that were made with a unit for every combination of their children's units; they can
        be pruned but do not grow.
    kind "sum": unit n is the mixture of all units of all children, concatenated, with the row `weight[n]`, which sums
        to one. `mask` (same shape) marks the live edges; None means all of them.

    `tied_to` names the node whose parameters this node shares; then `params` or `weight` is that node's.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.hclt([-1, 0], num_latents=4, leaf=pc.Categorical(8))
        >>> [(node.kind, node.num_units) for node in graph.nodes]
        [('input', 4), ('product', 4), ('sum', 4), ('input', 4), ('product', 4), ('sum', 1)]
    """

    kind: Literal["input", "product", "sum"]
    num_units: int
    children: tuple[int, ...] = ()
    variable: int = -1
    distribution: Distribution | None = None
    params: Tensor | None = None
    units: Tensor | None = None
    kronecker: bool = False
    weight: Tensor | None = None
    mask: Tensor | None = None
    tied_to: int | None = None


@dataclass(eq=False)
class CircuitGraph:
    """A probabilistic circuit as a list of vector nodes, children before parents.

    `root` is the node whose units are the heads. `latents` names latent variables: for an HCLT the variable's index
    maps to the product node whose unit k stands for "the latent of this variable is k". What k means after units have
    gone or doubled is said at `prune` and `grow`, which keep `latents` valid.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.CircuitGraph()  # a mixture of two coins, thrown twice
        >>> throws = [graph.add_input(v, pc.Bernoulli(), 2, params=[[0.5, 0.5], [0.1, 0.9]]) for v in range(2)]
        >>> root = graph.add_sum([graph.add_product(throws)], 1, weight=[[0.25, 0.75]])
        >>> graph.validate()
        >>> print(f"{pc.Circuit(graph).log_prob(torch.tensor([[1, 1]])).exp().item():.4f}")  # 0.25 * 0.25 + 0.75 * 0.81
        0.6700
    """

    nodes: list[Node] = field(default_factory=list)
    root: int = -1
    latents: dict[int, int] = field(default_factory=dict)

    @property
    def num_variables(self) -> int:
        """Number of variables: one more than the largest variable index."""
        return 1 + max((node.variable for node in self.nodes if node.kind == "input"), default=-1)

    @property
    def num_heads(self) -> int:
        """Number of heads: units of the root."""
        return self.nodes[self.root].num_units

    def add_input(
        self,
        variable: int,
        distribution: Distribution,
        num_units: int,
        *,
        params: Tensor | Sequence[Sequence[float]] | None = None,
        generator: torch.Generator | None = None,
        tied_to: int | None = None,
    ) -> int:
        """Add `num_units` univariate distributions of `variable`; returns the node's id.

        Args:
            variable: its index, 0 or larger.
            distribution: the family that all units are of.
            num_units: at least 1.
            params: floating point numbers of shape (num_units, distribution.size), a tensor (which is kept), an array
                or lists; drawn at random in the default type if not given.
            generator: on the CPU, for parameters that are drawn.
            tied_to: the id of an input node of as many units, which is not tied itself; this node then has that one's
                parameters, whatever `params` is.

        Raises:
            ValueError: an argument of another kind or shape, or parameters that are none of the family.
        """
        if not is_whole(variable) or variable < 0:
            raise ValueError(f"add_input: variable: got {described(variable)}, expected a whole number, 0 or larger")
        check_leaf("add_input: distribution", distribution)
        check_counts("add_input", num_units=num_units)
        check_generator("add_input", generator)
        if params is not None:
            params = _as_floats("add_input: params", params)
        if tied_to is not None:
            params = self._owner(tied_to, "input", num_units).params
        elif params is None and distribution.size:
            params = distribution.initial(num_units, generator=generator)
        expected = (num_units, distribution.size)
        if distribution.size and (params is None or tuple(params.shape) != expected):
            got = None if params is None else tuple(params.shape)
            raise ValueError(f"add_input: params of {distribution} must have shape {expected}, got {got}")
        if distribution.size and params is not None:
            distribution.check_params(params)
        return self._append(
            Node(
                "input",
                int(num_units),
                variable=int(variable),
                distribution=distribution,
                params=params if distribution.size else None,
                tied_to=tied_to,
            )
        )

    def add_product(self, children: Sequence[int], units: Tensor | Sequence[Sequence[int]] | None = None) -> int:
        """Add a product of `children`; returns the node's id.

        Args:
            children: ids of nodes.
            units: int, shape (num_units, number of children), which unit of each child is multiplied; by default unit k
                of every child (a Hadamard product), and all children must have equally many units. A row for every
                combination of the units of several children makes a Kronecker product.

        Raises:
            ValueError: children that do not exist or differ in their units, or units that they do not have.
        """
        children = self._check_children(children, "add_product")
        sizes = [self.nodes[child].num_units for child in children]
        if units is None:
            if len(set(sizes)) != 1:
                raise ValueError(
                    f"add_product: children {children} have {sizes} units; they must be equal, or give `units`"
                )
            return self._append(Node("product", sizes[0], children))
        units = as_tensor("add_product: units", units)
        if units.is_floating_point() or units.is_complex() or units.dtype == torch.bool:
            raise ValueError(f"add_product: units: got {units.dtype}, expected whole numbers")
        units = units.long()
        if units.ndim != 2 or units.shape[1] != len(children) or len(units) == 0:
            raise ValueError(
                f"add_product: units must have shape (num_units, {len(children)}), got {tuple(units.shape)}"
            )
        if bool((units < 0).any()) or bool((units >= torch.tensor(sizes)).any()):
            raise ValueError(f"add_product: a unit index is outside its child; the children have {sizes} units")
        return self._append(Node("product", len(units), children, units=units, kronecker=_is_grid(units, sizes)))

    def add_sum(
        self,
        children: Sequence[int],
        num_units: int,
        *,
        weight: Tensor | Sequence[Sequence[float]] | None = None,
        mask: Tensor | Sequence[Sequence[bool]] | None = None,
        generator: torch.Generator | None = None,
        tied_to: int | None = None,
    ) -> int:
        """Add `num_units` mixtures of all units of `children`; returns the node's id.

        Args:
            children: ids of nodes.
            num_units: at least 1.
            weight: floating point numbers of shape (num_units, units of all children together), a tensor, an array or
                lists. Rows are normalised over live edges; drawn at random in the default type if not given.
            mask: of the same shape, False for structural zeros: edges that stay 0 whatever is learnt. An edge of weight
                0 that no mask leaves out is there, and may get weight from the pseudocounts of EM.
            generator: on the CPU, for weights that are drawn.
            tied_to: the id of a sum node of as many units, which is not tied itself; this node then has that one's
                weights and mask.

        Raises:
            ValueError: an argument of another kind or shape, children that do not exist, negative weights, or a row
                without weight or without a live edge.
        """
        children = self._check_children(children, "add_sum")
        check_counts("add_sum", num_units=num_units)
        check_generator("add_sum", generator)
        num_units = int(num_units)
        weight = None if weight is None else _as_floats("add_sum: weight", weight)
        mask = None if mask is None else as_tensor("add_sum: mask", mask)
        shape = (num_units, sum(self.nodes[child].num_units for child in children))
        for name, tensor in (("weight", weight), ("mask", mask)):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"add_sum: {name} must have shape {shape}, got {tuple(tensor.shape)}")
        if tied_to is not None:
            owner = self._owner(tied_to, "sum", num_units)
            if owner.weight is not None and tuple(owner.weight.shape) != shape:
                raise ValueError(
                    f"add_sum: node {tied_to} has weights of shape {tuple(owner.weight.shape)}, not {shape}"
                )
            weight, mask = owner.weight, owner.mask
        else:
            if mask is not None:
                mask = mask.bool()
                if not bool(mask.any(1).all()):
                    raise ValueError("add_sum: every row of the mask needs a live edge")
            weight = _normalised_rows(weight, mask, shape, generator)
        return self._append(Node("sum", num_units, children, weight=weight, mask=mask, tied_to=tied_to))

    def embed(
        self, other: CircuitGraph, variables: Sequence[int] | Tensor | None = None, *, latents: int | None = None
    ) -> int:
        """Copy all nodes of another graph into this one; returns the id of the copy of its root.

        So any structure can be a part of a larger one: the components of a mixture, the factors of a product over
        disjoint variables, a leaf circuit with a head for every state of a latent. Units, masks, ties and parameters
        are kept. The copy shares nothing with `other`: embedded twice, its parameters are there twice.

        Args:
            other: stays as it is.
            variables: the index here of every variable of `other`, all different; the same ones if not given.
            latents: the latent called v by `other` is called `latents + v` here; if not given, latents keep no name.

        Raises:
            ValueError: no graph, one without a root, variables that are no such indices, or names of latents that are
                taken already.
        """
        check_type("embed: other", other, CircuitGraph)
        if latents is not None and not is_whole(latents):
            raise ValueError(f"embed: latents: got {described(latents)}, expected a whole number or None")
        size = other.num_variables
        given = list(range(size)) if variables is None else _listed(variables)
        places = [int(found) for found in given] if given is not None and are_whole(given) else None
        if places is None or len(places) != size or len(set(places)) < size or min(places, default=0) < 0:
            raise ValueError(
                f"embed: variables must be {size} different indices, 0 or larger, one for each variable of the graph; "
                f"got {str(variables)[:100]}"
            )
        if not 0 <= other.root < len(other.nodes):
            raise ValueError(f"embed: the root of the graph is {other.root}; it has {len(other.nodes)} nodes")
        start = len(self.nodes)
        found = {} if latents is None else {latents + name: start + node for name, node in other.latents.items()}
        taken = sorted(set(found) & set(self.latents))
        if taken:
            raise ValueError(f"embed: latents {taken[:8]} have their names already; latents={latents} is too small")
        for node in list(other.nodes):
            self.nodes.append(self._copied(node, start, places))
        self.latents.update(found)
        self.root = start + other.root
        return self.root

    def scopes(self) -> list[frozenset[int]]:
        """The set of variables below every node."""
        scopes: list[frozenset[int]] = []
        for node in self.nodes:
            if node.kind == "input":
                scopes.append(frozenset((node.variable,)))
            else:
                scopes.append(frozenset().union(*(scopes[child] for child in node.children)))
        return scopes

    def validate(self) -> None:
        """Check that the graph is a smooth, decomposable circuit with a root.

        Raises:
            ValueError: it is not; the message names the nodes.
        """
        if not 0 <= self.root < len(self.nodes):
            raise ValueError(f"graph: root is {self.root}, expected the id of one of the {len(self.nodes)} nodes")
        for index, node in enumerate(self.nodes):
            self._check_node(index, node)
        used = {child for node in self.nodes for child in node.children} | {self.root}
        dangling = [index for index in range(len(self.nodes)) if index not in used]
        if dangling:
            raise ValueError(f"graph: nodes {dangling[:8]} are used by no other node and are not the root")
        masks = self.scope_bits()
        for index, node in enumerate(self.nodes):
            if node.kind == "sum":
                odd = [child for child in node.children if masks[child] != masks[index]]
                if odd:
                    raise ValueError(
                        f"graph: sum node {index} is not smooth: children {odd} lack some of its variables"
                    )
            elif node.kind == "product":
                total = 0
                for child in node.children:
                    if total & masks[child]:
                        raise ValueError(
                            f"graph: product node {index} is not decomposable: child {child} shares a variable with "
                            "another child"
                        )
                    total |= masks[child]
        if masks[self.root] != (1 << self.num_variables) - 1:
            raise ValueError(f"graph: the root covers only part of the {self.num_variables} variables")

    def structure(self) -> CircuitGraph:
        """The same graph without its parameters (masks, units and ties kept)."""
        nodes = [dataclasses.replace(node, params=None, weight=None) for node in self.nodes]
        return CircuitGraph(nodes, self.root, dict(self.latents))

    def _check_node(self, index: int, node: Node) -> None:
        """Raise a ValueError if a node's children or shapes are none that the graph's own methods could have made."""
        late = [child for child in node.children if not 0 <= child < index]
        if late:
            raise ValueError(f"graph: {node.kind} node {index} has the children {late}; children come before parents")
        sizes = [self.nodes[child].num_units for child in node.children]
        if node.kind == "product":
            if node.units is None and any(size != node.num_units for size in sizes):
                raise ValueError(
                    f"graph: product node {index} has {node.num_units} units and no `units`, so its children need as "
                    f"many; children {list(node.children)} have {sizes}"
                )
            expected = {"units": (node.num_units, len(sizes))}
        elif node.kind == "sum":
            expected = dict.fromkeys(("weight", "mask"), (node.num_units, sum(sizes)))
        else:
            expected = {"params": (node.num_units, node.distribution.size if node.distribution else 0)}
        for name, shape in expected.items():
            tensor = getattr(node, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(
                    f"graph: {name} of {node.kind} node {index} must have shape {shape}, got {[*tensor.shape]}"
                )

    def _append(self, node: Node) -> int:
        self.nodes.append(node)
        self.root = len(self.nodes) - 1
        return self.root

    def _copied(self, node: Node, start: int, places: list[int]) -> Node:
        """A node of another graph whose nodes come to lie from `start` on, its variables at `places`."""
        out = dataclasses.replace(node, children=tuple(start + child for child in node.children))
        if node.kind == "input":
            out.variable = places[node.variable]
        if node.tied_to is not None:
            out.tied_to = start + node.tied_to
            owner = self.nodes[out.tied_to]
            out.params, out.weight, out.mask = owner.params, owner.weight, owner.mask
            return out
        for name in ("params", "units", "weight", "mask"):
            tensor = getattr(node, name)
            setattr(out, name, None if tensor is None else tensor.detach().clone())
        return out

    def _owner(self, index: int, kind: str, num_units: int) -> Node:
        if not is_whole(index):
            raise ValueError(f"tied_to: got {described(index)}, expected the id of a node")
        node = self.nodes[index] if 0 <= index < len(self.nodes) else None
        if node is None or node.kind != kind or node.num_units != num_units or node.tied_to is not None:
            raise ValueError(f"tied_to: node {index} is no untied {kind} node with {num_units} units")
        return node

    def _check_children(self, children: Iterable[int], caller: str) -> tuple[int, ...]:
        given = _listed(children)
        if given is None or not are_whole(given):
            raise ValueError(f"{caller}: children: got {described(children)}, expected a list of node ids")
        children = tuple(int(child) for child in given)
        if not children:
            raise ValueError(f"{caller}: needs at least one child")
        unknown = [child for child in children if not 0 <= child < len(self.nodes)]
        if unknown:
            raise ValueError(f"{caller}: children {unknown} do not exist; the graph has {len(self.nodes)} nodes")
        return children

    def scope_bits(self) -> list[int]:
        """The scopes as integers with one bit per variable: set operations on thousands of nodes stay cheap."""
        bits: list[int] = []
        for node in self.nodes:
            value = 1 << node.variable if node.kind == "input" else 0
            for child in node.children:
                value |= bits[child]
            bits.append(value)
        return bits


def _listed(values: Iterable[int] | Tensor) -> list[int] | None:
    """What is in a sequence, an array or a tensor; None if this is nothing of the kind."""
    found: object = values
    try:
        return None if isinstance(found, str) else list(values)
    except TypeError:
        return None


def _as_floats(where: str, values: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """Floating point numbers; whole ones that are in no tensor will do."""
    found = as_tensor(where, values)
    if not found.is_floating_point() and not isinstance(values, Tensor) and not found.is_complex():
        found = found.to(torch.get_default_dtype())
    if not found.is_floating_point():
        raise ValueError(f"{where}: got {found.dtype}, expected a floating point tensor")
    return found


def _is_grid(units: Tensor, sizes: list[int]) -> bool:
    """Whether the rows are all combinations of the units of children of which two have a choice."""
    if len(units) != math.prod(sizes) or sum(size > 1 for size in sizes) < 2:
        return False
    return len(units.unique(dim=0)) == len(units)


def _normalised_rows(
    weight: Tensor | None, mask: Tensor | None, shape: tuple[int, int], generator: torch.Generator | None
) -> Tensor:
    """Check or draw the weights of a sum node, zero outside the mask, rows summing to one."""
    if weight is None:
        weight = torch.rand(shape, generator=generator) + 0.05
    if mask is not None:
        weight = weight * mask
    total = weight.sum(1, keepdim=True)
    if bool((weight < 0).any()) or not bool(torch.isfinite(weight).all()) or not bool((total > 0).all()):
        raise ValueError("add_sum: weights must be finite and non-negative, with a positive sum in every row")
    exact = (total - 1).abs() < 16 * torch.finfo(weight.dtype).eps
    return torch.where(exact, weight, weight / total)


def with_sum_root(graph: CircuitGraph) -> CircuitGraph:
    """The heads are units of a sum node; any other root gets one on top that passes its units on."""
    if not 0 <= graph.root < len(graph.nodes) or graph.nodes[graph.root].kind == "sum":
        return graph
    out = CircuitGraph(list(graph.nodes), graph.root, dict(graph.latents))
    eye = torch.eye(graph.num_heads, dtype=graph_dtype(graph))
    out.add_sum([graph.root], graph.num_heads, weight=eye, mask=eye > 0)
    return out


def graph_dtype(graph: CircuitGraph) -> torch.dtype:
    """The type of its parameters, or the default one if it has none."""
    for node in graph.nodes:
        found = node.weight if node.weight is not None else node.params
        if found is not None:
            return found.dtype
    return torch.get_default_dtype()

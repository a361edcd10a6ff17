"""Circuits to be pruned and grown, their flows, and what must hold of the graphs that come out."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

import lvd_lightning.circuits as pc

__all__ = ["HCLTS", "assert_same", "assert_sound", "count", "dead_units", "draw", "kronecker_graph", "put_zeros"]


HCLTS = ["chain", "star", "bush", "pair"]


def put_zeros(graph: pc.CircuitGraph, seed: int = 0) -> pc.CircuitGraph:
    """A copy in which about half of the weights, and a third of the categories, are exactly 0."""
    graph = copy.deepcopy(graph)
    generator = torch.Generator().manual_seed(seed)
    for index, node in enumerate(graph.nodes):
        if node.tied_to is not None:
            owner = graph.nodes[node.tied_to]
            node.params, node.weight = owner.params, owner.weight
            continue
        name, rate = ("weight", 0.5) if node.kind == "sum" else ("params", 0.67)
        found = getattr(node, name)
        if found is None or not (node.kind == "sum" or isinstance(node.distribution, pc.Categorical)):
            continue
        keep = torch.rand(found.shape, generator=generator) < (1 - rate if index == graph.root else rate)
        keep.scatter_(1, found.argmax(1, keepdim=True), True)
        setattr(node, name, found * keep / (found * keep).sum(1, keepdim=True))
    return graph


def draw(circuit: pc.Circuit, heads: Sequence[int], number: int = 7) -> tuple[Tensor, Tensor]:
    """Examples that are possible under their heads."""
    generator = torch.Generator().manual_seed(1)
    parts = [circuit.sample(number, head=head, generator=generator) for head in heads]
    return torch.cat(parts), torch.tensor(heads).repeat_interleave(number)


def count(circuit: pc.Circuit, x: Tensor, head: Tensor, weight: Tensor | None = None) -> pc.Flows:
    flows = pc.Flows(circuit)
    flows.add(x, head, weight)
    return flows


def dead_units(graph: pc.CircuitGraph) -> list[tuple[int, int]]:
    """Units that no path of live edges reaches from a head, nor from a unit that is kept for one that it is tied to."""
    owner = [index if node.tied_to is None else node.tied_to for index, node in enumerate(graph.nodes)]
    alike = {a: [b for b, found in enumerate(owner) if found == owner[a]] for a in range(len(owner))}
    todo = [(graph.root, head) for head in range(graph.num_heads)]
    seen = set(todo)
    while todo:
        index, unit = todo.pop()
        node = graph.nodes[index]
        if node.kind == "product":
            units = [unit] * len(node.children) if node.units is None else node.units[unit].tolist()
            below = list(zip(node.children, units, strict=True))
        elif node.kind == "sum":
            ends = [(child, k) for child in node.children for k in range(graph.nodes[child].num_units)]
            below = [end for c, end in enumerate(ends) if node.mask is None or node.mask[unit, c]]
        else:
            below = []
        below += [(other, unit) for other in alike[index]]
        todo += [found for found in below if found not in seen]
        seen |= set(below)
    return sorted({(index, unit) for index, node in enumerate(graph.nodes) for unit in range(node.num_units)} - seen)


def assert_sound(graph: pc.CircuitGraph) -> None:
    """Smooth, decomposable, normalised, zero outside the masks, tied nodes with the parameters of their owners."""
    graph.validate()
    for node in graph.nodes:
        if node.tied_to is not None:
            owner = graph.nodes[node.tied_to]
            assert (node.weight is owner.weight, node.params is owner.params, owner.tied_to) == (True, True, None)
        if node.kind == "sum":
            width = sum(graph.nodes[child].num_units for child in node.children)
            assert node.weight.shape == (node.num_units, width)
            torch.testing.assert_close(node.weight.sum(1), torch.ones(node.num_units))
            assert bool((node.weight >= 0).all())
            if node.mask is not None:
                assert bool((node.weight[~node.mask] == 0).all())
                assert bool(node.mask.any(1).all())
        elif node.kind == "product":
            for j, child in enumerate(node.children):
                units = torch.arange(node.num_units) if node.units is None else node.units[:, j]
                assert units.shape == (node.num_units,)
                assert int(units.max()) < graph.nodes[child].num_units
        elif node.params is not None:
            assert node.params.shape == (node.num_units, node.distribution.size)
            node.distribution.check_params(node.params)
    for index in graph.latents.values():
        assert graph.nodes[index].kind == "product"


def kronecker_graph() -> pc.CircuitGraph:
    graph = pc.CircuitGraph()
    children = [graph.add_input(v, pc.Categorical(4), units) for v, units in enumerate((3, 2))]
    graph.root = graph.add_sum([graph.add_product(children, torch.cartesian_prod(torch.arange(3), torch.arange(2)))], 1)
    return graph


def assert_same(a: pc.CircuitGraph, b: pc.CircuitGraph, rtol: float = 1e-9) -> None:
    """Equal structures, and parameters up to rounding (rtol 0: bit for bit)."""
    assert (a.root, a.latents, len(a.nodes)) == (b.root, b.latents, len(b.nodes))
    for x, y in zip(a.nodes, b.nodes, strict=True):
        for name in ("kind", "num_units", "children", "variable", "distribution", "tied_to", "kronecker"):
            assert getattr(x, name) == getattr(y, name)
        for name in ("units", "mask"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None)
            assert left is None or torch.equal(left, right)
        for name in ("params", "weight"):
            left, right = getattr(x, name), getattr(y, name)
            assert (left is None) == (right is None)
            if left is not None:
                torch.testing.assert_close(left, right, rtol=rtol, atol=rtol)

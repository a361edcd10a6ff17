"""Latent variables made variables: a circuit over x and over which units it passes through."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch

from lvd_lightning.circuits.checks import are_whole, check_type, described
from lvd_lightning.circuits.distributions import Indicator
from lvd_lightning.circuits.graph import CircuitGraph, Node, graph_dtype

__all__ = ["materialize"]


class _State(NamedTuple):
    """What a node's unit k means: state `first + k` of the latent variable of scope number `scope`."""

    scope: int
    first: int


def materialize(graph: CircuitGraph, scopes: Sequence[Iterable[int]]) -> CircuitGraph:
    r"""A circuit over (x, z) with one categorical variable for each scope, which says where the circuit passes through.

    .. math:: \sum_z p(x, z) = p(x), \quad p(x, z_i) = p(z_i) \, p(x_{S_i} | z_i) \, p(x_{rest} | z_i)

    Of the units with exactly the scope S_i, those count that stand lowest: inputs, and products that take the scope
    apart. Whatever the circuit chooses, it passes through one of them, and z_i is its number, counted over these nodes
    in the order of the graph. In a hidden Chow-Liu tree or a hidden Markov model that is the state of a latent.

    Parameters are those of `graph` (and shared with it until a `Circuit` copies them); what is new are inputs of the
    family `Indicator`, which nothing moves. Heads stay heads. Where the z of all scopes leave no sum a choice, as all
    latents of a hidden Chow-Liu tree do, the circuit is deterministic: one step of `CircuitEM(lr=1, pseudocount=0)` on
    all of (x, z) counts, and is the fit of largest likelihood.

    Args:
        graph: with inputs of any family but soft evidence.
        scopes: sets of variables, all different. Those of latents are `graph.scopes()[graph.latents[name]]`.

    Returns:
        A graph over D + len(scopes) variables: z_i is variable D + i. Latents keep their names.

    Raises:
        ValueError: no scope, an empty one or one that is given twice, unknown variables, soft evidence, a scope that no
            node has exactly, or that some node cuts: its own scope has a part of it and more besides, or it is a
            product that takes the scope apart together with other variables.

    References:
        Liu, Zhang and Van den Broeck, Scaling Up Probabilistic Circuits by Latent Variable Distillation, 2023
        (arXiv 2210.04398), Algorithm 1 and Lemma 1.

    >>> import torch
    >>> import lvd_lightning.circuits as pc
    >>> generator = torch.Generator().manual_seed(0)
    >>> graph = pc.hclt([-1, 0, 0], num_latents=2, leaf=pc.Categorical(3), generator=generator)
    >>> joint = pc.materialize(graph, [graph.scopes()[graph.latents[v]] for v in range(3)])
    >>> circuit = pc.Circuit(joint)
    >>> circuit.num_variables, circuit.num_parameters == pc.Circuit(graph).num_parameters
    (6, True)
    >>> xz = circuit.sample(1000, generator=generator)  # columns 3 to 5 are the latents
    >>> optimizer = pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0)
    >>> (-circuit.log_prob(xz).sum()).backward()
    >>> optimizer.step()  # the fit to these 1,000 examples, in closed form
    """
    check_type("materialize: graph", graph, CircuitGraph)
    graph.validate()
    if any(node.distribution is not None and node.distribution.is_evidence for node in graph.nodes):
        raise ValueError("materialize: graph: has soft evidence, whose states are latent variables already")
    wanted = [_checked(number, scope, graph.num_variables) for number, scope in enumerate(_listed(scopes))]
    for number, scope in enumerate(wanted):
        if scope in wanted[:number]:
            raise ValueError(f"materialize: scopes[{number}]: is the same as scopes[{wanted.index(scope)}]")
    found: dict[int, _State] = {}
    sizes = []
    for number, scope in enumerate(wanted):
        first = 0
        for index in _lowest(graph, number, scope):
            found[index] = _State(number, first)
            first += graph.nodes[index].num_units
        sizes.append(first)
    return _with_indicators(graph, found, sizes)


def _listed(scopes: Sequence[Iterable[int]]) -> list[Iterable[int]]:
    given = list(scopes) if isinstance(scopes, Iterable) else []
    if not given or not all(isinstance(scope, Iterable) for scope in given):
        raise ValueError(f"materialize: scopes: got {described(scopes)}, expected a list of sets of variables")
    return given


def _checked(number: int, scope: Iterable[int], num_variables: int) -> frozenset[int]:
    variables = list(scope)
    if not variables or not are_whole(variables) or not all(0 <= variable < num_variables for variable in variables):
        raise ValueError(
            f"materialize: scopes[{number}]: expected some of the variables 0..{num_variables - 1}, "
            f"got {described(variables)}"
        )
    return frozenset(int(variable) for variable in variables)


def _lowest(graph: CircuitGraph, number: int, scope: frozenset[int]) -> list[int]:
    """The nodes of a scope below which no node has it."""
    wanted = sum(1 << variable for variable in scope)
    bits = graph.scope_bits()
    if wanted not in bits:
        raise ValueError(
            f"materialize: scopes[{number}]: no node has exactly the variables {described(sorted(scope))}; "
            "`graph.scopes()` lists the scopes of all nodes"
        )
    for index, node in enumerate(graph.nodes):
        inside = bits[index] & wanted
        parts = [bits[child] & wanted for child in node.children] if bits[index] != wanted else []
        is_cut = inside not in (0, wanted, bits[index])
        if is_cut or (inside == wanted and any(part not in (0, wanted) for part in parts)):
            raise ValueError(
                f"materialize: scopes[{number}]: {node.kind} node {index} cuts {described(sorted(scope))}: it has "
                f"{'a part of it' if is_cut else 'its parts'} together with other variables, so that no unit there "
                "stands for the scope"
            )
    return [
        index
        for index, node in enumerate(graph.nodes)
        if bits[index] == wanted and not any(bits[child] == wanted for child in node.children)
    ]


def _with_indicators(graph: CircuitGraph, states: dict[int, _State], sizes: list[int]) -> CircuitGraph:
    """The graph in which unit k of these nodes is multiplied by "the latent variable has the state of unit k"."""
    out = CircuitGraph()
    at: dict[int, int] = {}  # what stands for an old node
    copied: dict[int, int] = {}  # its copy
    dtype = graph_dtype(graph)
    for index, node in enumerate(graph.nodes):
        new = dataclasses.replace(node, children=tuple(at[child] for child in node.children))
        new.tied_to = None if node.tied_to is None else copied[node.tied_to]
        indicator = None
        if index in states:
            indicator = _indicator(node.num_units, states[index], graph.num_variables, sizes, dtype)
            out.nodes.append(indicator)
        if indicator is not None and node.kind == "product":
            new.children = (*new.children, len(out.nodes) - 1)
            if node.units is not None:
                new.units = torch.cat([node.units, torch.arange(node.num_units)[:, None]], 1)
        out.nodes.append(new)
        at[index] = copied[index] = len(out.nodes) - 1
        if indicator is not None and node.kind == "input":
            out.nodes.append(Node("product", node.num_units, (at[index], at[index] - 1)))
            at[index] = len(out.nodes) - 1
    out.root = at[graph.root]
    out.latents = {name: at[index] for name, index in graph.latents.items()}
    return out


def _indicator(num_units: int, state: _State, num_variables: int, sizes: list[int], dtype: torch.dtype) -> Node:
    size = sizes[state.scope]
    params = torch.eye(size, dtype=dtype)[state.first : state.first + num_units]
    return Node("input", num_units, variable=num_variables + state.scope, distribution=Indicator(size), params=params)

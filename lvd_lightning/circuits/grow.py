"""Grow: a graph, or a batch of them, from a circuit and its flows, in which some heads and their units became two."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch

from lvd_lightning.circuits.checks import are_whole, check_generator, check_number, described
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.engine.doubling import Doubling, find_split, flag
from lvd_lightning.circuits.engine.open_graph import OpenGraph
from lvd_lightning.circuits.flows import NOTHING_ADDED, Flows, check_flows
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["grow"]


def grow(
    circuit: Circuit,
    flows: Flows,
    heads: Sequence[int] | Sequence[Sequence[int]],
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
    numbers: Sequence[int] | None = None,
) -> CircuitGraph | list[CircuitGraph]:
    r"""Give a circuit new heads: the units that matter to `heads` become two, and so do these heads.

    With :math:`a_n` the mean flow of unit n over the counted examples, k new heads beside K old ones and
    :math:`g = \max(k / (k + K), 0.2)`, unit n is flagged iff :math:`a_n \ge \max(t, 10^{-8})`, t being the (1 - g)
    quantile of a circuit's units; of the heads exactly those that grow are.

    - A flagged sum becomes two. For an edge :math:`\theta` to a child that is doubled one has
      :math:`(\theta, d \theta) / (1 + d)`, the other :math:`(d \theta, \theta) / (1 + d)`, d = 0.2; to any other child
      both have :math:`\theta`.
    - A sum that does not split gives the copies of a child :math:`(r \theta, (1 - r) \theta)`, r uniform and clipped to
      [0.1, 0.9].
    - A product over a doubled child becomes two if it is flagged, or if a parent that becomes two needs both; otherwise
      it stays with the first copies. Where nothing needs the copy of a flagged unit, none is made.
    - Weights of split sums and parameters of split inputs are multiplied by clip(N(1, sigma^2), 0.1, 10) (inputs: at
      most 2) and renormalised. The means of Gaussians, binomials and logistics move by (factor - 1) standard
      deviations. States of soft evidence are what they are: they do not split.

    With sigma 0 no head's likelihood changes, and a new head's is that of the head it descends from. Old units keep
    their indices; second copies follow in the order of the units they descend from. New head K + j descends from
    `heads[j]`. Nodes, their ids and `latents` stay; the second copies of a latent's states follow its old states.

    Of tied nodes a unit splits in all or in none, by the mean of the flows of all units that have to agree. Where no
    example of a circuit weighs anything, or none came at all, no flow tells its units apart: its heads become two, as
    they always do, and nothing below them.

    Args:
        circuit: whose parameters are taken.
        flows: of the examples of the heads that grow, counted in this circuit.
        heads: which heads grow; for a batch of circuits one such list for each. Without any a circuit stays as it is.
        sigma: standard deviation of the perturbing factors.
        generator: a generator of the CPU; the same one gives the same growth wherever the circuit is.
        numbers: of a batch of circuits that is a part of a larger one, the number of each in that: it grows as it would
            grow there. By default 0, 1, ...

    Returns:
        A graph on the CPU, for a batch of circuits a list of them.

    Raises:
        ValueError: heads that do not exist or come twice, a negative sigma, a generator of another device, flows of
            another structure or to which nothing was added (not even examples of weight 0 or an empty batch), or a
            circuit with Kronecker products (growth is defined for Hadamard products).

    References:
        Liu et al., Understanding the Distillation Process from Deep Generative Models to Tractable Probabilistic
        Circuits, 2023, Algorithm 1.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8)))
        >>> x, flows = torch.randint(8, (100, 3)), pc.Flows(circuit)
        >>> flows.add(x)
        >>> larger = pc.Circuit(pc.grow(circuit, flows, heads=[0], sigma=0.0))  # two heads, both the old one
        >>> torch.allclose(larger.log_prob(x), circuit.log_prob(x).expand(-1, 2), atol=1e-5)
        True
    """
    check_flows("grow", circuit, flows)
    wanted = _check_heads(circuit, heads)
    check_number("sigma", sigma, 0, meaning=", a standard deviation")
    check_generator("grow", generator)
    known = range(circuit.num_circuits) if numbers is None else numbers
    if len(known) != circuit.num_circuits:
        raise ValueError(f"numbers: got {len(known)}, expected one for each of the {circuit.num_circuits} circuits")
    seed = int(torch.randint(1 << 62, (), generator=generator))
    examples, flow = flows.num_examples.tolist(), flows.all_units()
    graphs = []
    for g, graph in enumerate(circuit.engine.opened(circuit.probabilities())):
        if not wanted[g]:
            graphs.append(graph.closed())
            continue
        _check_growth(graph, g)
        if flows.is_empty:
            raise ValueError(NOTHING_ADDED)
        mean_flow = np.concatenate(flow[g]) / max(examples[g], 1e-300)
        split = find_split(graph, flag(graph, mean_flow, wanted[g]))
        graphs.append(Doubling(graph, split, wanted[g], sigma, (seed, known[g])).run())
    return graphs if circuit.batched else graphs[0]


def _check_heads(circuit: Circuit, heads: Sequence[Any]) -> list[list[int]]:
    """The heads that grow, a list for every circuit."""
    given: Any = heads if circuit.batched else [heads]
    per_circuit = list(given) if isinstance(given, Iterable) else []
    if len(per_circuit) != circuit.num_circuits:
        got = len(per_circuit) if isinstance(given, Iterable) else described(given)
        raise ValueError(f"heads: got {got}, expected {circuit.num_circuits} lists, one per circuit")
    found = []
    for g, (some, structure) in enumerate(zip(per_circuit, circuit.structures, strict=True)):
        chosen = list(some) if isinstance(some, Iterable) else some  # an iterator is read once
        if not are_whole(chosen):
            raise ValueError(f"heads: circuit {g}: got {described(some)}, expected a list of whole numbers")
        mine = [operator.index(head) for head in chosen]
        if len(set(mine)) < len(mine) or any(not 0 <= head < structure.num_heads for head in mine):
            raise ValueError(f"heads: circuit {g} has heads 0..{structure.num_heads - 1}, each grows once; got {mine}")
        found.append(mine)
    return found


def _check_growth(graph: OpenGraph, g: int) -> None:
    """Raise a ValueError if growth is not defined for this graph."""
    nodes = graph.graph.nodes
    for index, node in enumerate(nodes):
        if node.kronecker:
            raise ValueError(f"grow: node {index} of circuit {g} is a Kronecker product; only Hadamard products grow")
    if graph.graph.root in graph.tied:
        raise ValueError(f"grow: the heads of circuit {g} share their weights with other nodes; they cannot grow alone")
    for members in graph.ties:
        widths = [[nodes[child].num_units for child in nodes[index].children] for index in members]
        if any(found != widths[0] for found in widths):
            raise ValueError(f"grow: tied nodes {members} of circuit {g} have children of different widths {widths}")

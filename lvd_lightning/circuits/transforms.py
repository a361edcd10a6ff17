"""Prune and grow: a graph, or a batch of them, from a circuit and its flows.

Shapes: P parameter rows, N units of a node, M units of all its children together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lvd_lightning.circuits.checks import are_whole, check_generator, check_number, check_type, described
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.doubling import Doubling, find_split, flag
from lvd_lightning.circuits.flows import Flows
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.shrink import find_used, shrink
from lvd_lightning.circuits.surgery import OpenGraph, open_circuit

__all__ = ["grow", "prune"]

Array = NDArray[Any]
_NOTHING = "flows: no examples were added, so there is nothing to decide by; count them first: flows.add(x)"


def prune(circuit: Circuit, flows: Flows, threshold: float = 1e-4) -> CircuitGraph | list[CircuitGraph]:
    r"""Remove the edges that carry next to no flow, and the units that nothing uses any more.

    An edge stays iff :math:`F_{nc} > \tau |D|`, |D| being the weight of the examples of that circuit; a sum left empty
    keeps its largest edge (by flow, and between equal flows by weight). Weights that stay are renormalised, rows that
    lose nothing stay as they are. A circuit that was given no examples, or whose examples all weigh 0, is left alone.
    With threshold 0 only edges without flow go, and the likelihood of the counted examples cannot fall.

    Units keep their order: unit k of a node is the k-th of its old units that are still used, which also is what the
    states of a latent in `latents` and of `Circuit.posterior` then mean. Latents that are gone leave `latents`. All
    heads stay. Of tied nodes an edge stays for all or none (their flows are summed), and a unit stays in all of them if
    one of them uses it.

    Args:
        circuit: whose parameters are pruned.
        flows: of a data set, counted in this circuit.
        threshold: tau, in flow per example, from 0 to 1.

    Returns:
        A graph on the CPU, for a batch of circuits a list of them.

    Raises:
        ValueError: a threshold of another range, flows of another structure, or flows (of a circuit that is no batch)
            to which nothing was added, not even examples of weight 0 or an empty batch.

    References:
        Dang, Liu and Van den Broeck, Sparse Probabilistic Circuits via Pruning and Growing, 2022 (arXiv 2211.12551),
        section 3.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=16, leaf=pc.Categorical(8)))
        >>> flows = pc.Flows(circuit)
        >>> flows.add(torch.randint(8, (100, 3)))
        >>> smaller = pc.Circuit(pc.prune(circuit, flows, threshold=0.01))
        >>> smaller.num_parameters < circuit.num_parameters
        True
    """
    _check_flows("prune", circuit, flows)
    check_number("threshold", threshold, 0, 1, meaning=", flow per example")
    if flows.is_empty and not circuit.batched:
        raise ValueError(_NOTHING)
    opened = open_circuit(circuit)
    for number, group in enumerate(circuit.plan.groups):
        if group.kind == "sum":
            weight_PNM, live_PNM = _surviving_edges(circuit, flows, number, threshold)
            for row, (g, index) in enumerate(group.owners):
                n, m = opened[g].weight[index].shape
                opened[g].weight[index], opened[g].live[index] = weight_PNM[row, :n, :m], live_PNM[row, :n, :m]
    graphs = [shrink(graph, *find_used(graph)) for graph in opened]
    return graphs if circuit.batched else graphs[0]


def grow(
    circuit: Circuit,
    flows: Flows,
    heads: Sequence[int] | Sequence[Sequence[int]],
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
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
    _check_flows("grow", circuit, flows)
    wanted = _check_heads(circuit, heads)
    check_number("sigma", sigma, 0, meaning=", a standard deviation")
    check_generator("grow", generator)
    seeds = torch.randint(1 << 62, (circuit.num_circuits,), generator=generator).tolist()
    examples, flow = flows.num_examples.tolist(), flows.all_units()
    graphs = []
    for g, graph in enumerate(open_circuit(circuit)):
        if not wanted[g]:
            graphs.append(graph.closed())
            continue
        _check_growth(graph, g)
        if flows.is_empty:
            raise ValueError(_NOTHING)
        mean_flow = np.concatenate(flow[g]) / max(examples[g], 1e-300)
        split = find_split(graph, flag(graph, mean_flow, wanted[g]))
        graphs.append(Doubling(graph, split, wanted[g], sigma, np.random.default_rng(seeds[g])).run())
    return graphs if circuit.batched else graphs[0]


def _surviving_edges(circuit: Circuit, flows: Flows, number: int, threshold: float) -> tuple[Array, Array]:
    """Renormalised weights of one parameter table and which edges stay, both (P, N, M)."""
    flow = flows.tables[number]
    assert flow is not None
    flow_PNM = circuit.dense(number, flow)
    table = circuit.dense(number, circuit.probabilities()[number].detach())
    mask = circuit.mask(number)
    live_PNM = torch.ones_like(table, dtype=torch.bool) if mask is None else mask
    owners = torch.tensor([g for g, _ in circuit.plan.groups[number].owners], device=table.device)
    examples_P11 = flows.num_examples[owners][:, None, None]
    keep_PNM = (flow_PNM > threshold * examples_P11) & (table > 0) & live_PNM
    largest_PNM = live_PNM & (flow_PNM == flow_PNM.masked_fill(~live_PNM, -1.0).amax(-1, keepdim=True))
    last_PN1 = table.masked_fill(~largest_PNM, -1.0).argmax(-1, keepdim=True)
    empty_PN1 = ~keep_PNM.any(-1, keepdim=True)
    keep_PNM.scatter_(-1, last_PN1, keep_PNM.gather(-1, last_PN1) | empty_PN1)
    keep_PNM = torch.where(examples_P11 > 0, keep_PNM, live_PNM)
    kept_PNM = table.double() * keep_PNM
    lossless_PN1 = ((table == 0) | keep_PNM).all(-1, keepdim=True)
    total_PN1 = torch.where(lossless_PN1, 1.0, kept_PNM.sum(-1, keepdim=True))
    return (kept_PNM / total_PN1).to(table.dtype).cpu().numpy(), keep_PNM.cpu().numpy()


def _check_flows(caller: str, circuit: Circuit, flows: Flows) -> None:
    check_type(f"{caller}: circuit", circuit, Circuit)
    check_type(f"{caller}: flows", flows, Flows)
    flows.check(circuit)


def _check_heads(circuit: Circuit, heads: Sequence[Any]) -> list[list[int]]:
    """The heads that grow, a list for every circuit."""
    given: Any = heads if circuit.batched else [heads]
    per_circuit = list(given) if isinstance(given, Iterable) else []
    if len(per_circuit) != circuit.num_circuits:
        got = len(per_circuit) if isinstance(given, Iterable) else described(given)
        raise ValueError(f"heads: expected {circuit.num_circuits} lists, one per circuit, got {got}")
    found = []
    for g, (some, structure) in enumerate(zip(per_circuit, circuit.structures, strict=True)):
        chosen = list(some) if isinstance(some, Iterable) else some  # an iterator is read once
        if not are_whole(chosen):
            raise ValueError(f"heads: circuit {g}: expected a list of whole numbers, got {described(some)}")
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

"""Prune: a graph, or a batch of them, from a circuit and its flows, without the edges that carry next to no flow.

Shapes: P parameter rows, N units of a node, M units of all its children together.
"""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from lvd_lightning.circuits.checks import check_number
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.engine.shrink import find_used, shrink
from lvd_lightning.circuits.flows import NOTHING_ADDED, Flows, check_flows
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["prune"]

Array = NDArray[Any]


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
    check_flows("prune", circuit, flows)
    check_number("threshold", threshold, 0, 1, meaning=", flow per example")
    if flows.is_empty and not circuit.batched:
        raise ValueError(NOTHING_ADDED)
    opened = circuit.engine.opened(circuit.probabilities())
    for number, group in enumerate(circuit.plan.groups):
        if group.kind == "sum":
            weight_PNM, live_PNM = _surviving_edges(circuit, flows, number, threshold)
            for row, (g, index) in enumerate(group.owners):
                n, m = opened[g].weight[index].shape
                opened[g].weight[index], opened[g].live[index] = weight_PNM[row, :n, :m], live_PNM[row, :n, :m]
    graphs = [shrink(graph, *find_used(graph)) for graph in opened]
    return graphs if circuit.batched else graphs[0]


def _surviving_edges(circuit: Circuit, flows: Flows, number: int, threshold: float) -> tuple[Array, Array]:
    """Renormalised weights of one parameter table and which edges stay, both (P, N, M)."""
    flow = flows.tables[number]
    assert flow is not None
    flow_PNM = circuit.engine.dense(number, flow)
    table = circuit.engine.dense(number, circuit.probabilities()[number].detach())
    mask = circuit.engine.mask(number)
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

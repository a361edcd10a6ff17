"""Routing of a batch that ranks share: the same examples in slots, with the same weights, however many ranks there are.

Shapes: N examples of this rank, M examples of all, G circuits, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.workspace import few_sizes
from lvd_lightning.models.routing import Routed, route
from lvd_lightning.ranks import rank_and_size, summed
from lvd_lightning.shares import gathered_rows

__all__ = ["route_batch"]


def route_batch(
    circuit: Tensor,
    num_circuits: int,
    *,
    slots: float,
    order: Tensor | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
    whole: bool = False,
) -> Routed:
    """As `route`, of the examples of all ranks; each gets slots with its own examples alone. All ranks have to call.

    Args:
        circuit: int64 (N,), which circuit models each example.
        num_circuits: G.
        slots: of a circuit on all ranks together, as a multiple of the mean number of examples.
        order: int64 (N,), ascending: the places of these examples among those of all ranks; not needed by one process.
        weight: (N,) of the examples, 0 or larger; 1 by default.
        generator: in one state on all ranks.
        whole: whether every rank has all examples: each gets the slots of all, and nothing is sent.
    """
    rank, size = rank_and_size()
    if size == 1 or whole:
        most = few_sizes(round(slots * len(circuit) / num_circuits))
        return route(circuit, num_circuits, slots=most, weight=weight, generator=generator)
    counts_G = summed(torch.bincount(circuit, minlength=num_circuits))
    most = few_sizes(round(slots * int(counts_G.sum()) / num_circuits))
    if int(counts_G.max()) <= most:  # there is room for all
        return route(circuit, num_circuits, weight=weight)
    assert order is not None
    owner_M = gathered_rows(torch.full_like(circuit, rank))
    place_M = gathered_rows(order).argsort(stable=True)
    circuit_M, owner_M = gathered_rows(circuit)[place_M], owner_M[place_M]
    weight_M = None if weight is None else gathered_rows(weight)[place_M]
    routed = route(circuit_M, num_circuits, slots=most, weight=weight_M, generator=generator)
    return _own(routed, owner_M == rank, circuit)


def _own(routed: Routed, is_own_M: Tensor, circuit: Tensor) -> Routed:
    """The slots of this rank's examples, side by side; indices count these examples alone."""
    filled_GS = (routed.weight > 0) & is_own_M[routed.index]
    counts_G = filled_GS.sum(1)
    width = min(few_sizes(int(counts_G.max())), filled_GS.shape[1])
    first_GS = (~filled_GS).to(torch.int8).argsort(dim=1, stable=True)[:, :width]
    kept_GS = filled_GS.gather(1, first_GS)
    local_M = (is_own_M.cumsum(0) - 1).clamp_min(0)
    # As in `route`: an empty slot holds an example of its circuit, if there is one.
    some_G = torch.zeros(len(counts_G), dtype=torch.int64, device=circuit.device)
    some_G[circuit.flip(0)] = torch.arange(len(circuit) - 1, -1, -1, device=circuit.device)
    index_GS = torch.where(kept_GS, local_M[routed.index.gather(1, first_GS)], some_G[:, None])
    return Routed(index_GS, torch.where(kept_GS, routed.weight.gather(1, first_GS), 0.0))

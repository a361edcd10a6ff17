"""Send examples to the circuits that model them, as one batch with a row of slots per circuit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Routed", "route"]


@dataclass(frozen=True)
class Routed:
    """Slots (G, S): `index` of the example in each, and its `weight`, 0 where the slot is empty."""

    index: Tensor
    weight: Tensor


def route(
    circuit: Tensor,
    num_circuits: int,
    *,
    slots: int | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Routed:
    """Distribute examples over slots.

    A circuit with more examples than slots gets a random subset whose weights are scaled up to the sum over all of
    its examples, so that expected flows are those of every example.

    Args:
        circuit: int64 (N,), which circuit models each example.
        num_circuits: G.
        slots: S; by default as many as the busiest circuit needs, so that nothing is left out.
        weight: (N,) of the examples; 1 by default.
        generator: for the choice of subsets (on the CPU).
    """
    order = torch.randperm(len(circuit), generator=generator).to(circuit.device)
    order = order[circuit[order].argsort(stable=True)]
    found = circuit[order]
    counts = torch.bincount(circuit, minlength=num_circuits)
    rank = torch.arange(len(circuit), device=circuit.device) - (counts.cumsum(0) - counts)[found]
    if slots is None:
        slots = max(1, int(counts.max())) if len(circuit) else 1
    weights = torch.ones(len(circuit), device=circuit.device) if weight is None else weight
    kept = rank < slots
    order, found, rank = order[kept], found[kept], rank[kept]
    index = torch.zeros(num_circuits, slots, dtype=torch.int64, device=circuit.device)
    out = torch.zeros(num_circuits, slots, dtype=weights.dtype, device=circuit.device)
    index[found, rank] = order
    out[found, rank] = weights[order]
    if kept.all():
        return Routed(index, out)
    total = weights.new_zeros(num_circuits).index_add_(0, circuit, weights)
    return Routed(index, out * (total / out.sum(1).clamp_min(1e-30))[:, None])

"""Send examples to the circuits that model them, as one batch with a row of slots per circuit.

Shapes: N examples, G circuits, S slots, F circuits with more examples than slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts
from lvd_lightning.circuits.engine.workspace import few_sizes

__all__ = ["Routed", "route", "route_in_passes"]

#: Weights are summed as integers, in units of their total over this: sums that do not depend on their order.
_RESOLUTION = 1 << 40


@dataclass(frozen=True)
class Routed:
    """Slots (G, S): `index` of the example in each, and its `weight`, 0 where the slot is empty."""

    index: Tensor
    weight: Tensor

    def of(self, circuits: Tensor) -> Routed:
        """The slots of some circuits alone, int64 (n,)."""
        return Routed(self.index[circuits], self.weight[circuits])


def route(
    circuit: Tensor,
    num_circuits: int,
    *,
    slots: int | None = None,
    weight: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Routed:
    """Distribute examples over slots.

    A circuit with more examples than slots gets a random sample of them, drawn systematically with probabilities
    proportional to the weights, each slot with an equal share of the sum of the weights. So the sum is what it was,
    and the expected weight of every example is its own: expected flows are those of all examples.

    Args:
        circuit: int64 (N,), which circuit models each example.
        num_circuits: G.
        slots: S; by default as many as the busiest circuit needs (or some more), so that nothing is left out.
        weight: (N,) of the examples, 0 or larger; 1 by default.
        generator: for the samples; not used if there are slots for all.
    """
    check_counts(slots=slots)
    weights = torch.ones(len(circuit), device=circuit.device) if weight is None else weight
    counts = torch.bincount(circuit, minlength=num_circuits)
    busiest = int(counts.max())
    if slots is None:
        slots = few_sizes(busiest)
    order, rank = _ranks(circuit, counts)
    kept = rank < slots
    at, rank = order[kept], rank[kept]
    # Empty slots hold an example of their circuit, if there is one: others may be extremely unlikely under it.
    first_G = (counts.cumsum(0) - counts).clamp_max(max(0, len(circuit) - 1))
    index_GS = order[first_G][:, None].repeat(1, slots) if len(circuit) else counts.new_zeros(num_circuits, slots)
    weight_GS = torch.zeros(num_circuits, slots, dtype=weights.dtype, device=circuit.device)
    index_GS[circuit[at], rank] = at
    weight_GS[circuit[at], rank] = weights[at]
    if busiest > slots:
        full_F = (counts > slots).nonzero()[:, 0]
        index_GS[full_F], weight_GS[full_F] = _sample(circuit, counts, full_F, weights, slots, generator)
    return Routed(index_GS, weight_GS)


def route_in_passes(circuit: Tensor, num_circuits: int, slots: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Every example once, over as many passes as it takes with at most `slots` slots per circuit.

    Yields:
        The indices of examples in the slots, int64 (G, S), and which slots are filled, bool (G, S).
    """
    counts = torch.bincount(circuit, minlength=num_circuits)
    order, rank = _ranks(circuit, counts)
    busiest = int(counts.max())
    for low in range(0, busiest, slots):
        at = order[(rank >= low) & (rank < low + slots)]
        routed = route(circuit[at], num_circuits, slots=min(slots, few_sizes(busiest - low)))
        yield at[routed.index], routed.weight > 0


def _ranks(circuit: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Examples in the order of their circuits, and the rank of each among those of its circuit, both (N,)."""
    order = circuit.argsort(stable=True)
    first_G = counts.cumsum(0) - counts
    return order, torch.arange(len(circuit), device=circuit.device) - first_G[circuit[order]]


def _sample(
    circuit: Tensor, counts: Tensor, full_F: Tensor, weights: Tensor, slots: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Systematic samples for the circuits `full_F`: indices (F, S) and weights (F, S).

    The examples of a circuit lie side by side on a line, in random order, each as long as its weight; slots are
    equally spaced points on it, with a random start.
    """
    where = "cpu" if generator is None else generator.device
    order = torch.randperm(len(circuit), generator=generator, device=where).to(circuit.device)
    order = order[circuit[order].argsort(stable=True)]
    unit = weights.sum().double().clamp_min(1e-300) / _RESOLUTION
    ends_N = (weights[order] / unit).round().long().cumsum(0)
    last_F = counts.cumsum(0)[full_F] - 1
    before_F = last_F - counts[full_F]
    start_F = torch.where(before_F >= 0, ends_N[before_F.clamp_min(0)], 0)
    length_F = ends_N[last_F] - start_F
    offset_F = torch.rand(len(full_F), generator=generator, dtype=torch.float64, device=where).to(circuit.device)
    point_FS = (offset_F[:, None] + torch.arange(slots, device=circuit.device)) * (length_F[:, None] / slots)
    place_FS = start_F[:, None] + torch.minimum(point_FS.long(), (length_F - 1).clamp_min(0)[:, None])
    found_FS = torch.searchsorted(ends_N, place_FS, right=True).clamp_max(len(order) - 1)
    share_F1 = (length_F * unit / slots).to(weights.dtype)[:, None]
    return order[found_FS], share_F1.expand(-1, slots)

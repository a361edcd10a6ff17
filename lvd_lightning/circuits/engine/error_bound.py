"""How far numbers that were too small for linear values can have led a pass with linear values astray.

Whatever falls below the smallest number of the floating point type is lost. With the largest unit of a node scaled to 1
that is next to nothing, as long as the units that nodes above rely on are not the smallest ones; where variables
contradict each other, they may be. For every node n and example, E_n bounds the error of its sums (relative to a
largest inner unit of 1) by what went missing: with P_n the peak that inner units were divided by, M_c the largest unit
of a factor c, and t the smallest number,

    E_n <= (prod_c M_c / P_n) sum_c E_c / M_c + (number of factors + inner units) t / P_n.

Shapes: N sum nodes of all layers, F of one layer, L input nodes, B batch, C factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.plan import Plan
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["TOLERANCE", "ErrorBound"]

#: What heads may be off by, relative to themselves.
TOLERANCE = 1e-6


@dataclass
class _Level:
    """One layer: its nodes are low..high; their factors (F, C) among sum nodes and inputs (-1: none)."""

    low: int
    high: int
    sums: Tensor
    inputs: Tensor
    losses: Tensor  # (F, 1), float64


class ErrorBound:
    """The bound for one compiled circuit, a slim tree (see `plan.Plan.is_slim_tree`)."""

    def __init__(self, plan: Plan, structures: Sequence[CircuitGraph], device: torch.device) -> None:
        keys = [key for layer in plan.layers for key in layer.nodes]
        number = {key: position for position, key in enumerate(keys)}
        leaf = {key: place for place, key in enumerate(key for found in plan.inputs for key in found.nodes)}
        self.roots = torch.tensor([number[g, graph.root] for g, graph in enumerate(structures)], device=device)
        self.levels: list[_Level] = []
        low = 0
        for layer in plan.layers:
            factors = [_factors(structures[g], g, index) for g, index in layer.nodes]
            sums = [[number[key] for key in found if key in number] for found in factors]
            inputs = [[leaf[key] for key in found if key in leaf] for found in factors]
            counts = [[len(found) + layer.inner_units] for found in factors]
            losses = torch.tensor(counts, dtype=torch.float64, device=device)
            high = low + len(layer.nodes)
            self.levels.append(_Level(low, high, _padded(sums, device), _padded(inputs, device), losses))
            low = high

    def error(self, peak_NB: Tensor, largest_NB: Tensor, largest_input_LB: Tensor) -> Tensor:
        """What the heads may be too small by, in units of the root's peak: (G, B); infinite or NaN without support.

        Args:
            peak_NB: what the inner units of every node were divided by.
            largest_NB: the largest unit of every node.
            largest_input_LB: the largest likelihood among the units of every input node.
        """
        smallest = torch.finfo(peak_NB.dtype).tiny
        none_1B = peak_NB.new_zeros(1, peak_NB.shape[1])
        log_largest = torch.cat([largest_NB.log2(), none_1B])
        log_input = torch.cat([largest_input_LB.log2(), none_1B])
        share = none_1B.expand(len(log_largest), -1).clone()  # E / M
        for level in self.levels:
            at = slice(level.low, level.high)
            log_bound_FB = log_largest[level.sums].sum(1) + log_input[level.inputs].sum(1) - peak_NB[at].log2()
            lost_FB = level.losses.to(peak_NB.dtype) * (smallest / peak_NB[at])
            error_FB = log_bound_FB.exp2() * share[level.sums].sum(1) + lost_FB
            share[at] = error_FB / largest_NB[at]
        return share[self.roots] * largest_NB[self.roots]


def _factors(graph: CircuitGraph, g: int, index: int) -> list[tuple[int, int]]:
    (child,) = graph.nodes[index].children
    node = graph.nodes[child]
    return [(g, found) for found in (node.children if node.kind == "product" else (child,))]


def _padded(rows: list[list[int]], device: torch.device) -> Tensor:
    width = max(1, max(map(len, rows)))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int64, device=device)

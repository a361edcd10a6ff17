"""The reference pass: log-values of all units in plain PyTorch operations, none of them in place.

It does in a page what the fused passes do with buffers, kernels and closed-form gradients. So it can be differentiated
as often as one likes, works under `torch.func` and on any device, and is what the fused passes are tested against. It
takes a plan and tables and knows no circuit. A pass keeps all values and scaled values for autograd, and takes several
times the time of a fused one.

Shapes: G circuits, B batch, D variables, F folded nodes, H outer units, K inner units, I and J units of two factors, P
products, E live edges, V the row space of `plan.py`, whose parts are the constants, then the layers in their order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.circuits.engine.layers import FLOOR, TINY
from lvd_lightning.circuits.engine.plan import Gather, Index, LayerPlan, NodeKey, ParameterGroup, Plan
from lvd_lightning.circuits.engine.sparse import EdgeIndex

__all__ = ["LogValues", "Parts", "index_of", "is_vmapped", "log_values", "take_inputs", "weights_of"]


@dataclass(frozen=True)
class LogValues:
    """Log-likelihoods in nats of all units of a pass, level by level.

    inputs: of every input layer, (F, K, B).
    inner: of what every inner layer reads, (F, K, B): the product units that its sums mix.
    outer: of the units of every inner layer, (F, H, B).
    heads: (G, H, B), -inf where a circuit has fewer heads than another one.
    """

    plan: Plan
    inputs: list[Tensor]
    inner: list[Tensor]
    outer: list[Tensor]
    heads: Tensor

    def of_node(self, key: NodeKey, num_units: int) -> Tensor:
        """Of the units of one node, (num_units, B); `key` is the circuit's number and the node's."""
        if key in self.plan.base:
            starts = [layer.start for layer in self.plan.inputs] + [layer.outer_start for layer in self.plan.layers]
            number = int(np.searchsorted(starts, self.plan.base[key], "right")) - 1
            first = self.plan.base[key] - starts[number]
            return [*self.inputs, *self.outer][number].flatten(0, 1)[first : first + num_units]
        if key in self.plan.implicit:
            number, fold, first = self.plan.implicit[key]
            return self.inner[number][fold, first : first + num_units]
        first = int(self.plan.inner[key][0])  # a product that a sum mixes: its units are side by side
        starts = [layer.inner_start for layer in self.plan.layers]
        number = int(np.searchsorted(starts, first, "right")) - 1
        first -= starts[number]
        return self.inner[number].flatten(0, 1)[first : first + num_units]


def take_inputs(plan: Plan, x: Tensor, is_shared: bool) -> list[Tensor]:
    """What every input layer reads of x, (F, B), or (F, B, K) of evidence; or of a mask.

    x: (B, D), given to all circuits (`is_shared`), or (G, B, D); evidence has one more dimension, the states.
    """
    columns = x.transpose(0, 1) if is_shared else x.transpose(1, 2).flatten(0, 1)
    num_variables = 0 if is_shared else x.shape[2]
    return [columns[index_of(layer.circuits * num_variables + layer.variables, x.device)] for layer in plan.inputs]


def is_vmapped(tensor: Tensor) -> bool:
    """Whether a tensor belongs to `torch.vmap`, under which nobody can look at its numbers."""
    try:
        tensor[:0].sum().item()
    except RuntimeError:
        return True
    return False


def log_values(
    plan: Plan, tables: Sequence[Tensor], values: Sequence[Tensor], observed: Sequence[Tensor] | None = None
) -> LogValues:
    """Log-values of all units, differentiable in the tables and, where a family is continuous, in the values.

    Args:
        plan: of the circuits.
        tables: the normalised parameters of every group, as the plan's layers store them.
        values: what every input layer reads, see `take_inputs`; nothing is checked.
        observed: bool (F, B) for every input layer, False: the variable is marginalised, whatever its value.
    """
    like = values[0] if not tables else tables[0]
    with torch.autocast(like.device.type, enabled=False):  # probabilities need their precision
        return _run(plan, tables, values, observed, like)


def _run(
    plan: Plan, tables: Sequence[Tensor], values: Sequence[Tensor], observed: Sequence[Tensor] | None, like: Tensor
) -> LogValues:
    """`log_values`; the constants are like `like`."""
    inputs = []
    for number, layer in enumerate(plan.inputs):
        x, seen = values[number], None if observed is None else observed[number]
        if seen is not None:
            x = torch.where(seen if x.ndim == 2 else seen[..., None], x, torch.zeros_like(x))
        params = x.new_empty(0) if layer.group < 0 else _rows(tables[layer.group], layer.parameter_rows)
        log_FKB = layer.distribution.log_prob(params, x)
        inputs.append(log_FKB if seen is None else torch.where(seen[:, None], log_FKB, torch.zeros_like(log_FKB)))
    constants = like.new_tensor([0.0, -torch.inf])[:, None].expand(2, inputs[0].shape[2])
    parts = Parts([0, *(layer.start for layer in plan.inputs), *(layer.outer_start for layer in plan.layers)])
    parts.found = [constants, *(log_FKB.flatten(0, 1) for log_FKB in inputs)]
    inner, outer = [], []
    for plan_of_layer in plan.layers:
        inner_FKB = _inner(plan_of_layer, parts)
        outer_FHB = inner_FKB
        if plan_of_layer.group >= 0:
            weight_FHK = weights_of(plan.groups[plan_of_layer.group], tables[plan_of_layer.group], plan_of_layer)
            outer_FHB = _mix(weight_FHK, inner_FKB)
        inner.append(inner_FKB)
        outer.append(outer_FHB)
        parts.found.append(outer_FHB.flatten(0, 1))
    heads = parts.take(plan.roots.reshape(-1)).unflatten(0, plan.roots.shape)
    return LogValues(plan, inputs, inner, outer, heads)


class Parts:
    """The rows of V or E, layer by layer: a chain of a thousand layers copies none of them a thousand times.

    starts: the first row of every part, ascending. `found` has the parts, (rows, B), those that are there by now.
    """

    def __init__(self, starts: list[int]) -> None:
        self.starts = np.array(starts)
        self.found: list[Tensor] = []

    def take(self, rows: Index) -> Tensor:
        """These rows, (N, B)."""
        part_of_row = np.searchsorted(self.starts, rows, "right") - 1
        first = part_of_row[0]
        if (part_of_row == first).all():
            found = self.found[first]
            return found[index_of(rows - self.starts[first], found.device)]
        used, place = np.unique(part_of_row, return_inverse=True)
        sizes = [len(self.found[part]) for part in used]
        moved = np.concatenate([[0], np.cumsum(sizes)[:-1]]) - self.starts[used]  # from V to the used parts in a row
        joined = torch.cat([self.found[part] for part in used])
        return joined[index_of(rows + moved[place.reshape(rows.shape)], joined.device)]

    def gather(self, gather: Gather) -> Tensor:
        """Sums of rows, (N, B)."""
        out = self.take(gather.first)
        for slot in gather.more:
            out = out.index_add(0, index_of(slot.dst, out.device), self.take(slot.src))
        return out


def _inner(plan: LayerPlan, parts: Parts) -> Tensor:
    """Log-values of the inner units of a layer, (F, K, B)."""
    rows = parts.gather(plan.inputs)
    if plan.grid is None:
        return rows.unflatten(0, (len(plan.nodes), plan.inner_units))
    rows_FPEB = rows.unflatten(0, (len(plan.nodes), -1, sum(plan.grid)))
    first_FPIB, second_FPJB = rows_FPEB.split(plan.grid, 2)
    return (first_FPIB[:, :, :, None] + second_FPJB[:, :, None]).flatten(1, 3)


def weights_of(group: ParameterGroup, table: Tensor, plan: LayerPlan) -> Tensor:
    """Weights of the nodes of a sum layer, (F, H, K); 0 where there is no edge."""
    if group.edges is None:
        return _rows(table, plan.parameter_rows)
    size = len(plan.nodes) * plan.outer_units * plan.inner_units
    flat = table.new_zeros(size).scatter(0, index_of(_places(group.edges), table.device), table)
    return flat.view(len(plan.nodes), plan.outer_units, plan.inner_units)


def _places(edges: EdgeIndex) -> Index:
    """Where the live edges are in the flat tables, (E)."""
    rows = np.repeat(np.arange(len(edges.start) - 1), np.diff(edges.start))
    return rows * edges.shape[2] + edges.column


def _mix(weight_FHK: Tensor, log_FKB: Tensor) -> Tensor:
    """log of the weighted sums, (F, H, B), by matrix products of values that are scaled per node and example.

    The scale is a constant to autograd: the result does not depend on it. What has weight 0 has the gradient that it
    would have with any other weight. Where the scale is too coarse for a sum, that one is taken in log space.
    """
    scale_F1B = log_FKB.detach().amax(1, keepdim=True).clamp_min(FLOOR)
    sums_FHB = weight_FHK @ (log_FKB - scale_F1B).exp()
    is_small_FHB = sums_FHB.detach() < TINY[sums_FHB.dtype]
    out_FHB = sums_FHB.masked_fill(is_small_FHB, 1.0).log() + scale_F1B
    is_too_coarse_FHB = is_small_FHB & (scale_F1B > FLOOR)
    if not is_vmapped(is_too_coarse_FHB) and not bool(is_too_coarse_FHB.any()):
        return out_FHB.masked_fill(is_small_FHB, -torch.inf)
    return torch.where(is_small_FHB, _mix_in_log_space(weight_FHK, log_FKB), out_FHB)


def _mix_in_log_space(weight_FHK: Tensor, log_FKB: Tensor) -> Tensor:
    """The same, exact for all numbers, with H times the memory; where all terms are impossible no gradient passes."""
    has_edge = weight_FHK.detach() > 0
    log_weight_FHK = weight_FHK.masked_fill(~has_edge, 1.0).log().masked_fill(~has_edge, -torch.inf)
    terms_FHKB = log_weight_FHK[..., None] + log_FKB[:, None]
    scale_FH1B = terms_FHKB.detach().amax(2, keepdim=True).clamp_min(FLOOR)
    sums_FHB = (terms_FHKB - scale_FH1B).exp().sum(2)
    is_zero_FHB = sums_FHB.detach() == 0
    out_FHB = sums_FHB.masked_fill(is_zero_FHB, 1.0).log() + scale_FH1B[:, :, 0]
    return out_FHB.masked_fill(is_zero_FHB, -torch.inf)


def _rows(table: Tensor, rows: Index) -> Tensor:
    return table[index_of(rows, table.device)]


def index_of(rows: Index, device: torch.device) -> Tensor:
    """Rows of a plan as an index on the device."""
    return torch.from_numpy(np.ascontiguousarray(rows, dtype=np.int64)).to(device)

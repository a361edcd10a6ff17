"""Folded layers: forward and closed-form backward passes over the rows of a workspace.

Shapes: F folded nodes, H outer units, K inner units, B batch, S numbers per input unit. There are two forward passes.
In the general one values are log-likelihoods to base 2 (whose exponentials are cheaper than natural ones); inside a sum
layer they are linear, scaled by the largest inner unit of each node and example. Where that scale is too coarse (a sum
that underflows), the affected entries are computed again in log space. In the linear one, for trees over tables, values
stay linear throughout, scaled by the same units, without exponentials and logarithms; where numbers get too small for
it, the caller takes the general one. The backward pass is the same for both.

A workspace binds every layer to its buffers once: the views that a pass needs are made with the workspace, not with
every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from lvd_lightning.circuits.engine.gather import GatherRows, as_range
from lvd_lightning.circuits.engine.kernels.cpu.edges import pass_edges
from lvd_lightning.circuits.engine.plan import InputPlan, LayerPlan
from lvd_lightning.circuits.engine.sparse import EdgeIndex, SparseEdges
from lvd_lightning.circuits.engine.workspace import (
    BoundBackward,
    BoundForward,
    GradientSpace,
    LinearWorkspace,
    Underflow,
    Workspace,
)

__all__ = ["InputLayer", "Layer"]

#: Numbers that one round of operations on the CPU touches per array: several arrays of it stay in the cache.
CACHE_SIZE = 1 << 19
BITS_PER_NAT = 1 / math.log(2.0)
#: A sum below this has lost precision to underflow.
TINY = {torch.float32: 1e-30, torch.float64: 1e-280}
#: Log-scale of a node without any support; -inf would turn the difference of two -inf into NaN.
FLOOR = -1e30


class _Folded(nn.Module):
    """What input and inner layers share: rows of a parameter group, and chunks of folds that fit the cache."""

    parameter_rows: Tensor

    def __init__(self, group: int, parameter_rows: np.ndarray, num_folds: int) -> None:
        super().__init__()
        self.group = group
        self.num_folds = num_folds
        self.row_start = as_range(parameter_rows)
        self.accumulate = self.row_start is None  # whether other folds or layers may own the same gradient rows
        self.register_buffer("parameter_rows", torch.from_numpy(parameter_rows), persistent=False)

    def parameters_of(self, stacked_PXY: Tensor, low: int, high: int) -> Tensor:
        """Parameters of folds low..high: a view unless nodes are tied."""
        if self.row_start is not None:
            return stacked_PXY[self.row_start + low : self.row_start + high]
        return stacked_PXY.index_select(0, self.parameter_rows[low:high])

    def add_rows(self, out_PX: Tensor, found_FX: Tensor, low: int) -> None:
        """Add values of the folds from `low` on to their parameter rows."""
        if self.accumulate:
            out_PX.index_add_(0, self.parameter_rows[low : low + len(found_FX)], found_FX)
        else:
            self.parameters_of(out_PX, low, low + len(found_FX)).copy_(found_FX)

    def chunks(self, size: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Ranges of folds; `size` numbers per fold. One range on an accelerator."""
        step = self.num_folds if device.type != "cpu" else max(1, CACHE_SIZE // max(size, 1))
        for low in range(0, self.num_folds, step):
            yield low, min(low + step, self.num_folds)


class InputLayer(_Folded):
    """All input nodes of one distribution and width."""

    variables: Tensor
    columns: Tensor
    circuits: Tensor

    def __init__(self, plan: InputPlan, num_variables: int) -> None:
        super().__init__(plan.group, plan.parameter_rows, len(plan.nodes))
        assert plan.gradient is not None
        self.distribution = plan.distribution
        self.num_units = plan.num_units
        self.start = plan.start
        self.stop = plan.start + len(plan.nodes) * plan.num_units
        self.gradient = GatherRows(plan.gradient)
        columns = plan.circuits * num_variables + plan.variables
        self.register_buffer("variables", torch.from_numpy(plan.variables), persistent=False)
        self.register_buffer("columns", torch.from_numpy(columns), persistent=False)
        self.register_buffer("circuits", torch.from_numpy(plan.circuits), persistent=False)

    def select(self, x_VB: Tensor, shared: bool) -> Tensor:
        """The rows of `x_VB` (variables, or circuits x variables, by batch) that the folds look at."""
        return x_VB.index_select(0, self.variables if shared else self.columns)

    def forward(self, values: Tensor, stacked: Tensor | None, x_FB: Tensor, observed_FB: Tensor | None) -> None:
        """Write log2 p(x | unit) of all units; 0 where a variable is not observed."""
        out_FKB = values[self.start : self.stop].view(self.num_folds, self.num_units, -1)
        if stacked is None:  # soft evidence in nats: (F, B, K)
            self.distribution.forward(x_FB.new_empty(0), x_FB, out_FKB)
        else:
            size = self.num_units * max(self.distribution.size, out_FKB.shape[2])
            for a, b in self.chunks(size, values.device):
                self.distribution.forward(self.parameters_of(stacked, a, b), x_FB[a:b], out_FKB[a:b])
        if observed_FB is not None:
            out_FKB.masked_fill_(~observed_FB[:, None, :], 0.0)

    def forward_linear(self, values: Tensor, stacked: Tensor, x_FB: Tensor, observed_FB: Tensor | None) -> None:
        """Write p(x | unit) of all units; 1 where a variable is not observed."""
        out_FKB = values[self.start : self.stop].view(self.num_folds, self.num_units, -1)
        size = self.num_units * max(self.distribution.size, out_FKB.shape[2])
        for a, b in self.chunks(size, values.device):
            self.distribution.likelihood(self.parameters_of(stacked, a, b), x_FB[a:b], out_FKB[a:b])
        if observed_FB is not None:
            out_FKB.masked_fill_(~observed_FB[:, None, :], 1.0)

    def largest(self, stacked: Tensor, x_FB: Tensor) -> Tensor:
        """The largest p(x | unit) among the units of every node, (F, B)."""
        found = []
        for a, b in self.chunks(self.num_units * max(self.distribution.size, x_FB.shape[1]), x_FB.device):
            params_FKS = self.parameters_of(stacked, a, b)
            out_FKB = params_FKS.new_empty(*params_FKS.shape[:2], x_FB.shape[1])
            self.distribution.likelihood(params_FKS, x_FB[a:b], out_FKB)
            found.append(out_FKB.amax(1))
        return torch.cat(found)

    def forward_modes(self, values: Tensor, stacked: Tensor | None, observed_FB: Tensor) -> None:
        """Give unobserved variables the log-likelihood of their most likely value (for max-product)."""
        if stacked is None:
            return  # soft evidence without observation: every state counts 0
        out_FKB = values[self.start : self.stop].view(self.num_folds, self.num_units, -1)
        _, log_mode_FK = self.distribution.mode(self.parameters_of(stacked, 0, self.num_folds))
        log_mode_FK1 = log_mode_FK[:, :, None] * BITS_PER_NAT
        torch.where(observed_FB[:, None, :], out_FKB, log_mode_FK1, out=out_FKB)

    def backward(
        self,
        inner_grad: Tensor,
        stacked: Tensor,
        x_FB: Tensor,
        observed_FB: Tensor | None,
        out_PKS: Tensor,
        statistics_PKT: Tensor | None,
    ) -> None:
        """Add the gradient for the parameters to `out_PKS` (rows that only this layer owns are overwritten)."""
        size = self.num_units * max(self.distribution.size, x_FB.shape[1])
        for a, b in self.chunks(size, inner_grad.device):
            grad_FKB = self.gradient_of(inner_grad, a, b)
            if observed_FB is not None:
                grad_FKB = grad_FKB.masked_fill(~observed_FB[a:b, None, :], 0.0)
            self._write(out_PKS, stacked, x_FB, grad_FKB, a, b)
            if statistics_PKT is not None:
                found_FKT = self.distribution.statistics(self.parameters_of(stacked, a, b), x_FB[a:b], grad_FKB)
                statistics_PKT.index_add_(0, self.parameter_rows[a:b], -found_FKT)

    def _write(self, out_PKS: Tensor, stacked: Tensor, x_FB: Tensor, grad_FKB: Tensor, a: int, b: int) -> None:
        params_FKS = self.parameters_of(stacked, a, b)
        if not self.accumulate:
            self.distribution.backward(params_FKS, x_FB[a:b], grad_FKB, self.parameters_of(out_PKS, a, b))
            return
        part_FKS = torch.empty_like(params_FKS)
        self.distribution.backward(params_FKS, x_FB[a:b], grad_FKB, part_FKS)
        out_PKS.index_add_(0, self.parameter_rows[a:b], part_FKS)

    def gradient_of(self, inner_grad: Tensor, low: int, high: int) -> Tensor:
        """Gradient for the log-likelihoods of folds low..high, shape (F, K, B)."""
        rows = self.gradient.dense(inner_grad, low * self.num_units, high * self.num_units)
        return rows.view(high - low, self.num_units, -1)


class Layer(_Folded):
    """Sum nodes of one level and shape, each over its product units; or, without parameters, stored products."""

    def __init__(self, plan: LayerPlan, number: int, edges: EdgeIndex | None = None) -> None:
        super().__init__(plan.group, plan.parameter_rows, len(plan.nodes))
        assert plan.gradient is not None
        self.edges = None if edges is None else SparseEdges(edges)
        self.number = number
        self.is_sum = plan.group >= 0
        self.inner_units, self.outer_units = plan.inner_units, plan.outer_units
        self.width = max(plan.inner_units, plan.outer_units)
        self.edge_units = plan.inner_units  # rows of E per fold
        self.inner_start, self.outer_start = plan.inner_start, plan.outer_start
        self.inputs = GatherRows(plan.inputs)
        self.gradient = GatherRows(plan.gradient)

    def weights_of(self, stacked: Tensor, low: int, high: int) -> Tensor:
        """Weights of folds low..high, (F, H, K); a table made for the purpose where only live edges are stored."""
        if self.edges is not None:
            return self.edges.dense(stacked, low, high)
        return self.parameters_of(stacked, low, high)

    def scratch_size(self, batch: int, device: torch.device, backward: bool) -> int:
        """Numbers of scratch memory that a pass over this layer needs."""
        return (self.gradient if backward else self.inputs).largest_part() * batch

    def inner_rows(self, inner: Tensor, low: int, high: int) -> Tensor:
        """Inner rows of folds low..high of an E matrix, shape (F, K, B)."""
        start = self.inner_start
        rows = inner[start + low * self.edge_units : start + high * self.edge_units]
        return rows.view(high - low, self.edge_units, -1)

    def outer_rows(self, values: Tensor, low: int, high: int) -> Tensor:
        """Outer rows of folds low..high of a V matrix, shape (F, H, B)."""
        start = self.outer_start
        rows = values[start + low * self.outer_units : start + high * self.outer_units]
        return rows.view(high - low, self.outer_units, -1)

    def log_inner(self, values: Tensor, low: int, high: int) -> Tensor:
        """Log-values (base 2) of the inner units of folds low..high, shape (F, K, B)."""
        rows = self.inputs.dense(values, low * self.inner_units, high * self.inner_units)
        return rows.view(high - low, self.inner_units, -1)

    def read_inner(self, values: Tensor, low: int, high: int) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that gives `log_inner` of folds low..high for entries (fold, column): (N,), (N,) to (N, K)."""
        log_FKB = self.log_inner(values, low, high)
        return lambda fold, column: log_FKB[fold, :, column]

    def add_flows(self, inner: Tensor, fold: Tensor, column: Tensor, flow_NK: Tensor) -> None:
        """Add the flows of the inner units of entries to an E matrix."""
        units = torch.arange(self.inner_units, device=inner.device)
        index = (fold[:, None], units, column[:, None])
        self.inner_rows(inner, 0, self.num_folds).index_put_(index, flow_NK, accumulate=True)

    def choose(self, active: Tensor, low: int, high: int, unit_FB: Tensor, reached_FB: Tensor) -> None:
        """Mark in an E matrix of zeros the chosen inner unit of every reached fold of low..high."""
        rows_FKB = self.inner_rows(active, low, high)
        rows_FKB.scatter_(1, unit_FB[:, None], reached_FB[:, None].to(active.dtype))

    def by_inner(self, edges: Tensor) -> Tensor:
        """Numbers of the edges of a group, added up for every inner unit of this layer's folds: float64 (F, K)."""
        if self.edges is not None:
            return self.edges.column_sums(edges)
        return self.parameters_of(edges, 0, self.num_folds).sum(1, dtype=torch.float64)

    def pulled(self, inner_grad: Tensor, low: int, high: int) -> Tensor:
        """Gradient for the outer units of folds low..high, shape (F, H, B)."""
        rows = self.gradient.dense(inner_grad, low * self.outer_units, high * self.outer_units)
        return rows.view(high - low, self.outer_units, -1)

    def bind_forward(self, space: Workspace, a: int, b: int, sums_start: int) -> BoundForward:
        """Views of a workspace for folds a..b; `sums_start` is the layer's first row of `space.sums`."""
        batch, low, high = space.values.shape[1], a * self.inner_units, b * self.inner_units
        out_FHB = self.outer_rows(space.values, a, b)
        if not self.is_sum:
            gather = self.inputs.bind(space.values, low, high, out_FHB.view(high - low, batch), space.scratch)
            return BoundForward(a, b, gather, out_FHB, out_FHB, out_FHB, out_FHB, out_FHB, out_FHB)
        if space.keep:
            inner_FKB = self.inner_rows(space.inner, a, b)
            start = sums_start + a * self.outer_units
        else:
            inner_FKB = space.inner[: high - low].view(b - a, self.inner_units, batch)
            start = 0
        sums_FHB = space.sums[start : start + (b - a) * self.outer_units].view(b - a, self.outer_units, batch)
        scale_F1B = space.scale[: (b - a) * batch].view(b - a, 1, batch)
        gather_rows = None
        log_FKB = inner_FKB
        if self.inputs.is_slice:
            log_FKB = self.log_inner(space.values, a, b)
        else:
            gather_rows = self.inputs.bind(space.values, low, high, inner_FKB.view(high - low, batch), space.scratch)
        transposed = inner_FKB.transpose(1, 2)
        return BoundForward(a, b, gather_rows, log_FKB, inner_FKB, transposed, scale_F1B, sums_FHB, out_FHB)

    def bind_linear(self, space: LinearWorkspace, a: int, b: int, peaks_start: int) -> BoundForward:
        """Views of a linear workspace for folds a..b; `peaks_start` is the layer's first row of `space.peaks`."""
        batch, low, high = space.values.shape[1], a * self.inner_units, b * self.inner_units
        out_FHB = self.outer_rows(space.values, a, b)
        start = self.in_place_start(space.first_sum)
        if start is not None:
            rows_NB = space.values[start + low : start + high]
        elif space.keep:
            rows_NB = self.inner_rows(space.inner, a, b).view(high - low, batch)
        else:
            rows_NB = space.inner[: high - low]
        gather_rows = None
        if not self.inputs.is_slice or start is None:
            gather_rows = self.inputs.bind(space.values, low, high, rows_NB, space.scratch, product=True)
        scale_F1B = space.peaks[peaks_start + a : peaks_start + b].view(b - a, 1, batch)
        inner_FKB = rows_NB.view(b - a, self.inner_units, batch)
        transposed = inner_FKB.transpose(1, 2)
        return BoundForward(a, b, gather_rows, inner_FKB, inner_FKB, transposed, scale_F1B, out_FHB, out_FHB)

    def in_place_start(self, first_sum: int) -> int | None:
        """First of the input rows that inner units of a tree can overwrite, as nothing else reads them; or None."""
        start = self.inputs.start
        if start is None or start < 2 or start + self.num_folds * self.inner_units > first_sum:
            return None
        return start

    def bind_backward(self, space: GradientSpace, a: int, b: int) -> BoundBackward:
        """Views of a gradient space for folds a..b."""
        batch, low, high = space.inner.shape[1], a * self.outer_units, b * self.outer_units
        grad_FKB = self.inner_rows(space.inner, a, b)
        scaled_FHB = space.scaled[: (high - low) * batch].view(b - a, self.outer_units, batch)
        if not self.is_sum:
            gather = self.gradient.bind(space.inner, low, high, grad_FKB.view(high - low, batch), space.scratch)
            return BoundBackward(gather, grad_FKB, grad_FKB, grad_FKB)
        if self.gradient.is_slice:
            return BoundBackward(None, self.pulled(space.inner, a, b), scaled_FHB, grad_FKB)
        gather = self.gradient.bind(space.inner, low, high, scaled_FHB.view(high - low, batch), space.scratch)
        return BoundBackward(gather, scaled_FHB, scaled_FHB, grad_FKB)

    def forward(self, space: Workspace, stacked: Tensor | None, careful: bool) -> None:
        """Compute the outer units from earlier rows.

        With `careful`, sums that underflow are mended at once; else the caller has to check `space.sums`.
        """
        for bound in space.bound[self.number]:
            if bound.gather is not None:
                bound.gather.run()
            if stacked is None:
                continue
            weight_FHK = self.weights_of(stacked, bound.low, bound.high)
            torch.amax(bound.value, 1, keepdim=True, out=bound.scale)
            bound.scale.clamp_min_(FLOOR)
            torch.sub(bound.value, bound.scale, out=bound.inner)
            bound.inner.exp2_()
            torch.bmm(weight_FHK, bound.inner, out=bound.sums)
            torch.log2(bound.sums, out=bound.out)
            bound.out.add_(bound.scale)
            if careful and float(bound.sums.amin()) < TINY[bound.sums.dtype]:
                self._mend_underflow(space, weight_FHK, bound)

    def forward_linear(self, space: LinearWorkspace, stacked: Tensor) -> None:
        """Compute the outer units from earlier rows, all of them linear."""
        for bound in space.bound[self.number]:
            if bound.gather is not None:
                bound.gather.run()
            torch.amax(bound.inner, 1, keepdim=True, out=bound.scale)
            bound.scale.masked_fill_(bound.scale < TINY[bound.scale.dtype], 1.0)  # nothing to scale: see linear.py
            bound.inner.div_(bound.scale)
            torch.bmm(self.weights_of(stacked, bound.low, bound.high), bound.inner, out=bound.sums)

    def _mend_underflow(self, space: Workspace, weight_FHK: Tensor, bound: BoundForward) -> None:
        """Compute sums that underflowed again, entry by entry in log space."""
        f, h, column = (bound.sums < TINY[bound.sums.dtype]).nonzero(as_tuple=True)
        log_inner = self.read_inner(space.values, bound.low, bound.high)
        step = max(1, CACHE_SIZE // self.inner_units)
        for i in range(0, len(f), step):
            at = slice(i, i + step)
            terms_NK = weight_FHK[f[at], h[at]].log() + log_inner(f[at], column[at]) / BITS_PER_NAT
            bound.out[f[at], h[at], column[at]] = terms_NK.logsumexp(1) * BITS_PER_NAT
        bound.sums[f, h, column] = torch.inf  # gradient / inf = 0: the dense backward pass leaves them out
        possible = bound.out[f, h, column] > -torch.inf
        if space.keep and bool(possible.any()):
            space.underflow.append(Underflow(self.number, torch.stack([f + bound.low, h, column])[:, possible]))

    def backward(
        self, space: Workspace, gradient: GradientSpace, stacked: Tensor | None, weight_grad_PHK: Tensor | None
    ) -> None:
        """Gradient of the inner units (into `gradient`) and of the weights (added or written to its rows)."""
        pairs = zip(space.bound[self.number], gradient.bound[self.number], strict=True)
        for forward, bound in pairs:
            if bound.gather is not None:
                bound.gather.run()
            if stacked is None:
                continue
            weight_FHK = self.weights_of(stacked, forward.low, forward.high)
            torch.div(bound.pulled, forward.sums, out=bound.scaled)
            torch.bmm(weight_FHK.transpose(1, 2), bound.scaled, out=bound.grad)
            bound.grad.mul_(forward.inner)
            if weight_grad_PHK is not None:
                self.add_weight_grad(weight_grad_PHK, bound.scaled, forward.inner_transposed, forward.low)
        for entry in space.underflow:
            if entry.layer == self.number:
                assert stacked is not None
                self._backward_underflow(space, gradient.inner, stacked, weight_grad_PHK, entry.index_FHB)

    def add_weight_grad(self, out_PHK: Tensor, scaled_FHB: Tensor, inner_FBK: Tensor, low: int) -> None:
        """Add the gradient of the weights of the folds from `low` on to `out_PHK`, or write it to rows of their own."""
        if self.edges is not None:
            self.edges.write(out_PHK, torch.bmm(scaled_FHB, inner_FBK), low)
        elif self.accumulate:
            self.add_rows(out_PHK, torch.bmm(scaled_FHB, inner_FBK), low)
        else:
            torch.bmm(scaled_FHB, inner_FBK, out=self.parameters_of(out_PHK, low, low + len(scaled_FHB)))

    def _backward_underflow(
        self, space: Workspace, inner_grad: Tensor, stacked: Tensor, weight_grad: Tensor | None, index_FHB: Tensor
    ) -> None:
        """Add what the entries computed in log space contribute."""
        outer_FHB = self.outer_rows(space.values, 0, self.num_folds)
        log_inner = self.read_inner(space.values, 0, self.num_folds)
        pulled_FHB = self.pulled(inner_grad, 0, self.num_folds)
        weight_FHK = self.weights_of(stacked, 0, self.num_folds)
        step = max(1, CACHE_SIZE // self.inner_units)
        rows, out = self.parameter_rows, weight_grad
        if self.edges is not None and weight_grad is not None:
            rows, out = torch.arange(self.num_folds, device=inner_grad.device), torch.zeros_like(weight_FHK)
        for i in range(0, index_FHB.shape[1], step):
            f, h, column = index_FHB[:, i : i + step]
            weight_NK = weight_FHK[f, h]
            ratio_NK = log_inner(f, column) - outer_FHB[f, h, column][:, None]
            flow_NK = (weight_NK.log2() + ratio_NK).exp2() * pulled_FHB[f, h, column][:, None]
            self.add_flows(inner_grad, f, column, flow_NK)
            if out is not None:
                exact_NK = torch.where(weight_NK > 0, flow_NK / weight_NK.clamp_min(TINY[weight_NK.dtype]), 0.0)
                out.index_put_((rows[f], h), exact_NK, accumulate=True)
        if self.edges is not None and weight_grad is not None and out is not None:
            weight_grad += self.edges.take(out)

    def pass_down(self, space: GradientSpace, stacked: Tensor | None, out_PH: Tensor | None) -> None:
        """Top-down probabilities: those of the outer units (added to `out_PH`), then those of the inner ones.

        `space` has one column.
        """
        for (a, b), bound in zip(self.chunks(self.width, space.inner.device), space.bound[self.number], strict=True):
            if bound.gather is not None:
                bound.gather.run()
            if stacked is None or out_PH is None:
                continue
            self.add_rows(out_PH, bound.pulled[..., 0], a)
            if self.edges is not None and pass_edges(self.edges.index, stacked, bound.pulled, bound.grad, a):
                continue
            torch.bmm(self.weights_of(stacked, a, b).transpose(1, 2), bound.pulled, out=bound.grad)

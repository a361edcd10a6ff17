"""Folded layers: forward and closed-form backward passes over the rows of a workspace.

Shapes: F folded nodes, H outer units, K inner units, B batch, S numbers per input unit. Values are log-likelihoods in
nats; inside a sum layer they are linear, scaled by the largest inner unit of each node and example. Where that scale is
too coarse (a sum that underflows), the affected entries are computed again in log space.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from lvd_lightning.circuits.plan import LOG_ONE, LOG_ZERO, Gather, InputPlan, LayerPlan

__all__ = ["GatherRows", "InputLayer", "Layer", "Underflow", "Workspace", "WorkspacePool"]

#: Numbers that one round of operations on the CPU touches per array: several arrays of it stay in the cache.
CACHE_SIZE = 1 << 17
#: A sum below this has lost precision to underflow.
TINY = {torch.float32: 1e-30, torch.float64: 1e-280}
#: Log-scale of a node without any support; -inf would turn the difference of two -inf into NaN.
FLOOR = -1e30


@dataclass
class Underflow:
    """Entries of one layer's output that were computed in log space; `index_FHB` has shape (3, entries)."""

    layer: int
    index_FHB: Tensor


@dataclass
class Workspace:
    """Buffers of one forward pass, kept until its backward pass is done.

    values (V rows, B) log-likelihoods; inner (E rows, B) linear inner values and sums (V rows, B) linear outer values,
    both only when a backward pass may follow; underflow: see `Underflow`.
    """

    values: Tensor
    inner: Tensor
    sums: Tensor
    underflow: list[Underflow] = field(default_factory=list)


class WorkspacePool:
    """Reuses buffers: fresh memory costs as much as the arithmetic on it. Copies of a module start with none."""

    def __init__(self, limit: int = 2) -> None:
        self.limit = limit
        self.free: list[tuple[object, list[Tensor]]] = []

    def take(self, sizes: tuple[int, ...], like: Tensor) -> list[Tensor]:
        """One flat buffer per size, of the type and device of `like`."""
        key = (sizes, like.dtype, like.device)
        for position, (found, buffers) in enumerate(self.free):
            if found == key:
                del self.free[position]
                return buffers
        return [torch.empty(size, dtype=like.dtype, device=like.device) for size in sizes]

    def give(self, buffers: list[Tensor]) -> None:
        """Return buffers that `take` handed out."""
        key = (tuple(len(buffer) for buffer in buffers), buffers[0].dtype, buffers[0].device)
        self.free.append((key, buffers))
        del self.free[: -self.limit]

    def __deepcopy__(self, memo: dict[int, object]) -> WorkspacePool:
        return WorkspacePool(self.limit)

    def __reduce__(self) -> tuple[type[WorkspacePool], tuple[int]]:
        return WorkspacePool, (self.limit,)


class GatherRows(nn.Module):
    """Sums of rows: row r of the result is the sum of some rows of a source (indices are fixed, see `plan.Gather`)."""

    def __init__(self, gather: Gather) -> None:
        super().__init__()
        self.start = _as_range(gather.first)
        self.register_buffer("first", torch.from_numpy(gather.first), persistent=False)
        self.bounds = [slot.dst for slot in gather.more]
        self.prefix = [_as_range(slot.dst) == 0 for slot in gather.more]
        for number, slot in enumerate(gather.more):
            self.register_buffer(f"dst{number}", torch.from_numpy(slot.dst), persistent=False)
            self.register_buffer(f"src{number}", torch.from_numpy(slot.src), persistent=False)

    @property
    def is_slice(self) -> bool:
        """Whether the result is a plain slice of the source."""
        return self.start is not None and not self.bounds

    def view(self, source_RB: Tensor, low: int, high: int) -> Tensor:
        """Rows low..high of the result, as a view (only if `is_slice`)."""
        assert self.start is not None
        return source_RB[self.start + low : self.start + high]

    def into(self, source_RB: Tensor, low: int, high: int, out_NB: Tensor) -> None:
        """Write rows low..high of the result to `out_NB`."""
        if self.start is not None:
            out_NB.copy_(source_RB[self.start + low : self.start + high])
        else:
            torch.index_select(source_RB, 0, self.first[low:high], out=out_NB)
        for number, rows in enumerate(self.bounds):
            a, b = np.searchsorted(rows, [low, high])
            if a == b:
                continue
            part = source_RB.index_select(0, getattr(self, f"src{number}")[a:b])
            if self.prefix[number]:
                out_NB[: b - a].add_(part)
            else:
                out_NB.index_add_(0, getattr(self, f"dst{number}")[a:b] - low, part)

    def dense(self, source_RB: Tensor, low: int, high: int) -> Tensor:
        """Rows low..high of the result: a view where possible, else fresh memory."""
        if self.is_slice:
            return self.view(source_RB, low, high)
        out_NB = source_RB.new_empty(high - low, source_RB.shape[1])
        self.into(source_RB, low, high, out_NB)
        return out_NB


class _Folded(nn.Module):
    """What input and inner layers share: rows of a parameter group, and chunks of folds that fit the cache."""

    parameter_rows: Tensor | None

    def __init__(self, group: int, parameter_rows: np.ndarray, num_folds: int) -> None:
        super().__init__()
        self.group = group
        self.num_folds = num_folds
        self.row_start = _as_range(parameter_rows)
        self.accumulate = self.row_start is None  # whether other folds or layers may own the same gradient rows
        self.register_buffer("parameter_rows", torch.from_numpy(parameter_rows), persistent=False)

    def parameters_of(self, stacked_PXY: Tensor, low: int, high: int) -> Tensor:
        """Parameters of folds low..high: a view unless nodes are tied."""
        if self.row_start is not None:
            return stacked_PXY[self.row_start + low : self.row_start + high]
        assert self.parameter_rows is not None
        return stacked_PXY.index_select(0, self.parameter_rows[low:high])

    def chunks(self, size: int, device: torch.device) -> Iterator[tuple[int, int]]:
        """Ranges of folds; `size` numbers per fold. One range on an accelerator."""
        step = self.num_folds if device.type != "cpu" else max(1, CACHE_SIZE // max(size, 1))
        for low in range(0, self.num_folds, step):
            yield low, min(low + step, self.num_folds)


class InputLayer(_Folded):
    """All input nodes of one distribution and width."""

    def __init__(self, plan: InputPlan, num_variables: int) -> None:
        super().__init__(plan.group, plan.parameter_rows, len(plan.nodes))
        assert plan.gradient is not None
        self.distribution = plan.distribution
        self.num_units = plan.num_units
        self.start = plan.start
        self.stop = plan.start + len(plan.nodes) * plan.num_units
        self.gradient = GatherRows(plan.gradient)
        self.register_buffer("variables", torch.from_numpy(plan.variables), persistent=False)
        self.register_buffer(
            "columns", torch.from_numpy(plan.circuits * num_variables + plan.variables), persistent=False
        )

    def select(self, x_VB: Tensor, shared: bool) -> Tensor:
        """The rows of `x_VB` (variables, or circuits x variables, by batch) that the folds look at."""
        index = self.variables if shared else self.columns
        return x_VB.index_select(0, index)

    def forward(self, values: Tensor, stacked: Tensor | None, x_FB: Tensor, observed_FB: Tensor | None) -> None:
        """Write log p(x | unit) of all units; 0 where a variable is not observed."""
        out_FKB = values[self.start : self.stop].view(self.num_folds, self.num_units, -1)
        if stacked is None:  # soft evidence: (F, B, K)
            out_FKB.copy_(x_FB.transpose(1, 2))
        else:
            size = self.num_units * max(self.distribution.size, out_FKB.shape[2])
            for a, b in self.chunks(size, values.device):
                self.distribution.forward(self.parameters_of(stacked, a, b), x_FB[a:b], out_FKB[a:b])
        if observed_FB is not None:
            out_FKB.masked_fill_(~observed_FB[:, None, :], 0.0)

    def forward_modes(self, values: Tensor, stacked: Tensor | None, observed_FB: Tensor) -> None:
        """Give unobserved variables the log-likelihood of their most likely value (for max-product)."""
        if stacked is None:
            return  # soft evidence without observation: every state counts 0
        out_FKB = values[self.start : self.stop].view(self.num_folds, self.num_units, -1)
        _, log_mode_FK = self.distribution.mode(self.parameters_of(stacked, 0, self.num_folds))
        torch.where(observed_FB[:, None, :], out_FKB, log_mode_FK[:, :, None], out=out_FKB)

    def backward(
        self,
        inner_grad: Tensor,
        stacked: Tensor,
        x_FB: Tensor,
        observed_FB: Tensor | None,
        out_PKS: Tensor | None,
        statistics_PK3: Tensor | None,
    ) -> None:
        """Add the gradient for the parameters to `out_PKS` (rows that only this layer owns are overwritten)."""
        size = self.num_units * max(self.distribution.size, x_FB.shape[1])
        for a, b in self.chunks(size, inner_grad.device):
            grad_FKB = self.gradient_of(inner_grad, a, b)
            if observed_FB is not None:
                grad_FKB = grad_FKB.masked_fill(~observed_FB[a:b, None, :], 0.0)
            if out_PKS is not None:
                self._write(out_PKS, stacked, x_FB, grad_FKB, a, b)
            if statistics_PK3 is not None:
                found_FK3 = self.distribution.statistics(x_FB[a:b], grad_FKB)  # type: ignore[attr-defined]
                statistics_PK3.index_add_(0, self.parameter_rows[a:b], -found_FK3)  # type: ignore[index]

    def _write(self, out_PKS: Tensor, stacked: Tensor, x_FB: Tensor, grad_FKB: Tensor, a: int, b: int) -> None:
        params_FKS = self.parameters_of(stacked, a, b)
        if not self.accumulate:
            self.distribution.backward(params_FKS, x_FB[a:b], grad_FKB, self.parameters_of(out_PKS, a, b))
            return
        part_FKS = torch.empty_like(params_FKS)
        self.distribution.backward(params_FKS, x_FB[a:b], grad_FKB, part_FKS)
        out_PKS.index_add_(0, self.parameter_rows[a:b], part_FKS)  # type: ignore[index]

    def gradient_of(self, inner_grad: Tensor, low: int, high: int) -> Tensor:
        """Gradient for the log-likelihoods of folds low..high, shape (F, K, B)."""
        rows = self.gradient.dense(inner_grad, low * self.num_units, high * self.num_units)
        return rows.view(high - low, self.num_units, -1)


class Layer(_Folded):
    """Sum nodes of one level and shape, each over its product units; or, without parameters, stored products."""

    def __init__(self, plan: LayerPlan, number: int) -> None:
        super().__init__(plan.group, plan.parameter_rows, len(plan.nodes))
        assert plan.gradient is not None
        self.number = number
        self.is_sum = plan.group >= 0
        self.inner_units, self.outer_units = plan.inner_units, plan.outer_units
        self.inner_start, self.outer_start = plan.inner_start, plan.outer_start
        self.inputs = GatherRows(plan.inputs)
        self.gradient = GatherRows(plan.gradient)

    def inner_rows(self, inner: Tensor, low: int, high: int) -> Tensor:
        """Inner rows of folds low..high of an E matrix, shape (F, K, B)."""
        start = self.inner_start
        rows = inner[start + low * self.inner_units : start + high * self.inner_units]
        return rows.view(high - low, self.inner_units, -1)

    def outer_rows(self, values: Tensor, low: int, high: int) -> Tensor:
        """Outer rows of folds low..high of a V matrix, shape (F, H, B)."""
        start = self.outer_start
        rows = values[start + low * self.outer_units : start + high * self.outer_units]
        return rows.view(high - low, self.outer_units, -1)

    def log_inner(self, values: Tensor, low: int, high: int) -> Tensor:
        """Log-values of the inner units of folds low..high, shape (F, K, B)."""
        rows = self.inputs.dense(values, low * self.inner_units, high * self.inner_units)
        return rows.view(high - low, self.inner_units, -1)

    def pulled(self, inner_grad: Tensor, low: int, high: int) -> Tensor:
        """Gradient for the outer units of folds low..high, shape (F, H, B)."""
        rows = self.gradient.dense(inner_grad, low * self.outer_units, high * self.outer_units)
        return rows.view(high - low, self.outer_units, -1)

    def forward(self, space: Workspace, stacked: Tensor | None, keep: bool) -> None:
        """Compute the outer units from earlier rows; keep the linear values if a backward pass may follow."""
        if not self.is_sum:
            stop = self.num_folds * self.inner_units
            self.inputs.into(space.values, 0, stop, space.values[self.outer_start : self.outer_start + stop])
            return
        assert stacked is not None
        width = max(self.inner_units, self.outer_units)
        for a, b in self.chunks(width * space.values.shape[1], space.values.device):
            self._forward_chunk(space, self.parameters_of(stacked, a, b), keep, a, b)

    def _forward_chunk(self, space: Workspace, weight_FHK: Tensor, keep: bool, a: int, b: int) -> None:
        if keep:
            inner_FKB, sums_FHB = self.inner_rows(space.inner, a, b), self.outer_rows(space.sums, a, b)
        else:
            batch = space.values.shape[1]
            inner_FKB = _scratch(space.inner, b - a, self.inner_units, batch)
            sums_FHB = _scratch(space.sums, b - a, self.outer_units, batch)
        low, high = a * self.inner_units, b * self.inner_units
        if self.inputs.is_slice:
            log_FKB = self.inputs.view(space.values, low, high).view(inner_FKB.shape)
        else:
            self.inputs.into(space.values, low, high, inner_FKB.view(high - low, -1))
            log_FKB = inner_FKB
        scale_F1B = log_FKB.amax(1, keepdim=True).clamp_min_(FLOOR)
        torch.sub(log_FKB, scale_F1B, out=inner_FKB)
        inner_FKB.exp_()
        torch.bmm(weight_FHK, inner_FKB, out=sums_FHB)
        out_FHB = self.outer_rows(space.values, a, b)
        torch.log(sums_FHB, out=out_FHB)
        out_FHB.add_(scale_F1B)
        if bool(sums_FHB.amin() < TINY[sums_FHB.dtype]):
            self._mend_underflow(space, weight_FHK, sums_FHB, out_FHB, keep, a, b)

    def _mend_underflow(
        self, space: Workspace, weight_FHK: Tensor, sums_FHB: Tensor, out_FHB: Tensor, keep: bool, a: int, b: int
    ) -> None:
        """Compute sums that underflowed again, entry by entry in log space."""
        f, h, column = (sums_FHB < TINY[sums_FHB.dtype]).nonzero(as_tuple=True)
        log_FKB = self.log_inner(space.values, a, b)
        step = max(1, CACHE_SIZE // self.inner_units)
        for i in range(0, len(f), step):
            at = slice(i, i + step)
            terms = weight_FHK[f[at], h[at]].log() + log_FKB[f[at], :, column[at]]
            out_FHB[f[at], h[at], column[at]] = terms.logsumexp(1)
        sums_FHB[f, h, column] = torch.inf  # gradient / inf = 0: the dense backward pass leaves them out
        possible = out_FHB[f, h, column] > -torch.inf
        if keep and bool(possible.any()):
            space.underflow.append(Underflow(self.number, torch.stack([f + a, h, column])[:, possible]))

    def backward(
        self, space: Workspace, stacked: Tensor | None, inner_grad: Tensor, weight_grad_PHK: Tensor | None
    ) -> None:
        """Gradient of the inner units (into `inner_grad`) and of the weights (added or written to its rows)."""
        if not self.is_sum:
            stop = self.num_folds * self.inner_units
            rows = inner_grad[self.inner_start : self.inner_start + stop]
            self.gradient.into(inner_grad, 0, stop, rows)
            return
        assert stacked is not None
        width = max(self.inner_units, self.outer_units)
        for a, b in self.chunks(width * inner_grad.shape[1], inner_grad.device):
            weight_FHK = self.parameters_of(stacked, a, b)
            inner_FKB = self.inner_rows(space.inner, a, b)
            scaled_FHB = self.pulled(inner_grad, a, b) / self.outer_rows(space.sums, a, b)
            grad_FKB = self.inner_rows(inner_grad, a, b)
            torch.bmm(weight_FHK.transpose(1, 2), scaled_FHB, out=grad_FKB)
            grad_FKB.mul_(inner_FKB)
            if weight_grad_PHK is None:
                continue
            if not self.accumulate:
                torch.bmm(scaled_FHB, inner_FKB.transpose(1, 2), out=self.parameters_of(weight_grad_PHK, a, b))
            else:
                part_FHK = torch.bmm(scaled_FHB, inner_FKB.transpose(1, 2))
                weight_grad_PHK.index_add_(0, self.parameter_rows[a:b], part_FHK)  # type: ignore[index]
        for entry in space.underflow:
            if entry.layer == self.number:
                self._backward_underflow(space, stacked, inner_grad, weight_grad_PHK, entry.index_FHB)

    def _backward_underflow(
        self, space: Workspace, stacked: Tensor, inner_grad: Tensor, weight_grad: Tensor | None, index_FHB: Tensor
    ) -> None:
        """Add what the entries computed in log space contribute."""
        outer_FHB = self.outer_rows(space.values, 0, self.num_folds)
        log_FKB = self.log_inner(space.values, 0, self.num_folds)
        pulled_FHB = self.pulled(inner_grad, 0, self.num_folds)
        grad_FKB = self.inner_rows(inner_grad, 0, self.num_folds)
        weight_FHK = self.parameters_of(stacked, 0, self.num_folds)
        assert self.parameter_rows is not None
        step = max(1, CACHE_SIZE // self.inner_units)
        for i in range(0, index_FHB.shape[1], step):
            f, h, column = index_FHB[:, i : i + step]
            weight_NK = weight_FHK[f, h]
            ratio_NK = log_FKB[f, :, column] - outer_FHB[f, h, column][:, None]
            flow_NK = (weight_NK.log() + ratio_NK).exp() * pulled_FHB[f, h, column][:, None]
            units = torch.arange(self.inner_units, device=f.device)
            grad_FKB.index_put_((f[:, None], units, column[:, None]), flow_NK, accumulate=True)
            if weight_grad is not None:
                exact_NK = torch.where(weight_NK > 0, flow_NK / weight_NK.clamp_min(TINY[weight_NK.dtype]), 0.0)
                weight_grad.index_put_((self.parameter_rows[f], h), exact_NK, accumulate=True)

    def pass_down(self, stacked: Tensor | None, inner: Tensor) -> Tensor | None:
        """Top-down probabilities: those of the outer units, shape (F, H), from which those of the inner follow.

        `inner` is an E matrix with one column.
        """
        outer_FH1 = self.pulled(inner, 0, self.num_folds)
        out_FK1 = self.inner_rows(inner, 0, self.num_folds)
        if stacked is None:
            out_FK1.copy_(outer_FH1)
            return None
        torch.bmm(self.parameters_of(stacked, 0, self.num_folds).transpose(1, 2), outer_FH1, out=out_FK1)
        return outer_FH1[..., 0]


def _scratch(buffer: Tensor, folds: int, units: int, batch: int) -> Tensor:
    return buffer.view(-1)[: folds * units * batch].view(folds, units, batch)


def _as_range(index: np.ndarray) -> int | None:
    """The first number of `index` if it counts up by one from there, else None."""
    if len(index) == 0 or not np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return None
    return int(index[0])


def initialise_constants(values: Tensor) -> None:
    """Set the two constant rows of a V matrix."""
    values[LOG_ONE] = 0.0
    values[LOG_ZERO] = -torch.inf

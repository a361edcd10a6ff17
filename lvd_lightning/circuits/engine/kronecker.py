"""Sums over Kronecker products whose units are never stored: a layer keeps the factors and multiplies on the way.

Explicitly, the product of two regions with I and J units has I J rows in E, and so have its gradients, for every
example of a step. Here E has a row for each unit of a factor instead, I + J of them: in the forward pass the scaled
linear value of the unit, in the backward pass the gradient for its logarithm as far as it comes through this product.
Outer products of the factors are made in scratch memory, for as many nodes and examples at once as fit the cache, and
made again in the backward pass.

Shapes: F folded nodes, P products (partitions) of a node, I and J units of the two factors, K = P I J inner units, H
outer units, B batch, N entries, V and E the row spaces of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from typing_extensions import override

from lvd_lightning.circuits.engine import layers
from lvd_lightning.circuits.engine.layers import FLOOR, TINY, Layer
from lvd_lightning.circuits.engine.plan import LayerPlan
from lvd_lightning.circuits.engine.workspace import BoundForward, GradientSpace, Workspace

__all__ = ["KroneckerLayer"]

#: Numbers of an outer product that are made at once on an accelerator.
ACCELERATOR_SIZE = 1 << 26


class KroneckerLayer(Layer):
    """Sum nodes whose children are Kronecker products of two factors with I and J units, P of them at most.

    Nodes with fewer products are padded with ones of probability zero. Inner unit (p I + i) J + j of a node is that of
    unit i of the first and unit j of the second factor of product p.
    """

    def __init__(self, plan: LayerPlan, number: int) -> None:
        super().__init__(plan, number)
        assert plan.grid is not None
        self.first_units, self.second_units = plan.grid
        self.num_products = plan.inner_units // (self.first_units * self.second_units)
        self.product_rows = self.first_units + self.second_units
        self.edge_units = self.num_products * self.product_rows

    @override
    def scratch_size(self, batch: int, device: torch.device, backward: bool) -> int:
        """An outer product; in the backward pass also what gathers need."""
        gathered = self.gradient.largest_part() * batch if backward else 0
        return max(gathered, max((b - a) * (d - c) for a, b, c, d in self._pieces(batch, device)) * self.inner_units)

    @override
    def log_inner(self, values: Tensor, low: int, high: int) -> Tensor:
        first_FPIB, second_FPJB = self._log_factors(values, low, high)
        return (first_FPIB[:, :, :, None] + second_FPJB[:, :, None]).flatten(1, 3)

    @override
    def read_inner(self, values: Tensor, low: int, high: int) -> Callable[[Tensor, Tensor], Tensor]:
        first_FPIB, second_FPJB = self._log_factors(values, low, high)

        def entries(fold: Tensor, column: Tensor) -> Tensor:
            first_NPI, second_NPJ = first_FPIB[fold, :, :, column], second_FPJB[fold, :, :, column]
            return (first_NPI[..., None] + second_NPJ[:, :, None]).flatten(1)

        return entries

    @override
    def add_flows(self, inner: Tensor, fold: Tensor, column: Tensor, flow_NK: Tensor) -> None:
        flow = flow_NK.view(-1, self.num_products, self.first_units, self.second_units)
        flow_NE = torch.cat([flow.sum(3), flow.sum(2)], 2).flatten(1)
        index = (fold[:, None], torch.arange(self.edge_units, device=inner.device), column[:, None])
        self.inner_rows(inner, 0, self.num_folds).index_put_(index, flow_NE, accumulate=True)

    @override
    def bind_forward(self, space: Workspace, a: int, b: int, sums_start: int) -> BoundForward:
        batch, low, high = space.values.shape[1], a * self.edge_units, b * self.edge_units
        start = sums_start + a * self.outer_units if space.keep else 0
        sums_FHB = space.sums[start : start + (b - a) * self.outer_units].view(b - a, self.outer_units, batch)
        rows_NB = (
            self.inner_rows(space.inner, a, b).view(high - low, batch) if space.keep else space.inner[: high - low]
        )
        gather = self.inputs.bind(space.values, low, high, rows_NB, space.scratch)
        factors = rows_NB.view(b - a, self.num_products, self.product_rows, batch)
        scale_F1B = space.scale[: (b - a) * batch].view(b - a, 1, batch)
        out_FHB = self.outer_rows(space.values, a, b)
        return BoundForward(a, b, gather, factors, factors, factors, scale_F1B, sums_FHB, out_FHB)

    @override
    def forward(self, space: Workspace, stacked: Tensor | None, careful: bool) -> None:
        assert stacked is not None
        for bound in space.bound[self.number]:
            assert bound.gather is not None
            bound.gather.run()
            self._scale(bound)
            weight_FHK = self.parameters_of(stacked, bound.low, bound.high)
            for a, b, c, d in self._pieces(bound.sums.shape[2], bound.sums.device, bound.high - bound.low):
                outer_FKB = self._outer(bound.inner[a:b, ..., c:d], space.scratch)
                bound.sums[a:b, :, c:d] = torch.bmm(weight_FHK[a:b], outer_FKB)
            torch.log2(bound.sums, out=bound.out)
            bound.out.add_(bound.scale)
            if careful and float(bound.sums.amin()) < TINY[bound.sums.dtype]:
                self._mend_underflow(space, weight_FHK, bound)

    @override
    def backward(
        self, space: Workspace, gradient: GradientSpace, stacked: Tensor | None, weight_grad_PHK: Tensor | None
    ) -> None:
        assert stacked is not None
        for forward, bound in zip(space.bound[self.number], gradient.bound[self.number], strict=True):
            if bound.gather is not None:
                bound.gather.run()
            weight_FHK = self.parameters_of(stacked, forward.low, forward.high)
            torch.div(bound.pulled, forward.sums, out=bound.scaled)
            num_folds, _, batch = bound.scaled.shape
            grad_FPEB = bound.grad.view(forward.inner.shape)
            found_FHK = None if weight_grad_PHK is None else torch.zeros_like(weight_FHK)
            for a, b, c, d in self._pieces(batch, bound.grad.device, num_folds):
                scaled_FHB = bound.scaled[a:b, :, c:d]
                outer_FKB = self._outer(forward.inner[a:b, ..., c:d], space.scratch)
                flow_FKB = gradient.scratch[: outer_FKB.numel()].view(outer_FKB.shape)
                torch.bmm(weight_FHK[a:b].transpose(1, 2), scaled_FHB, out=flow_FKB)
                flow_FKB.mul_(outer_FKB)
                self._sum_flows(flow_FKB, grad_FPEB[a:b, ..., c:d])
                if found_FHK is not None:
                    found_FHK[a:b].baddbmm_(scaled_FHB, outer_FKB.transpose(1, 2))
            if found_FHK is not None and weight_grad_PHK is not None:
                self.add_rows(weight_grad_PHK, found_FHK, forward.low)
        for entry in space.underflow:
            if entry.layer == self.number:
                self._backward_underflow(space, gradient.inner, stacked, weight_grad_PHK, entry.index_FHB)

    @override
    def pass_down(self, space: GradientSpace, stacked: Tensor | None, out_PH: Tensor | None) -> None:
        assert stacked is not None
        assert out_PH is not None
        chunks = self.chunks(self.width, space.inner.device)
        for bound, (low, high) in zip(space.bound[self.number], chunks, strict=True):
            if bound.gather is not None:
                bound.gather.run()
            self.add_rows(out_PH, bound.pulled[..., 0], low)
            weight_FHK = self.parameters_of(stacked, low, high)
            shape = (high - low, self.num_products, self.product_rows, bound.grad.shape[2])
            self._sum_flows(torch.bmm(weight_FHK.transpose(1, 2), bound.pulled), bound.grad.view(shape))

    @override
    def choose(self, active: Tensor, low: int, high: int, unit_FB: Tensor, reached_FB: Tensor) -> None:
        rows_FEB = self.inner_rows(active, low, high)
        product_FB = unit_FB // (self.first_units * self.second_units) * self.product_rows
        first_FB = unit_FB // self.second_units % self.first_units
        second_FB = self.first_units + unit_FB % self.second_units
        chosen_F2B = torch.stack([product_FB + first_FB, product_FB + second_FB], 1)
        rows_FEB.scatter_(1, chosen_F2B, reached_FB[:, None].to(active.dtype).expand(chosen_F2B.shape))

    def unit_posteriors(self, space: Workspace, gradient: GradientSpace, stacked: Tensor, fold: int) -> Tensor:
        """p(inner unit is reached | x) of one fold after a backward pass from heads of gradient 1, shape (K, B)."""
        pulled_HB = self.pulled(gradient.inner, fold, fold + 1)[0]
        outer_HB = self.outer_rows(space.values, fold, fold + 1)[0]
        log_KB = self.log_inner(space.values, fold, fold + 1)[0]
        log_weight_HK = self.parameters_of(stacked, fold, fold + 1)[0].log2()
        out_KB = torch.zeros_like(log_KB)
        for log_weight_K, outer_B, pulled_B in zip(log_weight_HK, outer_HB, pulled_HB, strict=True):
            share_KB = (log_weight_K[:, None] + log_KB - outer_B.clamp_min(FLOOR)).exp2_()
            out_KB += torch.where(pulled_B > 0, share_KB * pulled_B, 0.0)
        return out_KB

    def _pieces(
        self, batch: int, device: torch.device, num_folds: int | None = None
    ) -> Iterator[tuple[int, int, int, int]]:
        """Ranges of folds and of examples whose outer products fit the scratch memory."""
        limit = layers.CACHE_SIZE if device.type == "cpu" else ACCELERATOR_SIZE
        num_folds = self.num_folds if num_folds is None else num_folds
        folds = min(num_folds, max(1, limit // (self.inner_units * batch)))
        columns = min(batch, max(1, limit // (self.inner_units * folds)))
        for low in range(0, num_folds, folds):
            for left in range(0, batch, columns):
                yield low, min(low + folds, num_folds), left, min(left + columns, batch)

    def _scale(self, bound: BoundForward) -> None:
        """From logarithms to linear values: those of all outer products divided by the largest of their node.

        The second factors are divided by their own largest unit, the first ones by what then is left.
        """
        first_FPIB, second_FPJB = bound.inner.split((self.first_units, self.second_units), 2)
        second_FP1B = second_FPJB.amax(2, keepdim=True).clamp_min_(FLOOR)
        largest_FPB = (first_FPIB.amax(2, keepdim=True).clamp_min_(FLOOR) + second_FP1B)[:, :, 0]
        torch.amax(largest_FPB, 1, keepdim=True, out=bound.scale)
        bound.scale.clamp_min_(FLOOR)
        first_FPIB.add_(second_FP1B - bound.scale[:, None])
        second_FPJB.sub_(second_FP1B)
        bound.inner.exp2_()

    def _outer(self, factors_FPEB: Tensor, scratch: Tensor) -> Tensor:
        """Products of the units of both factors, (F, K, B), in `scratch`."""
        first_FPIB, second_FPJB = factors_FPEB.split((self.first_units, self.second_units), 2)
        folds, _, _, batch = factors_FPEB.shape
        shape = (folds, self.num_products, self.first_units, self.second_units, batch)
        out = scratch[: folds * self.inner_units * batch].view(shape)
        torch.mul(first_FPIB[:, :, :, None], second_FPJB[:, :, None], out=out)
        return out.view(folds, self.inner_units, batch)

    def _sum_flows(self, flow_FKB: Tensor, out_FPEB: Tensor) -> None:
        """Flows of outer products to those of the units of both factors."""
        folds, _, batch = flow_FKB.shape
        flow = flow_FKB.view(folds, self.num_products, self.first_units, self.second_units, batch)
        first_FPIB, second_FPJB = out_FPEB.split((self.first_units, self.second_units), 2)
        first_FPIB.copy_(flow.sum(3))
        second_FPJB.copy_(flow.sum(2))

    def _log_factors(self, values: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Log-values of the units of the factors of folds low..high, (F, P, I, B) and (F, P, J, B)."""
        rows = self.inputs.dense(values, low * self.edge_units, high * self.edge_units)
        rows_FPEB = rows.view(high - low, self.num_products, self.product_rows, -1)
        first_FPIB, second_FPJB = rows_FPEB.split((self.first_units, self.second_units), 2)
        return first_FPIB, second_FPJB

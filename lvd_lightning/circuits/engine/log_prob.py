"""log p of a compiled circuit as an autograd function: which forward pass it takes, and the backward pass after it.

Values stay linear between layers where a circuit allows it. What got too small for that - pairs of a circuit and an
example - goes through the general pass besides, and its gradients are added. On a GPU with fused kernels all examples
go through the general pass, which has no such question to ask there.

Shapes: G circuits, H heads, B batch, F folded nodes, N pairs that are computed again, in S columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from lvd_lightning.circuits.engine import layers
from lvd_lightning.circuits.engine.bad_flows import note_bad_gradient
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.engine.kernels.cpu import passes
from lvd_lightning.circuits.engine.kernels.cpu.passes import FusedWorkspace, WideWorkspace
from lvd_lightning.circuits.engine.layers import InputLayer
from lvd_lightning.circuits.engine.linear import inexact, run_linear
from lvd_lightning.circuits.engine.workspace import LinearWorkspace, Workspace, few_sizes

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.batch import Batch
    from lvd_lightning.circuits.engine.engine import Engine

__all__ = ["Again", "Lease", "LogProb", "evaluate"]

AnySpace = TypeVar("AnySpace", Workspace, LinearWorkspace, FusedWorkspace)


class Lease(Generic[AnySpace]):
    """A workspace from the engine's pool; it goes back when nothing refers to the lease any more."""

    space: AnySpace

    def __init__(self, engine: Engine, kind: type[AnySpace], size: int, keep: bool) -> None:
        self.pool, self.key = engine.pool, engine.pool_key(kind.__name__ + ("keep" if keep else ""), size)
        found = self.pool.take(self.key)
        self.space = found if isinstance(found, kind) else _new_space(engine, kind, size, keep)

    def __del__(self) -> None:
        if hasattr(self, "space"):
            self.pool.give(self.key, self.space)


def _new_space(engine: Engine, kind: type[AnySpace], size: int, keep: bool) -> AnySpace:
    make: Any = kind  # their constructors differ
    if issubclass(kind, FusedWorkspace):
        space: Any = kind(engine, size, keep)
    else:
        rows, edges = engine.plan.num_value_rows, engine.plan.num_edge_rows
        space = make(engine.inner_layers(), rows, edges, size, keep, engine.like())
    return space


class LogProb(torch.autograd.Function):
    """log p of all heads, shape (G, H, B), with its closed-form backward pass.

    Where `wanted` (bool, as the result) is False, anything may be returned, and the gradient has to be 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        batch: Batch,
        keep: bool,
        wanted: Tensor | None,
        margin: float | None,
        inputs: Tensor | None,
        *tables: Tensor,
    ) -> Tensor:
        if batch.size == 0:
            ctx.lease = None
            ctx.shapes = (None if inputs is None else inputs.shape, [table.shape for table in tables])
            return tables[0].new_empty(*engine.roots.shape, 0)
        for_inputs = inputs is not None and inputs.requires_grad
        log_GHB, lease, again = evaluate(engine, batch, tables, keep, wanted, margin, for_inputs)
        if keep:
            ctx.lease, ctx.again, ctx.engine, ctx.batch = lease, again, engine, batch
            ctx.input_shape = None if inputs is None else inputs.shape
            ctx.save_for_backward(*tables)
        return log_GHB

    @staticmethod
    def backward(ctx: Any, grad_GHB: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # as it is for create_graph=True, and only then
            raise RuntimeError(
                "log_prob: gradients of gradients are not available (create_graph=True was asked for): the backward "
                "pass is in closed form, with nothing behind it to differentiate; compute log_prob inside "
                "`with circuit.reference():`, which is slower and has them"
            )
        _, _, _, _, _, for_inputs, *for_tables = ctx.needs_input_grad
        if ctx.lease is None:
            input_shape, shapes = ctx.shapes
            input_grad = grad_GHB.new_zeros(input_shape) if for_inputs else None
            grads = [grad_GHB.new_zeros(shape) if need else None for shape, need in zip(shapes, for_tables)]
            return (None, None, None, None, None, input_grad, *grads)
        engine, batch, tables, again = ctx.engine, ctx.batch, ctx.saved_tensors, ctx.again
        grads = [
            _gradient_buffer(engine, number, table) if need else None
            for number, (table, need) in enumerate(zip(tables, for_tables))
        ]
        note_bad_gradient(engine, grad_GHB)
        if again is not None:
            again_GHS, grad_GHB = again.split(grad_GHB)
        input_shape = ctx.input_shape if for_inputs else None
        input_grad = _backward(engine, batch, ctx.lease.space, tables, grads, grad_GHB, input_shape)
        if again is not None:
            more = [None if grad is None else torch.zeros_like(grad) for grad in grads]
            _backward(engine, again.batch, again.lease.space, tables, more, again_GHS, None)
            for grad, added in zip(grads, more):
                if grad is not None and added is not None:
                    grad.add_(added)
        return (None, None, None, None, None, input_grad, *grads)


@dataclass
class Again:
    """Pairs of a circuit and an example in a batch for the general pass: (circuit, column), once there and once here.

    Circuits with fewer pairs than others have some other example in the columns that they do not need.
    """

    batch: Batch
    lease: Lease[Workspace]
    circuit: Tensor  # (N,)
    column: Tensor  # (N,), in the whole batch
    place: Tensor  # (N,), in this one

    def split(self, grad_GHB: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of these pairs, (G, H, S), and that of the rest, with 0 for these, (G, H, B)."""
        again_GSH = grad_GHB.new_zeros(len(grad_GHB), self.batch.size, grad_GHB.shape[1])
        rest_GBH = grad_GHB.transpose(1, 2).clone()
        again_GSH[self.circuit, self.place] = rest_GBH[self.circuit, self.column]
        rest_GBH[self.circuit, self.column] = 0.0
        return again_GSH.transpose(1, 2), rest_GBH.transpose(1, 2)


def evaluate(
    engine: Engine,
    batch: Batch,
    tables: Sequence[Tensor],
    keep: bool,
    wanted: Tensor | None,
    margin: float | None = None,
    for_inputs: bool = False,
) -> tuple[Tensor, object, Again | None]:
    """log p of all heads (G, H, B), the lease whose workspace a backward pass needs, and what it needs besides.

    Gradients for x, which families over whole numbers have if x is floating point, come from the general pass.
    """
    is_whole = not any(values.is_floating_point() for values in batch.values)
    if engine.is_linear and is_whole and not for_inputs and not triton_kernels.applies(engine.device, engine.dtype):
        kind = FusedWorkspace if passes.applies(engine, tables) else LinearWorkspace
        linear: Lease[Any] = Lease(engine, kind, batch.size, keep)
        log_GHB, scale_GB = run_linear(engine, batch, tables, linear.space)
        threshold_GB = None
        if margin is not None:
            best_B = log_GHB.amax((0, 1)) * layers.BITS_PER_NAT
            threshold_GB = (best_B - margin * layers.BITS_PER_NAT - scale_GB).exp2()
        bad_GB = inexact(engine, batch, tables, linear.space, wanted, threshold_GB)
        if bad_GB is None:
            return log_GHB, linear, None
        if _can_widen(engine, tables) or 2 * int(bad_GB.sum(1).max()) < batch.size:
            return log_GHB, linear, _compute_again(engine, batch, tables, bad_GB, log_GHB, keep)
    lease = engine.lease(batch.size, keep)
    engine.run_forward(batch, tables, lease.space)
    return lease.space.values[engine.roots] / layers.BITS_PER_NAT, lease, None


def _can_widen(engine: Engine, tables: Sequence[Tensor]) -> bool:
    return engine.dtype == torch.float32 and passes.applies(engine, tables)


def _compute_again(
    engine: Engine, batch: Batch, tables: Sequence[Tensor], bad_GB: Tensor, log_GHB: Tensor, keep: bool
) -> Again:
    """Compute log p of the heads for some pairs of a circuit and an example once more, into `log_GHB`.

    In double precision, which holds numbers of any size that matters, for their circuits alone. What it does not hold,
    or all of them where nothing computes in double precision, takes the general pass, several times as long.
    """
    few, g, column, place = _take_pairs(engine, batch, bad_GB)
    if _can_widen(engine, tables):
        lease: Lease[Any] = Lease(engine, WideWorkspace, few.size, keep)
        log_GHS, _ = lease.space.forward(few, tables, bad_GB.sum(1))
        wanted_GHS = torch.zeros_like(log_GHS, dtype=torch.bool)
        wanted_GHS.transpose(1, 2)[g, place] = True
        bad_GS = inexact(engine, few, lease.space.wide, lease.space, wanted_GHS)
        if bad_GS is None or not keep:
            log_GHS = log_GHS.to(log_GHB.dtype)
            if bad_GS is not None:
                fewer, *pairs = _take_pairs(engine, few, bad_GS)
                _run_general(engine, fewer, tables, pairs, log_GHS, keep)
            log_GHB.transpose(1, 2)[g, column] = log_GHS.transpose(1, 2)[g, place]
            return Again(few, lease, g, column, place)
    return Again(few, _run_general(engine, few, tables, (g, column, place), log_GHB, keep), g, column, place)


def _take_pairs(engine: Engine, batch: Batch, bad_GB: Tensor) -> tuple[Batch, Tensor, Tensor, Tensor]:
    """A batch of these pairs; the circuit, the column here and the column there of each of them."""
    count_G = bad_GB.sum(1)
    size = min(few_sizes(int(count_G.max())), batch.size)
    index_GS = bad_GB.byte().argsort(dim=1, descending=True, stable=True)[:, :size]
    g, place = (torch.arange(size, device=bad_GB.device) < count_G[:, None]).nonzero(as_tuple=True)
    return batch.take([index_GS[leaf.circuits] for leaf in engine.leaf_layers()]), g, index_GS[g, place], place


def _run_general(
    engine: Engine, few: Batch, tables: Sequence[Tensor], pairs: Sequence[Tensor], log_GHB: Tensor, keep: bool
) -> Lease[Any]:
    """The general pass for some pairs: circuit, column in `log_GHB`, into which log p goes, and column in `few`."""
    g, column, place = pairs
    lease = engine.lease(few.size, keep)
    engine.run_forward(few, tables, lease.space)
    log_GSH = lease.space.values[engine.roots].transpose(1, 2)
    log_GHB.transpose(1, 2)[g, column] = log_GSH[g, place] / layers.BITS_PER_NAT
    return lease


def _backward(
    engine: Engine,
    batch: Batch,
    space: Any,
    tables: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    grad_GHB: Tensor,
    input_shape: torch.Size | None,
) -> Tensor | None:
    """Gradients for parameters, into `grads`, and that for x, if its shape is given."""
    if isinstance(space, FusedWorkspace):
        sums = [engine.statistics_of(layer.group, tables[layer.group]) for layer in engine.leaf_layers()]
        space.backward(batch, tables, grads, grad_GHB, sums)
        return None
    gradient = engine.gradient_space(batch.size)
    engine.head_rows(gradient.inner).copy_(grad_GHB)
    engine.run_backward(space, tables, gradient, grads)
    by_layer: list[tuple[InputLayer, Tensor]] = []
    kernels = triton_kernels.passes_for(engine.device, engine.dtype)
    for number, layer in enumerate(engine.leaf_layers()):
        observed = None if batch.observed is None else batch.observed[number]
        if input_shape is not None and (layer.group < 0 or layer.distribution.is_smooth):
            table = None if layer.group < 0 else tables[layer.group]
            by_layer.append((layer, _values_gradient(layer, gradient.inner, table, batch.values[number], observed)))
        found = None if layer.group < 0 else grads[layer.group]
        if found is not None:
            if kernels is not None and kernels.has_kernel(layer):
                kernels.backward_inputs(
                    layer, gradient.inner, tables[layer.group], batch.values[number], observed, found
                )
                continue
            statistics = engine.statistics_of(layer.group, tables[layer.group])
            layer.backward(gradient.inner, tables[layer.group], batch.values[number], observed, found, statistics)
    engine.return_gradient_space(gradient)
    return None if input_shape is None else _input_gradient(engine, by_layer, input_shape, grad_GHB)


def _gradient_buffer(engine: Engine, number: int, table: Tensor) -> Tensor:
    found = engine.gradient_pool.pop(number, None)
    if found is None or (found.shape, found.dtype, found.device) != (table.shape, table.dtype, table.device):
        found = torch.empty_like(table)
    return found.zero_() if number in engine.accumulated else found


def _values_gradient(
    layer: InputLayer, inner_grad: Tensor, table: Tensor | None, values: Tensor, observed_FB: Tensor | None
) -> Tensor:
    """Gradient for what the folds of a layer read: (F, B), or (F, B, K) for evidence, which has no table."""
    grad_FKB = layer.gradient_of(inner_grad, 0, layer.num_folds)
    if observed_FB is not None:
        grad_FKB = grad_FKB.masked_fill(~observed_FB[:, None, :], 0.0)
    if table is None:
        return grad_FKB.transpose(1, 2)
    params_FKS = layer.parameters_of(table.detach(), 0, layer.num_folds)
    with torch.enable_grad():
        x_FB = values.detach().requires_grad_()
        log_FKB = layer.distribution.log_prob(params_FKS, x_FB)
    (grad_FB,) = torch.autograd.grad(log_FKB, x_FB, grad_FKB)
    return grad_FB


def _input_gradient(
    engine: Engine, by_layer: Sequence[tuple[InputLayer, Tensor]], shape: torch.Size, like: Tensor
) -> Tensor:
    """Gradient for x, of this shape: several folds may look at one variable."""
    per_variable = shape[-1:] if engine.is_evidence else shape[:0]
    batch_axis = len(shape) - 2 - len(per_variable)
    is_shared = batch_axis == 0
    rows = engine.num_variables * (1 if is_shared else engine.num_circuits)
    out_VB = like.new_zeros(rows, shape[batch_axis], *per_variable)
    for layer, grad_FB in by_layer:
        out_VB.index_add_(0, layer.variables if is_shared else layer.columns, grad_FB.to(like.dtype))
    if is_shared:
        return out_VB.transpose(0, 1)
    return out_VB.view(engine.num_circuits, engine.num_variables, *out_VB.shape[1:]).transpose(1, 2)

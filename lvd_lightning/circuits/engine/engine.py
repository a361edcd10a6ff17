"""What runs compiled circuits: folded layers, buffers, and the passes over them. Tables of parameters are handed in.

Shapes: G circuits, B batch, D variables, H heads, F folded nodes, V and E the row spaces of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from lvd_lightning.circuits.engine import layers
from lvd_lightning.circuits.engine.bad_flows import BAD_FLOWS
from lvd_lightning.circuits.engine.batch import Batch
from lvd_lightning.circuits.engine.error_bound import ErrorBound
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.engine.kernels.cpu.passes import LayerIndex
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer
from lvd_lightning.circuits.engine.late_checks import LateCheck
from lvd_lightning.circuits.engine.layers import TINY, InputLayer, Layer
from lvd_lightning.circuits.engine.log_prob import Lease
from lvd_lightning.circuits.engine.open_graph import OpenGraph, open_graphs
from lvd_lightning.circuits.engine.parameters import root_rows
from lvd_lightning.circuits.engine.plan import Plan
from lvd_lightning.circuits.engine.sparse import SparseEdges
from lvd_lightning.circuits.engine.workspace import GradientSpace, Pool, Workspace
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = ["Engine"]


class Engine(nn.Module):
    """Layers, masks and buffers of one circuit, or of a batch of independent ones; it has no parameters of its own.

    Args:
        plan: what the graphs were compiled to.
        structures: the graphs, without parameters.
        dtype: of the tables that will be handed in, and of everything computed from them.
        batched: whether results have a dimension of circuits.
        keeps_statistics: whether backward passes add to the sums that EM needs for inputs that are no tables.
    """

    roots: Tensor
    circuit_of_node: Tensor

    def __init__(
        self,
        plan: Plan,
        structures: Sequence[CircuitGraph],
        dtype: torch.dtype,
        *,
        batched: bool,
        keeps_statistics: bool,
    ) -> None:
        super().__init__()
        self.plan, self.structures, self.dtype = plan, list(structures), dtype
        self.batched, self.keeps_statistics = batched, keeps_statistics
        self.num_circuits = len(self.structures)
        self.num_variables = self.structures[0].num_variables
        self.num_heads = max(structure.num_heads for structure in self.structures)
        self.input_layers = nn.ModuleList(InputLayer(found, self.num_variables) for found in plan.inputs)
        self.layers = nn.ModuleList(
            Layer(found, number, plan.groups[found.group].edges if found.group >= 0 else None)
            if found.grid is None
            else KroneckerLayer(found, number)
            for number, found in enumerate(plan.layers)
        )
        self._inner_layers = tuple(layer for layer in self.layers if isinstance(layer, Layer))
        self._leaf_layers = tuple(layer for layer in self.input_layers if isinstance(layer, InputLayer))
        self._mark_shared_rows()
        self.root_parameters = root_rows(plan, self.structures)
        self.register_buffer("roots", torch.from_numpy(plan.roots), persistent=False)
        for number in range(len(plan.groups)):
            self.set_mask(number, None)
        self.register_buffer("circuit_of_node", _circuit_of_nodes(plan), persistent=False)
        self.is_linear = all(found.distribution.is_linear for found in plan.inputs) and plan.is_slim_tree
        self.is_evidence = self._check_evidence()
        self.half_smooth = _half_smooth(plan)
        self.pool = Pool()
        self.checks = LateCheck(
            [f"x: {found.distribution} got values outside its support" for found in plan.inputs]
            + [f"head: got others, expected 0..{self.num_heads - 1}", BAD_FLOWS]
        )
        self.matmul_precision = "ieee"
        self.careful = False  # look for underflow layer by layer, since there was some
        self.gradient_pool: dict[int, Tensor] = {}
        self.statistics: dict[int, Tensor] = {}
        self.bad_example: str | None = None  # the first one whose gradient was NaN or infinite
        self.lacks_statistics = False  # gradients came from the reference pass, which adds nothing to `statistics`
        self._layer_index: list[LayerIndex] = []
        self._error_bound: ErrorBound | None = None

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        roots = self._buffers["roots"]  # `self.roots` is found only after all that it might be
        assert roots is not None
        return roots.device

    def set_mask(self, number: int, mask: Tensor | None) -> None:
        """Say which edges of a parameter group live, (rows, units, alternatives); None: all do."""
        self.register_buffer(f"mask{number}", mask, persistent=False)

    def forget(self) -> None:
        """Start anew with the sums for EM, and with what was noted beside them."""
        if self.lacks_statistics or self.bad_example is not None:  # to set what a module has takes its time
            self.lacks_statistics, self.bad_example = False, None
        for statistics in self.statistics.values():
            statistics.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Engine:
        """Behind `to`, `double` and their like."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)

    def inner_layers(self) -> tuple[Layer, ...]:
        """From the inputs to the heads."""
        return self._inner_layers

    def leaf_layers(self) -> tuple[InputLayer, ...]:
        """In the order of the plan."""
        return self._leaf_layers

    def statistics_of(self, number: int, table: Tensor) -> Tensor | None:
        """The sums for EM of a parameter group's inputs, (rows, units, T), made if need be; None where there are none.

        Always float64: differences of large sums are wanted.
        """
        distribution = self.plan.groups[number].distribution
        if distribution is None or not distribution.num_statistics or not self.keeps_statistics:
            return None
        found = self.statistics.get(number)
        if found is None or found.device != table.device:
            found = table.new_zeros(*table.shape[:2], distribution.num_statistics, dtype=torch.float64)
            self.statistics[number] = found
        return found

    def mask(self, group: int) -> Tensor | None:
        """Live edges of a parameter group, shape of `dense`; None if all are."""
        edges = self.edges(group)
        if edges is not None:
            return edges.dense(torch.ones_like(edges.column, dtype=torch.bool))
        found: Tensor | None = getattr(self, f"mask{group}")
        return found

    def edges(self, group: int) -> SparseEdges | None:
        """The layout of a parameter group if it has only the weights of live edges, which are (E) then."""
        if self.plan.groups[group].edges is None:
            return None
        return next(layer.edges for layer in self.inner_layers() if layer.group == group)

    def dense(self, group: int, values: Tensor) -> Tensor:
        """Numbers shaped like the parameters of a group as (rows, units, alternatives), whatever the layout."""
        edges = self.edges(group)
        return values if edges is None else edges.dense(values)

    def opened(self, tables: Sequence[Tensor]) -> list[OpenGraph]:
        """Every graph with these parameters, laid open for changes."""
        whole = [self.dense(number, table) for number, table in enumerate(tables)]
        return open_graphs(self.structures, self.plan.groups, whole, [self.mask(n) for n in range(len(tables))])

    def run_forward(self, batch: Batch, tables: Sequence[Tensor], space: Workspace) -> None:
        """Fill a workspace with the values of all rows."""
        kernels = triton_kernels.passes_for(self.device, self.dtype)
        if kernels is not None:
            kernels.forward(self, batch, tables, space)
            return
        space.underflow.clear()
        self.run_inputs(batch, tables, space.values)
        careful = self.careful or not space.keep
        self._run_layers(tables, space, careful)
        if not careful and space.sums.numel() and float(space.sums.amin()) < TINY[self.dtype]:
            self.careful = True  # this circuit's sums underflow: from now on, look at every layer as it is computed
            self._run_layers(tables, space, True)

    def run_inputs(self, batch: Batch, tables: Sequence[Tensor], values: Tensor) -> None:
        """Fill the input rows."""
        for number, layer in enumerate(self.leaf_layers()):
            observed = None if batch.observed is None else batch.observed[number]
            layer(values, tables[layer.group] if layer.group >= 0 else None, batch.values[number], observed)

    def run_backward(
        self, space: Workspace, tables: Sequence[Tensor], gradient: GradientSpace, grads: Sequence[Tensor | None]
    ) -> None:
        """From the gradient of the heads in `gradient` (see `head_rows`) to that of all inner units and weights."""
        kernels = triton_kernels.passes_for(self.device, self.dtype)
        if kernels is not None:
            kernels.backward(self, space, tables, gradient, grads)
            return
        for layer in reversed(self.inner_layers()):
            if layer.is_sum:
                layer.backward(space, gradient, tables[layer.group], grads[layer.group])
            else:
                layer.backward(space, gradient, None, None)

    def head_rows(self, inner: Tensor) -> Tensor:
        """The rows of an E matrix that belong to the heads, shape (G, H, B)."""
        return inner[1 : 1 + self.roots.numel()].view(*self.roots.shape, -1)

    @torch.no_grad()
    def top_down(self, tables: Sequence[Tensor], share_GH: Tensor) -> list[Tensor]:
        """TD(n), the top-down probability of every parameter row (rows, units), given that of every head."""
        space = self.gradient_space(1)
        self.head_rows(space.inner)[..., 0] = share_GH
        groups = zip(self.plan.groups, tables, strict=True)
        out = [table.new_zeros(len(group.owners), group.shape[0]) for group, table in groups]
        for layer in reversed(self.inner_layers()):
            if layer.is_sum:
                layer.pass_down(space, tables[layer.group], out[layer.group])
            else:
                layer.pass_down(space, None, None)
        for leaf in self.leaf_layers():
            if leaf.group >= 0:
                leaf.add_rows(out[leaf.group], leaf.gradient_of(space.inner, 0, leaf.num_folds)[..., 0], 0)
        self.return_gradient_space(space)
        return out

    def root_places(self) -> list[tuple[int, Tensor, Tensor]]:
        """`root_parameters` on the circuit's device."""
        if any(rows.device != self.device for _, _, rows in self.root_parameters):
            self.root_parameters = [
                (number, circuits.to(self.device), rows.to(self.device))
                for number, circuits, rows in self.root_parameters
            ]
        return self.root_parameters

    def error_bound(self) -> ErrorBound:
        """What decides whether linear values will do; made once."""
        if self._error_bound is None or self._error_bound.roots.device != self.device:
            self._error_bound = ErrorBound(self.plan, self.structures, self.device)
        return self._error_bound

    def layer_index(self) -> list[LayerIndex]:
        """What the compiled kernels need to know of every layer."""
        if not self._layer_index:
            self._layer_index = [LayerIndex.of(plan) for plan in self.plan.layers]
        return self._layer_index

    def lease(self, size: int, keep: bool) -> Lease[Workspace]:
        """A workspace for a forward pass over `size` examples; with `keep`, a backward pass can follow."""
        return Lease(self, Workspace, size, keep)

    def gradient_space(self, size: int) -> GradientSpace:
        """Buffers for a backward pass; give them back with `return_gradient_space`."""
        found = self.pool.take(self.pool_key("gradient", size))
        if isinstance(found, GradientSpace):
            return found
        return GradientSpace(self.inner_layers(), self.plan.num_edge_rows, size, self.like())

    def return_gradient_space(self, space: GradientSpace) -> None:
        """For the next backward pass."""
        self.pool.give(self.pool_key("gradient", space.inner.shape[1]), space)

    def pool_key(self, purpose: str, size: int) -> object:
        """Which workspaces may stand in for each other."""
        mode = torch.is_inference_mode_enabled()  # tensors made in it cannot be written outside
        return purpose, size, self.dtype, self.device, mode, layers.CACHE_SIZE

    def like(self) -> Tensor:
        """An empty tensor of the type and on the device of all values."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _run_layers(self, tables: Sequence[Tensor], space: Workspace, careful: bool) -> None:
        for layer in self.inner_layers():
            layer(space, tables[layer.group] if layer.is_sum else None, careful)

    def _check_evidence(self) -> bool:
        kinds = {plan.distribution.is_evidence for plan in self.plan.inputs}
        if kinds == {True, False}:
            raise ValueError("Circuit: soft evidence and ordinary inputs in one circuit are not supported")
        if True in kinds and len(self.plan.inputs) > 1:
            raise ValueError("Circuit: all soft evidence must have the same number of states")
        return True in kinds

    def _mark_shared_rows(self) -> None:
        uses = [torch.zeros(len(group.owners), dtype=torch.int64) for group in self.plan.groups]
        folded: list[InputLayer | Layer] = [*self.leaf_layers(), *self.inner_layers()]
        for layer in folded:
            if layer.group >= 0:
                uses[layer.group].index_add_(0, layer.parameter_rows, torch.ones(layer.num_folds, dtype=torch.int64))
        for layer in folded:
            if layer.group >= 0 and bool((uses[layer.group] > 1).any()):
                layer.accumulate = True
        self.accumulated = {layer.group for layer in folded if layer.accumulate}


def _half_smooth(plan: Plan) -> int | None:
    """The first variable that one circuit reads by inputs with a derivative and by others; None: there is none."""
    read: dict[bool, set[tuple[int, int]]] = {False: set(), True: set()}
    for found in plan.inputs:
        places = zip(found.circuits.tolist(), found.variables.tolist(), strict=True)
        read[found.distribution.is_smooth].update(places)
    both = read[False] & read[True]
    return min(variable for _, variable in both) if both else None


def _circuit_of_nodes(plan: Plan) -> Tensor:
    """The circuit of every folded inner node, layer by layer."""
    return torch.tensor([g for layer in plan.layers for g, _ in layer.nodes], dtype=torch.int64)

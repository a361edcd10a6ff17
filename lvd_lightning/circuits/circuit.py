"""Circuit: one graph, or a batch of independent graphs, compiled into folded layers.

Shapes: G circuits, B batch, D variables, H heads, F folded nodes, V and E the row spaces of `plan.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn

from lvd_lightning.circuits import queries
from lvd_lightning.circuits.checks import check_number, check_type
from lvd_lightning.circuits.distributions.base import may_ask
from lvd_lightning.circuits.engine import layers
from lvd_lightning.circuits.engine.bad_flows import BAD_FLOWS
from lvd_lightning.circuits.engine.batch import Batch, head_index, prepare, wanted_heads
from lvd_lightning.circuits.engine.changes import KnownTables
from lvd_lightning.circuits.engine.error_bound import ErrorBound
from lvd_lightning.circuits.engine.kernels import triton as fused_gpu
from lvd_lightning.circuits.engine.kernels.cpu.passes import LayerIndex
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer
from lvd_lightning.circuits.engine.late_checks import LateCheck
from lvd_lightning.circuits.engine.layers import TINY, InputLayer, Layer
from lvd_lightning.circuits.engine.log_prob import Lease, LogProb
from lvd_lightning.circuits.engine.open_graph import OpenGraph, open_graphs
from lvd_lightning.circuits.engine.parameters import (
    check_probabilities,
    check_type_of_numbers,
    check_types,
    from_logits,
    root_rows,
    stack,
    to_logits,
)
from lvd_lightning.circuits.engine.plan import Plan, compile_plan
from lvd_lightning.circuits.engine.reference import is_vmapped, log_values, take_inputs
from lvd_lightning.circuits.engine.sparse import LAYOUTS, Layout, SparseEdges
from lvd_lightning.circuits.engine.workspace import GradientSpace, Pool, Workspace
from lvd_lightning.circuits.graph import CircuitGraph, Node, with_sum_root

__all__ = ["Circuit"]

#: Circuits whose `log_prob` runs the reference pass here and now; copies of them are others.
_BY_REFERENCE: ContextVar[tuple[object, ...]] = ContextVar("by_reference", default=())


class Circuit(nn.Module):
    r"""A probabilistic circuit, or several independent ones that run as one.

    p(x) of every head is computed in one pass over the levels of the graph, whatever the number of nodes; the backward
    pass is exact, so flows are gradients: F_nc = theta_nc * d log p / d theta_nc (method of Peharz et al. 2020,
    arXiv 2004.06231, section 3). Parameters are stored normalised, in a few tensors of shape (nodes, units, ...).

    Args:
        graph: a CircuitGraph, or a sequence of them over equally many variables.
        parameterization: "probabilities" (for EM), or "logits" (for gradient optimizers).
        layout: of sum nodes that were pruned: "dense" keeps zeros for pruned edges; "sparse" stores and computes live
            edges alone; "auto" decides node by node by what takes less time on a CPU (`sparse.SPARSE_BELOW`). Heads,
            tied nodes and logits are always dense. On a GPU the sparse layout saves memory only.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Bernoulli()))
        >>> worlds = torch.cartesian_prod(*[torch.arange(2)] * 3)
        >>> print(f"{circuit.log_prob(worlds).exp().sum():.4f}")  # all that can happen
        1.0000
        >>> many = pc.Circuit([pc.hclt([-1, 0, 0], 4, pc.Bernoulli()) for _ in range(5)])  # run as one
        >>> many.log_prob(worlds).shape  # circuits, examples, heads
        torch.Size([5, 8, 1])
    """

    roots: Tensor
    circuit_of_node: Tensor

    def __init__(
        self,
        graph: CircuitGraph | Sequence[CircuitGraph],
        *,
        parameterization: Literal["probabilities", "logits"] = "probabilities",
        layout: Layout = "auto",
    ) -> None:
        super().__init__()
        self.batched = isinstance(graph, Iterable)
        graphs = list(graph) if isinstance(graph, Iterable) else [graph]
        for number, found in enumerate(graphs):
            check_type(f"Circuit: graph[{number}]" if self.batched else "Circuit: graph", found, CircuitGraph)
        if not graphs:
            raise ValueError("Circuit: got an empty list of graphs, expected at least one")
        if parameterization not in ("probabilities", "logits"):
            raise ValueError(f"parameterization: expected 'probabilities' or 'logits', got {parameterization!r}")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: expected one of {', '.join(LAYOUTS)}, got {layout!r}")
        if layout == "sparse" and parameterization == "logits":
            raise ValueError("layout: got 'sparse', but logits are stored densely; expected 'auto' or 'dense'")
        graphs = [with_sum_root(found) for found in graphs]
        for found in graphs:
            found.validate()
        check_types(graphs)
        sizes = {found.num_variables for found in graphs}
        if len(sizes) > 1:
            raise ValueError(f"Circuit: all graphs must have equally many variables, got {sorted(sizes)}")
        self.parameterization = parameterization
        self.num_circuits = len(graphs)
        self.num_variables = sizes.pop()
        self.num_heads = max(found.num_heads for found in graphs)
        self.structures = [found.structure() for found in graphs]
        self.plan = compile_plan(graphs, "dense" if parameterization == "logits" else layout)
        self.input_layers = nn.ModuleList(InputLayer(plan, self.num_variables) for plan in self.plan.inputs)
        groups = self.plan.groups
        self.layers = nn.ModuleList(
            Layer(plan, number, groups[plan.group].edges if plan.group >= 0 else None)
            if plan.grid is None
            else KroneckerLayer(plan, number)
            for number, plan in enumerate(self.plan.layers)
        )
        self._mark_shared_rows()
        self.root_parameters = root_rows(self.plan, graphs)
        self.register_buffer("roots", torch.from_numpy(self.plan.roots), persistent=False)
        self.tables = nn.ParameterList()
        for number, group in enumerate(self.plan.groups):
            table, mask = stack(graphs, group)
            edges = self.edges(number)
            if edges is not None:
                table, mask = edges.take(table), None
            self.register_buffer(f"mask{number}", mask, persistent=False)
            learnt = group.distribution is None or not group.distribution.is_fixed
            stored = to_logits(table, group) if parameterization == "logits" else table
            self.tables.append(nn.Parameter(stored, requires_grad=learnt))
        self.register_buffer("circuit_of_node", _circuit_of_nodes(self.plan), persistent=False)
        self.is_linear = all(plan.distribution.is_table for plan in self.plan.inputs) and self.plan.is_slim_tree
        self.pool = Pool()
        self.checks = LateCheck(
            [f"x: {plan.distribution} got values outside its support" for plan in self.plan.inputs]
            + [f"head: expected 0..{self.num_heads - 1}, got others", BAD_FLOWS]
        )
        self._matmul_precision = "ieee"
        self._careful = False
        self._layer_index: list[LayerIndex] = []
        self._error_bound: ErrorBound | None = None
        self.gradient_pool: dict[int, Tensor] = {}
        self.statistics: dict[int, Tensor] = {}
        self.bad_example: str | None = None  # the first one whose gradient was NaN or infinite
        self.lacks_statistics = False  # gradients came from the reference pass, which adds nothing to `statistics`
        self._is_evidence = self._check_evidence()
        self._known_tables = KnownTables(self.tables)

    def extra_repr(self) -> str:
        return (
            f"circuits={self.num_circuits}, variables={self.num_variables}, heads={self.num_heads}, "
            f"levels={self.plan.num_levels}, parameters={self.num_parameters}"
        )

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters and of everything computed from them."""
        return self.tables[0].dtype if len(self.tables) else torch.get_default_dtype()

    @property
    def device(self) -> torch.device:
        """Device of the circuit."""
        return self.roots.device

    @property
    def matmul_precision(self) -> str:
        """Precision of the matrix products of sum layers in the fused kernels for a GPU; their sums are float32.

        "ieee" (float32), "tf32x3" (three products of TF32 numbers, nearly as exact), "tf32" (10 bits of mantissa),
        "bf16" (7 bits). What the products are summed to, logarithms, gradients and EM stay in single precision. Where
        PyTorch does the work this setting does nothing; there it is `torch.set_float32_matmul_precision` that counts.

        Raises:
            ValueError: set to something else.
        """
        return self._matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, precision: str) -> None:
        if precision not in fused_gpu.PRECISIONS:
            raise ValueError(f"matmul_precision: expected one of {', '.join(fused_gpu.PRECISIONS)}, got {precision!r}")
        self._matmul_precision = precision

    @property
    def num_parameters(self) -> int:
        """Free parameters of live edges and input units, over all circuits; tied ones count once."""
        total = 0
        for _number, group in enumerate(self.plan.groups):
            for _row, (g, index) in enumerate(group.owners):
                node = self.structures[g].nodes[index]
                if node.distribution is not None:
                    total += node.num_units * node.distribution.num_free
                elif node.mask is None:
                    total += node.num_units * (self._inner_size(g, node) - 1)
                else:
                    total += int(node.mask.sum()) - node.num_units
        return total

    def log_prob(
        self,
        x: Tensor,
        head: int | Tensor | None = None,
        observed: Tensor | None = None,
        wanted: Tensor | None = None,
        margin: float | None = None,
    ) -> Tensor:
        """Log-likelihood in nats.

        Args:
            x: (B, D); for a batch of circuits (G, B, D), or (B, D) given to all of them. Evidence has one more
                dimension, the states. Of any integer type, or a floating point one (needed as soon as one variable is
                continuous); see `Distribution`.
            head: None for all heads; an int, or a tensor (B,) ((G, B) for a batch of circuits), for one per example.
            observed: bool, the shape of x without states; False marginalises the variable, and its value may be
                anything, NaN included.
            wanted: bool, the shape of the result. Where it is False the result is 0 and passes no gradient on, which
                saves the effort that an unlikely example can take.
            margin: in nats. Results that are certainly as far below the example's best, over all heads of all circuits,
                may come out lower than they are (never higher), which saves effort likewise. Not for gradients.

        Returns:
            (B, H) or, with `head`, (B,); for a batch of circuits (G, B, H) or (G, B). Heads that a circuit of the
            batch lacks are -inf.

        Raises:
            ValueError: a value outside the support of its variable, a wrong shape, or NaN in an observed variable. On a
                GPU values and heads are checked behind the computation, and a later call raises; see `check_inputs`.

        Example:
            >>> import torch
            >>> import lvd_lightning.circuits as pc
            >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Bernoulli(), num_heads=2))
            >>> x = torch.tensor([[0, 1, 1], [1, 0, 1]])
            >>> circuit.log_prob(x).shape  # both heads
            torch.Size([2, 2])
            >>> circuit.log_prob(x, head=torch.tensor([0, 1])).shape  # one for every example
            torch.Size([2])
            >>> nothing = torch.zeros(2, 3, dtype=torch.bool)
            >>> torch.allclose(circuit.log_prob(x, observed=nothing), torch.zeros(2, 2), atol=1e-6)  # all summed out
            True
        """
        by_reference = any(found is self for found in _BY_REFERENCE.get())
        given = [found for found in (x, observed, head) if by_reference and isinstance(found, Tensor)]
        checked = not any(is_vmapped(found) for found in given)
        batch = prepare(self, x, observed, late=True, checked=checked)
        tables = self.probabilities()
        parts = [*tables, x] if self._is_evidence else tables
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parts)
        evidence = x if self._is_evidence else None
        head_GB = None if head is None else head_index(self, head, batch.size, late=True, checked=checked)
        shape = (self.num_circuits, batch.size) if head is not None else (self.num_circuits, batch.size, self.num_heads)
        if margin is not None:
            check_number("margin", margin, 0, above_low=True, meaning=", in nats")
            if keep:
                raise ValueError("margin: is for values without gradients; call log_prob under torch.no_grad()")
        selected = wanted_heads(self, wanted, head_GB, shape)
        if by_reference:
            log_GHB = self._reference_pass(x, observed, tables)
        else:
            log_GHB = self._fused_pass(batch, keep, selected, margin, evidence, *tables)
            if log_GHB.requires_grad and may_ask(log_GHB):
                log_GHB.register_hook(self._note_gradient)
        found = log_GHB.transpose(1, 2) if head_GB is None else log_GHB.gather(1, head_GB[:, None])[:, 0]
        if wanted is not None:
            found = found.masked_fill(~wanted.view(shape), 0.0)
        return found if self.batched else found[0]

    def forward(self, x: Tensor, head: int | Tensor | None = None, observed: Tensor | None = None) -> Tensor:
        """Same as `log_prob`."""
        return self.log_prob(x, head, observed)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside it `log_prob` of this circuit runs in plain PyTorch operations, which autograd can see through.

        So there are second derivatives, gradients for continuous x, and the transforms of `torch.func`; under
        `torch.vmap` nothing checks x and heads. Values and first gradients are those of the fused pass, which takes a
        fraction of the time and memory. Other queries stay as they are. EM on Gaussians, binomials and logistics needs
        more than gradients and refuses those that were made in here.

        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.hclt([-1, 0], 2, pc.Gaussian(), generator=torch.Generator().manual_seed(0))
        >>> circuit = pc.Circuit(graph)
        >>> with circuit.reference():
        ...     curvature = torch.func.hessian(lambda x: circuit.log_prob(x[None])[0, 0])(torch.zeros(2))
        >>> curvature.shape
        torch.Size([2, 2])
        """
        token = _BY_REFERENCE.set((*_BY_REFERENCE.get(), self))
        try:
            yield
        finally:
            _BY_REFERENCE.reset(token)

    def check_inputs(self) -> None:
        """Wait for the device, and raise if `log_prob` was given values or heads that do not exist.

        For the end of a data set: until here nobody may have asked about the last batches on a GPU. On the CPU
        `log_prob` raises at once and there is nothing left to ask.

        Raises:
            ValueError: a value outside the support of its variable, or a head that is not there, in an earlier call.
        """
        self.checks.ask(wait=True)

    def sample(
        self,
        n: int | None = None,
        *,
        head: int | Tensor = 0,
        x: Tensor | None = None,
        observed: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Exact samples: `n` of them, or one per row of `x` given its `observed` variables.

        Args:
            n: how many samples, 0 or more, where there is no `x`.
            head: an int, or a tensor (n,) or (B,), for a batch of circuits led by G: the head each is drawn from.
            x: (B, D), the rows to complete; for a batch of circuits (G, B, D), or (B, D) given to all of them. Evidence
                has one more dimension, the states.
            observed: bool, the shape of x without states; False: the value is drawn, and what x holds there may be
                anything. Needed with x, except for evidence, of which all may be given.
            generator: on the circuit's device; the default one if not given.

        Returns:
            (n, D) or (B, D), for a batch of circuits (G, n, D) or (G, B, D): int64 if all variables are whole numbers,
            else floating point. Observed variables keep their values. Of evidence, the states.

        Raises:
            ValueError: both or none of n and x, a wrong shape or type, a value outside the support of its variable, a
                row whose evidence is impossible under its head, a head that is not there, or a generator of another
                device.

        Example:
            >>> import torch
            >>> import lvd_lightning.circuits as pc
            >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8)))
            >>> circuit.sample(5, generator=torch.Generator().manual_seed(0)).shape
            torch.Size([5, 3])
            >>> x, observed = torch.tensor([[7, 0, 2]]), torch.tensor([[True, False, True]])
            >>> circuit.sample(x=x, observed=observed)[0, ::2]  # the second variable is drawn, given the others
            tensor([7, 2])
        """
        return queries.sample(self, n, head=head, x=x, observed=observed, generator=generator)

    def mpe(self, x: Tensor, observed: Tensor | None = None, head: int | Tensor = 0) -> tuple[Tensor, Tensor]:
        """Max-product decoding: the joint maximum over unobserved variables and all latents.

        Args:
            x: (B, D); for a batch of circuits (G, B, D), or (B, D) given to all of them. Evidence has one more
                dimension, the states.
            observed: bool, the shape of x without states; False: the value is looked for, and what x holds there may be
                anything. None: all of x is given, and only latents are decided.
            head: an int, or a tensor (B,), (G, B) for a batch of circuits: the head of each row.

        Returns:
            The assignment (B, D), whose observed variables keep their values, and its log-value (B,) in nats, that of
            variables and latents together; both led by G for a batch of circuits. Of evidence, the states.

        Raises:
            ValueError: a wrong shape or type, a value outside the support of its variable, a row whose evidence is
                impossible under its head, or a head that is not there.

        Example:
            >>> import torch
            >>> import lvd_lightning.circuits as pc
            >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8)))
            >>> x, observed = torch.tensor([[7, 0, 2]]), torch.tensor([[True, False, True]])
            >>> best, value = circuit.mpe(x, observed=observed)
            >>> best[0, ::2], value.shape
            (tensor([7, 2]), torch.Size([1]))
        """
        return queries.mpe(self, x, observed=observed, head=head)

    def posterior(self, x: Tensor, node: int, observed: Tensor | None = None, head: int | Tensor = 0) -> Tensor:
        """p(latent of `node` = k, node reached | x): how likely it is that the circuit passes through unit k of a node.

        Args:
            x: (B, D); for a batch of circuits (G, B, D), or (B, D) given to all of them. Evidence has one more
                dimension, the states.
            node: a name in `CircuitGraph.latents`: in an HCLT the variable's index, in an HMM the position. If the
                graph names no latents, the id of a product node in `to_graph()`.
            observed: bool, the shape of x without states; False marginalises the variable.
            head: an int, or a tensor (B,), (G, B) for a batch of circuits: the head of each row.

        Returns:
            (B, K), or (G, B, K) for a batch of circuits, K being the units of the node, or the most that one has; what
            a smaller one lacks is 0. Rows sum to the probability of reaching the node, which is 1 in trees.

        Raises:
            ValueError: a node that names no latent, a wrong shape or type, a value outside the support of its variable,
                a row whose evidence is impossible under its head, or a head that is not there.

        Example:
            >>> import torch
            >>> import lvd_lightning.circuits as pc
            >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8)))
            >>> states = circuit.posterior(torch.tensor([[7, 0, 2]]), 1)  # of the second latent
            >>> states.shape, f"{states.sum():.4f}"
            (torch.Size([1, 4]), '1.0000')
        """
        return queries.posterior(self, x, node, observed=observed, head=head)

    def to_graph(self) -> CircuitGraph | list[CircuitGraph]:
        """The graph, or list of graphs, with current parameters (copies).

        Example:
            >>> import lvd_lightning.circuits as pc
            >>> circuit = pc.Circuit(pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8)))
            >>> [node.kind for node in circuit.to_graph().nodes].count("input")
            3
        """
        graphs = [structure.structure() for structure in self.structures]
        for number, (group, stored) in enumerate(zip(self.plan.groups, self.probabilities(), strict=True)):
            table = self.dense(number, stored.detach())
            for row, (g, index) in enumerate(group.owners):
                node = graphs[g].nodes[index]
                inner = self._inner_size(g, node) if node.kind == "sum" else group.shape[1]
                value = table[row, : node.num_units, :inner].clone()
                if node.kind == "sum":
                    node.weight = value
                else:
                    node.params = value
        for graph in graphs:
            for node in graph.nodes:
                if node.tied_to is not None:
                    owner = graph.nodes[node.tied_to]
                    node.weight, node.params = owner.weight, owner.params
        return graphs if self.batched else graphs[0]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget gradients and, with them, the flow statistics of inputs whose gradients do not hold them."""
        super().zero_grad(set_to_none)
        self.lacks_statistics, self.bad_example = False, None
        for statistics in self.statistics.values():
            statistics.zero_()

    def _fused_pass(self, *arguments: object) -> Tensor:
        """log p of all heads, (G, H, B)."""
        try:
            return LogProb.apply(self, *arguments)
        except RuntimeError as error:
            if "setup_context" not in str(error):  # a static method that PyTorch misses in our autograd function
                raise
            raise RuntimeError(
                "log_prob: its fast passes do not work under torch.func; call it inside `with circuit.reference():`"
            ) from error

    def _reference_pass(self, x: Tensor, observed: Tensor | None, tables: Sequence[Tensor]) -> Tensor:
        """log p of all heads, (G, H, B)."""
        is_shared = (x.ndim == 3) == self._is_evidence
        masks = None if observed is None else take_inputs(self.plan, observed, is_shared)
        found = log_values(self.plan, tables, take_inputs(self.plan, x, is_shared), masks)
        for layer, log_FKB in zip(self.plan.inputs, found.inputs, strict=True):
            if layer.distribution.num_statistics and log_FKB.requires_grad:
                log_FKB.register_hook(self._lack_statistics)
        return found.heads

    def _note_gradient(self, grad_GHB: Tensor | None) -> None:
        """Remember the first example whose gradient is NaN or infinite: in the sums over examples it is lost."""
        if grad_GHB is not None and not math.isfinite(grad_GHB.sum()) and self.bad_example is None:
            found = (~grad_GHB.isfinite()).nonzero().tolist()
            if found:
                g, h, b = found[0]
                self.bad_example = f"example {b} under head {h}" + (f" of circuit {g}" if self.batched else "")

    def _lack_statistics(self, _: Tensor) -> None:
        self.lacks_statistics = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Circuit:
        """Behind `to`, `half` and their like."""
        check_type_of_numbers(fn(torch.empty(0, dtype=self.dtype)).dtype)
        return super()._apply(fn, recurse)

    # What follows is for the engine's own modules.

    def trust_tables(self) -> None:
        """Take the parameters as they are for good ones: an EM step made them."""
        self._known_tables.trust()

    @torch.no_grad()
    def check_tables(self) -> None:
        """Raise a ValueError if parameters were changed, since last time, to what are none.

        Costs next to nothing where nothing was changed, or by an EM step.
        """
        if self.parameterization == "probabilities":
            tables = self.tables._parameters.values()  # a list of parameters takes its time to be walked
            for number in self._known_tables.changed(table for table in tables if table is not None):
                check_probabilities(self.dense(number, self.tables[number]), self.plan.groups[number])
                self._known_tables.learn(number, self.tables[number])

    def probabilities(self) -> list[Tensor]:
        """The normalised parameters of all groups: the stored tensors, or a function of the logits; see `dense`."""
        if self.parameterization == "probabilities":
            return list(self.tables)
        return [
            from_logits(logits, group, self.mask(number))
            for number, (logits, group) in enumerate(zip(self.tables, self.plan.groups, strict=True))
        ]

    def statistics_of(self, group: int) -> Tensor | None:
        """The sums for EM of a parameter group's inputs, (rows, units, T), made if need be; None where there are none.

        Always float64: differences of large sums are wanted.
        """
        distribution, table = self.plan.groups[group].distribution, self.tables[group]
        if distribution is None or not distribution.num_statistics or self.parameterization == "logits":
            return None
        found = self.statistics.get(group)
        if found is None or found.device != table.device:
            found = table.new_zeros(*table.shape[:2], distribution.num_statistics, dtype=torch.float64)
            self.statistics[group] = found
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
        return next(layer.edges for layer in self._inner_layers() if layer.group == group)

    def dense(self, group: int, values: Tensor) -> Tensor:
        """Numbers shaped like the parameters of a group as (rows, units, alternatives), whatever the layout."""
        edges = self.edges(group)
        return values if edges is None else edges.dense(values)

    def opened(self) -> list[OpenGraph]:
        """Every graph with its current parameters, laid open for changes."""
        numbers = range(len(self.plan.groups))
        tables = [self.dense(number, table) for number, table in enumerate(self.probabilities())]
        return open_graphs(self.structures, self.plan.groups, tables, [self.mask(number) for number in numbers])

    def run_forward(self, batch: Batch, tables: Sequence[Tensor], space: Workspace) -> None:
        """Fill a workspace with the values of all rows."""
        kernels = fused_gpu.passes_for(self.device, self.dtype)
        if kernels is not None:
            kernels.forward(self, batch, tables, space)
            return
        space.underflow.clear()
        self.run_inputs(batch, tables, space.values)
        careful = self._careful or not space.keep
        self._run_layers(tables, space, careful)
        if not careful and space.sums.numel() and float(space.sums.amin()) < TINY[self.dtype]:
            self._careful = True  # this circuit's sums underflow: from now on, look at every layer as it is computed
            self._run_layers(tables, space, True)

    def error_bound(self) -> ErrorBound:
        """What decides whether linear values will do; made once."""
        if self._error_bound is None or self._error_bound.roots.device != self.device:
            self._error_bound = ErrorBound(self.plan, self.structures, self.device)
        return self._error_bound

    def _run_layers(self, tables: Sequence[Tensor], space: Workspace, careful: bool) -> None:
        for layer in self._inner_layers():
            layer(space, tables[layer.group] if layer.is_sum else None, careful)

    def run_inputs(self, batch: Batch, tables: Sequence[Tensor], values: Tensor) -> None:
        """Fill the input rows."""
        for number, layer in enumerate(self._leaf_layers()):
            observed = None if batch.observed is None else batch.observed[number]
            layer(values, tables[layer.group] if layer.group >= 0 else None, batch.values[number], observed)

    def run_backward(
        self, space: Workspace, tables: Sequence[Tensor], gradient: GradientSpace, grads: Sequence[Tensor | None]
    ) -> None:
        """From the gradient of the heads in `gradient` (see `head_rows`) to that of all inner units and weights."""
        kernels = fused_gpu.passes_for(self.device, self.dtype)
        if kernels is not None:
            kernels.backward(self, space, tables, gradient, grads)
            return
        for layer in reversed(self._inner_layers()):
            if layer.is_sum:
                layer.backward(space, gradient, tables[layer.group], grads[layer.group])
            else:
                layer.backward(space, gradient, None, None)

    def head_rows(self, inner: Tensor) -> Tensor:
        """The rows of an E matrix that belong to the heads, shape (G, H, B)."""
        return inner[1 : 1 + self.roots.numel()].view(*self.roots.shape, -1)

    @torch.no_grad()
    def top_down(self, share_GH: Tensor) -> list[Tensor]:
        """TD(n), the top-down probability of every parameter row (rows, units), given that of every head."""
        tables = self.probabilities()
        space = self.gradient_space(1)
        self.head_rows(space.inner)[..., 0] = share_GH
        groups = zip(self.plan.groups, tables, strict=True)
        out = [table.new_zeros(len(group.owners), group.shape[0]) for group, table in groups]
        for layer in reversed(self._inner_layers()):
            if layer.is_sum:
                layer.pass_down(space, tables[layer.group], out[layer.group])
            else:
                layer.pass_down(space, None, None)
        for leaf in self._leaf_layers():
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

    def lease(self, size: int, keep: bool) -> Lease[Workspace]:
        """A workspace for a forward pass over `size` examples; with `keep`, a backward pass can follow."""
        return Lease(self, Workspace, size, keep)

    def gradient_space(self, size: int) -> GradientSpace:
        """Buffers for a backward pass; give them back with `return_gradient_space`."""
        found = self.pool.take(self._pool_key("gradient", size))
        if isinstance(found, GradientSpace):
            return found
        return GradientSpace(self._inner_layers(), self.plan.num_edge_rows, size, self._like())

    def return_gradient_space(self, space: GradientSpace) -> None:
        """For the next backward pass."""
        self.pool.give(self._pool_key("gradient", space.inner.shape[1]), space)

    def layer_index(self) -> list[LayerIndex]:
        """What the compiled kernels need to know of every layer."""
        if not self._layer_index:
            self._layer_index = [LayerIndex.of(plan) for plan in self.plan.layers]
        return self._layer_index

    def _inner_layers(self) -> list[Layer]:
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def _leaf_layers(self) -> list[InputLayer]:
        return [layer for layer in self.input_layers if isinstance(layer, InputLayer)]

    def _pool_key(self, purpose: str, size: int) -> object:
        mode = torch.is_inference_mode_enabled()  # tensors made in it cannot be written outside
        return purpose, size, self.dtype, self.device, mode, layers.CACHE_SIZE

    def _like(self) -> Tensor:
        return torch.empty(0, dtype=self.dtype, device=self.device)

    def _inner_size(self, g: int, node: Node) -> int:
        nodes = self.structures[g].nodes
        return sum(nodes[child].num_units for child in node.children)

    def _check_evidence(self) -> bool:
        kinds = {plan.distribution.is_evidence for plan in self.plan.inputs}
        if kinds == {True, False}:
            raise ValueError("Circuit: soft evidence and ordinary inputs in one circuit are not supported")
        if True in kinds and len(self.plan.inputs) > 1:
            raise ValueError("Circuit: all soft evidence must have the same number of states")
        return True in kinds

    def _mark_shared_rows(self) -> None:
        uses = [torch.zeros(len(group.owners), dtype=torch.int64) for group in self.plan.groups]
        folded: list[InputLayer | Layer] = [*self._leaf_layers(), *self._inner_layers()]
        for layer in folded:
            if layer.group >= 0:
                uses[layer.group].index_add_(0, layer.parameter_rows, torch.ones(layer.num_folds, dtype=torch.int64))
        for layer in folded:
            if layer.group >= 0 and bool((uses[layer.group] > 1).any()):
                layer.accumulate = True
        self._zeroed = {layer.group for layer in folded if layer.accumulate}


def _circuit_of_nodes(plan: Plan) -> Tensor:
    """The circuit of every folded inner node, layer by layer."""
    return torch.tensor([g for layer in plan.layers for g, _ in layer.nodes], dtype=torch.int64)

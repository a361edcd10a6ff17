"""Circuit: one graph, or a batch of independent graphs, compiled into folded layers.

Shapes: G circuits, B batch, D variables, H heads, F folded nodes, V and E the row spaces of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor, nn

from lvd_lightning.circuits import queries
from lvd_lightning.circuits.checks import check_number, check_type, plain_integers
from lvd_lightning.circuits.engine.batch import Batch, head_index, prepare, wanted_heads
from lvd_lightning.circuits.engine.changes import KnownTables
from lvd_lightning.circuits.engine.engine import Engine
from lvd_lightning.circuits.engine.kernels import triton as triton_kernels
from lvd_lightning.circuits.engine.log_prob import LogProb
from lvd_lightning.circuits.engine.parameters import (
    check_probabilities,
    check_type_of_numbers,
    common_type,
    from_logits,
    stack,
    to_logits,
)
from lvd_lightning.circuits.engine.plan import Plan, compile_plan
from lvd_lightning.circuits.engine.reference import is_vmapped, log_values, take_inputs
from lvd_lightning.circuits.engine.sparse import LAYOUTS, Layout
from lvd_lightning.circuits.graph import CircuitGraph, Node, with_sum_root
from lvd_lightning.circuits.opaque import opaque
from lvd_lightning.circuits.rsample import rsample

__all__ = ["Circuit"]

#: Numbers that the values of one pass may take, by kind of device: what bounds the memory of evaluation.
MAX_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 30}
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
            raise ValueError(f"parameterization: got {parameterization!r}, expected 'probabilities' or 'logits'")
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, expected one of {', '.join(LAYOUTS)}")
        if layout == "sparse" and parameterization == "logits":
            raise ValueError("layout: got 'sparse', but logits are stored densely; expected 'auto' or 'dense'")
        graphs = [with_sum_root(found) for found in graphs]
        for found in graphs:
            found.validate()
        dtype = common_type(graphs)
        sizes = {found.num_variables for found in graphs}
        if len(sizes) > 1:
            raise ValueError(f"Circuit: all graphs must have equally many variables, got {sorted(sizes)}")
        self.parameterization = parameterization
        self.num_circuits = len(graphs)
        self.num_variables = sizes.pop()
        self.num_heads = max(found.num_heads for found in graphs)
        self.structures = [found.structure() for found in graphs]
        plan = compile_plan(graphs, "dense" if parameterization == "logits" else layout)
        keeps_statistics = parameterization == "probabilities"
        self.engine = Engine(plan, self.structures, dtype, batched=self.batched, keeps_statistics=keeps_statistics)
        self.tables = nn.ParameterList()
        for number, group in enumerate(plan.groups):
            table, mask = stack(graphs, group)
            edges = self.engine.edges(number)
            if edges is None:
                self.engine.set_mask(number, mask)
            else:
                table = edges.take(table)
            learnt = group.distribution is None or not group.distribution.is_fixed
            stored = to_logits(table, group) if parameterization == "logits" else table
            self.tables.append(nn.Parameter(stored, requires_grad=learnt))
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
        return self.engine.device

    @property
    def plan(self) -> Plan:
        """How the graphs are folded."""
        return self.engine.plan

    @property
    def batch_limit(self) -> int:
        """How many examples every circuit may be given in one pass so that memory stays bounded; at least 1.

        A pass without gradients keeps so many values at once and no more. What takes a backward pass, or draws, needs
        several times the memory: give it a fraction of this.
        """
        limit = MAX_NUMBERS["cpu" if self.device.type == "cpu" else "cuda"]
        return max(1, limit // self.plan.num_value_rows)

    @property
    def matmul_precision(self) -> str:
        """Precision of the matrix products of sum layers in the fused kernels for a GPU; their sums are float32.

        "ieee" (float32), "tf32x3" (three products of TF32 numbers, nearly as exact), "tf32" (10 bits of mantissa),
        "bf16" (7 bits). What the products are summed to, logarithms, gradients and EM stay in single precision. Where
        PyTorch does the work this setting does nothing; there it is `torch.set_float32_matmul_precision` that counts.

        Raises:
            ValueError: set to something else.
        """
        return self.engine.matmul_precision

    @matmul_precision.setter
    def matmul_precision(self, precision: str) -> None:
        if precision not in triton_kernels.PRECISIONS:
            raise ValueError(
                f"matmul_precision: got {precision!r}, expected one of {', '.join(triton_kernels.PRECISIONS)}"
            )
        self.engine.matmul_precision = precision

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

    @opaque
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
                continuous); see `Distribution`. Gradients flow into evidence and, where x requires them, into values of
                Gaussians and of families rounded from continuous ones. An x of both kinds of variables requires them
                as one tensor, so that those of its discrete variables, in which log p has no derivative, are 0.
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
            ValueError: a value outside the support of its variable, a wrong shape, NaN in an observed variable, or an x
                that requires a gradient though all variables are discrete, or one of them is to some inputs alone. On a
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
        x, head = plain_integers(x), plain_integers(head)
        engine, inside = self.engine, _BY_REFERENCE.get()
        by_reference = bool(inside) and any(found is self for found in inside)
        given = [found for found in (x, observed, head) if isinstance(found, Tensor)] if by_reference else []
        checked = not any(is_vmapped(found) for found in given)
        batch = self.prepare(x, observed, late=True, checked=checked)
        tables = self.probabilities()
        inputs = self._inputs_with_gradient(x)
        parts = tables if inputs is None else [*tables, inputs]
        keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in parts)
        head_GB = None if head is None else head_index(engine, head, batch.size, late=True, checked=checked)
        shape = (self.num_circuits, batch.size) if head is not None else (self.num_circuits, batch.size, self.num_heads)
        if margin is not None:
            check_number("margin", margin, 0, above_low=True, meaning=", in nats")
            if keep:
                raise ValueError("margin: is for values without gradients; call log_prob under torch.no_grad()")
        selected = wanted_heads(engine, wanted, head_GB, shape)
        if by_reference:
            log_GHB = self._reference_pass(x, observed, tables)
        else:
            log_GHB = self._fused_pass(engine, batch, keep, selected, margin, inputs, *tables)
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

        So there are second derivatives and the transforms of `torch.func`; under
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
        self.engine.checks.ask(wait=True)

    @opaque
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

    @opaque
    def rsample(
        self,
        n: int | None = None,
        *,
        head: int | Tensor = 0,
        x: Tensor | None = None,
        observed: Tensor | None = None,
        estimator: Literal["gumbel", "straight_through", "simple"] = "simple",
        temperature: float = 1.0,
        hard: bool = False,
        onehot: bool = False,
        redraw: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Samples through which gradients flow into parameters and into what is known.

        Continuous variables have the gradient of mean + deviation * noise. Choices (of sums, and of the values of
        discrete variables) have none, and the estimators differ in what they take for it:

        - "simple": exact samples; gradients are those of the choices' probabilities. Without bias where what is made of
          a sample is linear in it.
        - "straight_through": exact samples; gradients are those of a Gumbel-softmax in place of each choice.
        - "gumbel": choices are Gumbel-softmaxes, so a sum mixes samples of all its children. Nearly a sample at a low
          temperature. With `hard` the exact sample of the same noise, with the soft one's gradient.

        DiscretizedGaussian and DiscretizedLogistic variables are rounded in every sample; the rounding passes the
        gradient on, but under "simple" and with `onehot`, where they are as any discrete variable.

        It runs in plain PyTorch operations and can be differentiated twice. It keeps the values of all units, as the
        reference pass does; the soft shares of edges are computed again in backward, some nodes at a time.

        Args:
            n: how many samples, 0 or more, where there is no `x`.
            head: an int, or a tensor (n,) or (B,), for a batch of circuits led by G: the head each is drawn from.
            x: (B, D), the rows to complete; for a batch of circuits (G, B, D), or (B, D) given to all of them. Evidence
                has one more dimension, the states. Gradients flow into evidence and into values of Gaussians.
            observed: bool, the shape of x without states; False: the value is drawn. Needed with x, except for
                evidence, of which all may be given.
            estimator: see above.
            temperature: above 0, of "gumbel" and "straight_through"; "simple" has none. The lower, the smaller the bias
                and the larger the variance.
            hard: of "gumbel"; the others are hard whatever it is.
            onehot: samples as vectors over the values; all variables must be discrete.
            redraw: with x: what is observed decides the latents, and then all variables are drawn from those: x goes
                through the circuit as through an autoencoder.
            generator: on the circuit's device; the default one if not given.

        Returns:
            (n, D) or (B, D), floating point, the values of the leaves; soft ones are means of values. With `onehot`
            (n, D, C) or (B, D, C), C being the most values that a variable has, rows that sum to one. For a batch of
            circuits led by G. Observed variables keep their values, but under `redraw`. Of evidence, the states.

        Raises:
            ValueError: as `sample`; an estimator that is none of the three, a temperature that is not above 0, or
                `onehot` with a continuous variable.

        References:
            Lang, Mundt, Ventola, Peharz, Kersting, Elevating Perceptual Sample Quality in PCs through Differentiable
            Sampling, PMLR 181, 2022; Ahmed, Zeng, Niepert, Van den Broeck, SIMPLE: A Gradient Estimator for k-Subset
            Sampling, ICLR 2023.

        Example:
            >>> import torch
            >>> import lvd_lightning.circuits as pc
            >>> graph = pc.hclt([-1, 0, 0], num_latents=4, leaf=pc.Categorical(8))
            >>> circuit = pc.Circuit(graph, parameterization="logits")
            >>> sample = circuit.rsample(5, generator=torch.Generator().manual_seed(0))
            >>> sample.shape, bool((sample == sample.round()).all())
            (torch.Size([5, 3]), True)
            >>> (sample.mean() - 2).square().backward()  # move the mean of all values towards 2
            >>> all(bool(table.grad.abs().sum() > 0) for table in circuit.parameters())
            True
            >>> soft = circuit.rsample(5, estimator="gumbel", temperature=0.5, onehot=True)
            >>> soft.shape, torch.allclose(soft.sum(-1), torch.ones(5, 3))
            (torch.Size([5, 3, 8]), True)
        """
        return rsample(
            self,
            n,
            head=head,
            x=x,
            observed=observed,
            estimator=estimator,
            temperature=temperature,
            hard=hard,
            onehot=onehot,
            redraw=redraw,
            generator=generator,
        )

    @opaque
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

    @opaque
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
            table = self.engine.dense(number, stored.detach())
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
        self.engine.forget()

    def _fused_pass(self, *arguments: object) -> Tensor:
        """log p of all heads, (G, H, B)."""
        try:
            return LogProb.apply(*arguments)
        except RuntimeError as error:
            if "setup_context" not in str(error):  # a static method that PyTorch misses in our autograd function
                raise
            raise RuntimeError(
                "log_prob: its fast passes do not work under torch.func; call it inside `with circuit.reference():`"
            ) from error

    def _inputs_with_gradient(self, x: Tensor) -> Tensor | None:
        """x if gradients may flow into it: evidence always, values where they were asked for."""
        if self.engine.is_evidence:
            return x
        if not (x.requires_grad and torch.is_grad_enabled()):
            return None
        if not any(plan.distribution.is_smooth for plan in self.plan.inputs):
            raise ValueError(
                "x: requires a gradient, but all variables are discrete and log p has no derivative in them; "
                "give x.detach()"
            )
        if self.engine.half_smooth is not None:
            raise ValueError(
                f"x: requires a gradient, but variable {self.engine.half_smooth} has discrete inputs beside continuous "
                "ones, so that log p has no derivative in it; give x.detach()"
            )
        return x

    def _reference_pass(self, x: Tensor, observed: Tensor | None, tables: Sequence[Tensor]) -> Tensor:
        """log p of all heads, (G, H, B)."""
        is_shared = (x.ndim == 3) == self.engine.is_evidence
        masks = None if observed is None else take_inputs(self.plan, observed, is_shared)
        found = log_values(self.plan, tables, take_inputs(self.plan, x, is_shared), masks)
        for layer, log_FKB in zip(self.plan.inputs, found.inputs, strict=True):
            if layer.distribution.num_statistics and log_FKB.requires_grad:
                log_FKB.register_hook(self._lack_statistics)
        return found.heads

    def _lack_statistics(self, _: Tensor) -> None:
        self.engine.lacks_statistics = True

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Circuit:
        """Behind `to`, `half` and their like."""
        check_type_of_numbers(fn(torch.empty(0, dtype=self.dtype)).dtype)
        return super()._apply(fn, recurse)

    def prepare(self, x: Tensor, observed: Tensor | None, *, late: bool = False, checked: bool = True) -> Batch:
        """Examples as the engine takes them, once they and the parameters are found good; see `batch.prepare`."""
        self.check_tables()
        return prepare(self.engine, x, observed, late, checked)

    def trust_tables(self) -> None:
        """Take the parameters as they are for good ones: an EM step made them."""
        self._known_tables.trust()

    def check_tables(self) -> None:
        """Raise a ValueError if parameters were changed, since last time, to what are none.

        Costs next to nothing where nothing was changed, or by an EM step.
        """
        if self.parameterization == "probabilities":
            tables = self.stored()
            for number in self._known_tables.changed(tables):
                with torch.no_grad():
                    check_probabilities(self.engine.dense(number, tables[number]), self.plan.groups[number])
                self._known_tables.learn(number, tables[number])

    def stored(self) -> list[Tensor]:
        """All of `tables`; to walk the `nn.ParameterList` takes as long as a small operation for every tensor in it."""
        return [table for table in self.tables._parameters.values() if table is not None]

    def probabilities(self) -> list[Tensor]:
        """The normalised parameters of all groups: the stored tensors, or a function of the logits; see `dense`."""
        if self.parameterization == "probabilities":
            return self.stored()
        return [
            from_logits(logits, group, self.engine.mask(number))
            for number, (logits, group) in enumerate(zip(self.tables, self.plan.groups, strict=True))
        ]

    def _inner_size(self, g: int, node: Node) -> int:
        nodes = self.structures[g].nodes
        return sum(nodes[child].num_units for child in node.children)

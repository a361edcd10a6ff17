"""Flows of a data set: the sums over examples that pruning and growing decide by.

Shapes: G circuits, B examples, D variables, P parameter rows, H outer and K inner units, E the row space of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lvd_lightning.circuits.checks import check_counts, check_type, described, is_whole
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.engine.batch import Batch, expected_shape, head_index
from lvd_lightning.circuits.engine.kernels.cpu.passes import FusedWorkspace
from lvd_lightning.circuits.engine.log_prob import evaluate
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.ranks import sum_in_place

__all__ = ["NOTHING_ADDED", "Flows", "check_flows"]

#: What pruning and growing say of flows without examples.
NOTHING_ADDED = "flows: no examples were added, so there is nothing to decide by; count them first: flows.add(x)"


class Flows:
    r"""Sums of flows over examples, per edge and per unit, in float64 on the circuit's device.

    .. math:: F_{nc} = \sum_x w(x) F_n(x) \theta_{nc} p_c(x) / p_n(x), \quad F_n = \sum_{m \to n} F_{mn}

    The flow of a head is the weight of the examples given to it; a product passes its flow to every child. An example
    that is impossible under its head adds nothing but its weight to `num_examples`.

    Adding examples leaves the circuit as it was: no gradient, no statistic and no parameter changes. The sums belong to
    the parameters that the circuit has while examples are added.

    num_examples: float64 (G,), the sum of the weights given to each circuit. tables: F_nc shaped like the circuit's own
    tables, None for those of inputs. inner_E: the flow of every row of E, from which that of every unit follows.

    References:
        Liu et al., Understanding the Distillation Process from Deep Generative Models to Tractable Probabilistic
        Circuits, 2023, section 4; Dang, Liu and Van den Broeck, Sparse Probabilistic Circuits via Pruning and Growing,
        2022 (arXiv 2211.12551), section 3.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.hclt([-1, 0], num_latents=4, leaf=pc.Categorical(8))
        >>> circuit = pc.Circuit(graph)
        >>> flows = pc.Flows(circuit)
        >>> flows.add(torch.randint(8, (100, 2)))
        >>> print(f"{flows.edges(graph.root).sum():.1f}")  # every example passes through the root once
        100.0
    """

    def __init__(self, circuit: Circuit) -> None:
        check_type("Flows: circuit", circuit, Circuit)
        self.circuit = circuit
        self.num_examples = torch.zeros(circuit.num_circuits, dtype=torch.float64, device=circuit.device)
        self.tables = [
            self.num_examples.new_zeros(table.shape) if group.kind == "sum" else None
            for table, group in zip(circuit.tables, circuit.plan.groups, strict=True)
        ]
        self.inner_E = self.num_examples.new_zeros(circuit.plan.num_edge_rows)
        self._num_heads_G = torch.tensor([found.num_heads for found in circuit.structures], device=circuit.device)
        self._place = {
            owner: (number, row)
            for number, group in enumerate(circuit.plan.groups)
            for row, owner in enumerate(group.owners)
        }
        # The sums of tied nodes do not tell which of them the flow went through.
        self._is_tied = any(layer.accumulate for layer in circuit.engine.inner_layers())
        self._added = False
        self._reduced = False

    @property
    def is_empty(self) -> bool:
        """Whether nothing was added here, not even examples of weight 0 or an empty batch.

        Once summed over ranks, flows are not empty either if any rank has added weight.
        """
        return not self._added and not bool(self.num_examples.any())

    @torch.no_grad()
    def add(
        self,
        x: Tensor,
        head: int | Tensor = 0,
        weight: Tensor | None = None,
        *,
        observed: Tensor | None = None,
        chunk_size: int = 256,
    ) -> None:
        """Add the flows of some examples.

        Args:
            x: (B, D); for a batch of circuits (G, B, D), or (B, D) given to all of them.
            head: an int, or a tensor (B,), (G, B) for a batch of circuits: the head that each example belongs to.
            weight: shape of `head`, how often each example counts; 1 if not given. 0 for the padding of ragged batches.
            observed: bool, shape of x; False marginalises the variable.
            chunk_size: examples (per circuit) that are computed at once.

        Raises:
            ValueError: arguments that do not fit the circuit, a negative or non-finite weight, an example of positive
                weight under a head that its circuit lacks, or flows that have been summed over ranks already. Nothing
                has been added then.
        """
        if self._reduced:
            raise ValueError("add: these flows have been summed over ranks; start new ones for more examples")
        check_counts("Flows.add", chunk_size=chunk_size)
        if not isinstance(x, Tensor) or x.ndim < 2:
            raise ValueError(
                f"x: got {type(x).__name__}, expected a tensor of shape {expected_shape(self.circuit.engine)}"
            )
        evidence = any(plan.distribution.is_evidence for plan in self.circuit.plan.inputs)
        axis = x.ndim - 3 if evidence else x.ndim - 2
        size = x.shape[axis]
        head_GB = head_index(self.circuit.engine, head, size)
        weight_GB = self._weights(weight, head_GB)
        shape = x.shape[:-1] if evidence else x.shape
        if observed is not None and not (isinstance(observed, Tensor) and observed.shape == shape):
            raise ValueError(f"observed: got {described(observed)}, expected a bool tensor of shape {tuple(shape)}")
        chunks = []
        for low in range(0, size, chunk_size):
            part = slice(low, min(low + chunk_size, size))
            x_part = x.narrow(axis, low, part.stop - low)
            chunks.append((x_part, None if observed is None else observed[..., part, :], part))
        if len(chunks) > 1:  # an error in a late one must not come after early ones have been added
            for x_part, observed_part, _ in chunks:
                self.circuit.prepare(x_part, observed_part)
        for x_part, observed_part, part in chunks:
            self._add_chunk(x_part, observed_part, head_GB[:, part], weight_GB[:, part])
        self._added = True

    def all_reduce(self) -> None:
        """Sum over all ranks of the default process group; nothing to do without one, or if already done."""
        if self._reduced:
            return
        self._reduced = True
        sum_in_place([self.num_examples, self.inner_E, *(found for found in self.tables if found is not None)])

    def edges(self, node: int, circuit: int = 0) -> Tensor:
        """F_nc of a sum node, shaped like its weight; tied nodes share the sum over all of them.

        Args:
            node: its id in `Circuit.to_graph()`.
            circuit: which one of a batch of circuits.

        Raises:
            ValueError: there is no such circuit or node, or the node is no sum.
        """
        found = self._node(node, circuit)
        if found.kind != "sum":
            raise ValueError(f"node: {node} is of kind {found.kind!r}; only the edges of sum nodes have flows")
        nodes = self.circuit.structures[circuit].nodes
        number, row = self._place[circuit, node if found.tied_to is None else found.tied_to]
        found_flow = self.tables[number]
        assert found_flow is not None
        table = self.circuit.engine.dense(number, found_flow)
        return table[row, : found.num_units, : sum(nodes[child].num_units for child in found.children)].clone()

    def units(self, node: int, circuit: int = 0) -> Tensor:
        """F_n of the units of a node, float64 (num_units,) on the CPU; of this node alone if it is tied.

        Args:
            node: its id in `Circuit.to_graph()`.
            circuit: which one of a batch of circuits.

        Raises:
            ValueError: there is no such circuit or node.
        """
        self._node(node, circuit)
        return torch.from_numpy(self.all_units()[circuit][node].copy())

    def all_units(self) -> list[list[NDArray[np.float64]]]:
        """`units` of every node of every circuit, on the CPU."""
        plan, inner_E1 = self.circuit.plan, self.inner_E[:, None]
        values_V = self.inner_E.new_zeros(plan.num_value_rows)
        for leaf in self.circuit.engine.leaf_layers():
            values_V[leaf.start : leaf.stop] = leaf.gradient_of(inner_E1, 0, leaf.num_folds).reshape(-1)
        for layer in self.circuit.engine.inner_layers():
            pulled_FH = layer.pulled(inner_E1, 0, layer.num_folds)
            values_V[layer.outer_start : layer.outer_start + pulled_FH.numel()] = pulled_FH.reshape(-1)
        values, inner = values_V.cpu().numpy(), self.inner_E.cpu().numpy()
        out: list[list[NDArray[np.float64]]] = []
        for g, structure in enumerate(self.circuit.structures):
            implicit = self._implicit_units(g)
            out.append(
                [
                    values[plan.base[g, index] : plan.base[g, index] + node.num_units]
                    if node.kind != "product"
                    else implicit[index]
                    if index in implicit
                    else inner[plan.inner[g, index]]
                    for index, node in enumerate(structure.nodes)
                ]
            )
        return out

    def check(self, circuit: Circuit) -> None:
        """Raise a ValueError unless these are flows of a circuit with the structure of `circuit`."""
        if circuit is self.circuit:
            return
        same = circuit.num_circuits == self.circuit.num_circuits and all(
            _same_structure(a, b) for a, b in zip(circuit.structures, self.circuit.structures, strict=True)
        )
        if not same:
            raise ValueError(
                "flows: were counted in a circuit of another structure; count them again in the circuit to be changed"
            )

    def _implicit_units(self, circuit: int) -> dict[int, NDArray[np.float64]]:
        """The flows of products without rows in E: what flows to them from the sum that alone mixes them."""
        out = {}
        for (g, index), (layer, fold, first) in self.circuit.plan.implicit.items():
            if g == circuit:
                _, consumer = self.circuit.plan.layers[layer].nodes[fold]
                size = self.circuit.structures[g].nodes[index].num_units
                out[index] = self.edges(consumer, g)[:, first : first + size].sum(0).cpu().numpy()
        return out

    def _add_chunk(self, x: Tensor, observed: Tensor | None, head_GB: Tensor, weight_GB: Tensor) -> None:
        engine = self.circuit.engine
        batch, tables = self.circuit.prepare(x, observed), self.circuit.probabilities()
        wanted_GHB = torch.zeros(*engine.roots.shape, batch.size, dtype=torch.bool, device=head_GB.device)
        wanted_GHB.scatter_(1, head_GB[:, None], (weight_GB > 0)[:, None])
        lease: Any
        if self._is_tied:
            lease, again = engine.lease(batch.size, keep=True), None
            engine.run_forward(batch, tables, lease.space)
            log_GHB = lease.space.values[engine.roots]
        else:
            log_GHB, lease, again = evaluate(engine, batch, tables, keep=True, wanted=wanted_GHB)
        possible_GB = log_GHB.gather(1, head_GB[:, None])[:, 0] > -torch.inf
        share_GB = (weight_GB * possible_GB).to(self.circuit.dtype)
        flow_GHB = torch.zeros_like(log_GHB).scatter_(1, head_GB[:, None], share_GB[:, None])
        if again is not None:
            again_GHS, flow_GHB = again.split(flow_GHB)
            self._pass_down(again.batch, again.lease.space, tables, again_GHS)
        self._pass_down(batch, lease.space, tables, flow_GHB)
        self.num_examples.add_(weight_GB.sum(1))

    def _pass_down(self, batch: Batch, space: Any, tables: Sequence[Tensor], flow_GHB: Tensor) -> None:
        """Add what a backward pass from the flows of the heads gives."""
        engine = self.circuit.engine
        grads = [
            None if found is None else torch.zeros_like(table) for found, table in zip(self.tables, tables, strict=True)
        ]
        if isinstance(space, FusedWorkspace):
            space.backward(batch, tables, grads, flow_GHB, [None] * len(engine.leaf_layers()))
        else:
            gradient = engine.gradient_space(batch.size)
            engine.head_rows(gradient.inner).copy_(flow_GHB)
            engine.run_backward(space, tables, gradient, grads)
            self.inner_E.add_(gradient.inner.sum(1, dtype=torch.float64))
            engine.return_gradient_space(gradient)
        for found, grad, table in zip(self.tables, grads, tables, strict=True):
            if found is not None and grad is not None:
                found.add_(grad.mul_(table))
        if isinstance(space, FusedWorkspace):
            self._add_inner(grads, flow_GHB)

    def _add_inner(self, flows: Sequence[Tensor | None], flow_GHB: Tensor) -> None:
        """Add the flows of all rows of E: those of the heads, and for the others the sums over edges from above."""
        engine = self.circuit.engine
        engine.head_rows(self.inner_E[:, None]).add_(flow_GHB.sum(-1, dtype=torch.float64)[..., None])
        for layer in engine.inner_layers():
            flow = flows[layer.group]
            assert flow is not None
            layer.inner_rows(self.inner_E[:, None], 0, layer.num_folds).add_(layer.by_inner(flow)[..., None])

    def _weights(self, weight: Tensor | None, head_GB: Tensor) -> Tensor:
        """Weights as float64 (G, B), checked."""
        shape = tuple(head_GB.shape) if self.circuit.batched else tuple(head_GB.shape[1:])
        if weight is None:
            weight_GB = torch.ones_like(head_GB, dtype=torch.float64)
        else:
            if not isinstance(weight, Tensor) or tuple(weight.shape) != shape:
                got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
                raise ValueError(f"weight: got {got}, expected a tensor of shape {shape}")
            weight_GB = weight.to(head_GB.device, torch.float64).view(head_GB.shape)
        if not bool(((weight_GB >= 0) & torch.isfinite(weight_GB)).all()):
            raise ValueError("weight: must be finite and not negative")
        absent_GB = (head_GB >= self._num_heads_G[:, None]) & (weight_GB > 0)
        if bool(absent_GB.any()):
            g, b = (int(found) for found in absent_GB.nonzero()[0])
            raise ValueError(
                f"head: circuit {g} has {int(self._num_heads_G[g])} heads, example {b} asks for head "
                f"{int(head_GB[g, b])}; give it weight 0 if it only pads"
            )
        return weight_GB

    def _node(self, node: int, circuit: int) -> Node:
        if not is_whole(circuit) or not 0 <= circuit < self.circuit.num_circuits:
            raise ValueError(f"circuit: got {described(circuit)}, expected 0..{self.circuit.num_circuits - 1}")
        if not is_whole(node):
            raise ValueError(f"node: got {described(node)}, expected the id of a node")
        nodes = self.circuit.structures[circuit].nodes
        if not 0 <= node < len(nodes):
            raise ValueError(f"node: circuit {circuit} has {len(nodes)} nodes, got {node}")
        return nodes[node]


def check_flows(caller: str, circuit: Circuit, flows: Flows) -> None:
    """Raise a ValueError unless `caller` was given a circuit and flows that fit it."""
    check_type(f"{caller}: circuit", circuit, Circuit)
    check_type(f"{caller}: flows", flows, Flows)
    flows.check(circuit)


def _same_structure(a: CircuitGraph, b: CircuitGraph) -> bool:
    return (a.root, len(a.nodes)) == (b.root, len(b.nodes)) and all(map(_same_node, a.nodes, b.nodes))


def _same_node(a: Node, b: Node) -> bool:
    plain = ("kind", "num_units", "children", "variable", "distribution", "tied_to")
    return all(getattr(a, name) == getattr(b, name) for name in plain) and all(
        (x is None and y is None) or (x is not None and y is not None and torch.equal(x.cpu(), y.cpu()))
        for x, y in ((a.units, b.units), (a.mask, b.mask))
    )

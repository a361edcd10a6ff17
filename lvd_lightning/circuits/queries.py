"""Queries that descend through the circuit: sampling, max-product decoding, posteriors of latents.

Shapes: G circuits, B batch, D variables, F folded nodes, H outer units, K inner units, V and E row spaces of `plan.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_generator, described, is_whole, plain_integers
from lvd_lightning.circuits.engine.batch import head_index
from lvd_lightning.circuits.engine.kronecker import KroneckerLayer
from lvd_lightning.circuits.engine.layers import BITS_PER_NAT, InputLayer, Layer
from lvd_lightning.circuits.engine.plan import LOG_ZERO
from lvd_lightning.circuits.engine.workspace import GradientSpace, Workspace, initialise_constants

if TYPE_CHECKING:
    from lvd_lightning.circuits.circuit import Circuit
    from lvd_lightning.circuits.engine.batch import Batch
    from lvd_lightning.circuits.engine.log_prob import Lease

__all__ = ["check_possible", "mpe", "nothing_observed", "posterior", "sample", "unit_posteriors"]

#: Numbers that a chunk of folds may hold while units are chosen.
CHUNK_SIZE = 1 << 22


@torch.no_grad()
def sample(
    circuit: Circuit,
    n: int | None = None,
    *,
    head: int | Tensor = 0,
    x: Tensor | None = None,
    observed: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Exact (conditional) samples; see `Circuit.sample`."""
    if (n is None) == (x is None):
        raise ValueError("sample: give either n, the number of samples, or x with `observed`, to complete its rows")
    check_generator("sample", generator, circuit.device)
    if x is None:
        if n is None or not is_whole(n) or n < 0:
            remedy = "; examples are given by name: x=" if isinstance(n, Tensor) else ""
            raise ValueError(f"sample: n: got {described(n)}, expected a whole number, 0 or larger{remedy}")
        if observed is not None:
            raise ValueError("sample: observed: says what of x is given, and there is no x")
        x, observed = nothing_observed(circuit, int(n))
    elif observed is None and not circuit.plan.inputs[0].distribution.is_evidence:
        raise ValueError("sample: x needs `observed`, which says what of it is given (False: to be sampled)")
    batch = circuit.prepare(x, observed)
    index_GB = head_index(circuit.engine, head, batch.size)
    out = _output(circuit, x)
    if batch.size == 0:
        return out
    tables = circuit.probabilities()
    lease = circuit.engine.lease(batch.size, keep=False)
    circuit.engine.run_forward(batch, tables, lease.space)
    check_possible(circuit, _log_of_heads(circuit, lease.space.values, index_GB), index_GB)
    active = _descend(circuit, lease.space.values, tables, index_GB, generator, stochastic=True)
    for number, layer in enumerate(circuit.engine.leaf_layers()):
        for a, b in _fold_chunks(layer.num_folds, batch.size * max(layer.distribution.size, layer.num_units)):
            reached_FB, unit_FB = _chosen(layer.gradient_of(active, a, b))
            if layer.group < 0:
                drawn_FB = unit_FB
            else:
                params_FBS = _rows(layer.parameters_of(tables[layer.group], a, b), unit_FB)
                drawn_FB = layer.distribution.sample(params_FBS, generator)
            _write(circuit, layer, batch, number, reached_FB, drawn_FB, out, a, b)
    return out


@torch.no_grad()
def mpe(
    circuit: Circuit, x: Tensor, *, observed: Tensor | None = None, head: int | Tensor = 0
) -> tuple[Tensor, Tensor]:
    """Max-product decoding; see `Circuit.mpe`."""
    batch = circuit.prepare(x, observed)
    index_GB = head_index(circuit.engine, head, batch.size)
    out = _output(circuit, x)
    tables = circuit.probabilities()
    values = torch.empty(circuit.plan.num_value_rows, batch.size, dtype=circuit.dtype, device=circuit.device)
    initialise_constants(values)
    circuit.engine.run_inputs(batch, tables, values)
    for number, layer in enumerate(circuit.engine.leaf_layers()):
        if batch.observed is not None:
            layer.forward_modes(values, tables[layer.group] if layer.group >= 0 else None, batch.observed[number])
    for inner in circuit.engine.inner_layers():
        _maximise(inner, values, tables)
    log_GB = _log_of_heads(circuit, values, index_GB) / BITS_PER_NAT
    check_possible(circuit, log_GB, index_GB)
    active = _descend(circuit, values, tables, index_GB, None, stochastic=False)
    for number, layer in enumerate(circuit.engine.leaf_layers()):
        reached_FB, unit_FB = _chosen(layer.gradient_of(active, 0, layer.num_folds))
        found_FB = unit_FB
        if layer.group >= 0:
            mode_FK, _ = layer.distribution.mode(layer.parameters_of(tables[layer.group], 0, layer.num_folds))
            found_FB = mode_FK.gather(1, unit_FB)
        _write(circuit, layer, batch, number, reached_FB, found_FB, out, 0, layer.num_folds)
    return out, log_GB if circuit.batched else log_GB[0]


@torch.no_grad()
def posterior(
    circuit: Circuit, x: Tensor, node: int, *, observed: Tensor | None = None, head: int | Tensor = 0
) -> Tensor:
    """p(latent of `node` = k, node reached | x); see `Circuit.posterior`."""
    keys = [(g, _latent_node(circuit, g, node)) for g in range(circuit.num_circuits)]
    batch = circuit.prepare(x, observed)
    lease, space = _reach(circuit, batch, head_index(circuit.engine, head, batch.size))
    found_KB = [_reached_units(circuit, key, lease.space, space) for key in keys]
    out_GBK = space.inner.new_zeros(circuit.num_circuits, batch.size, max(map(len, found_KB)))
    for out_BK, found in zip(out_GBK, found_KB, strict=True):
        out_BK[:, : len(found)] = found.T
    circuit.engine.return_gradient_space(space)
    return out_GBK if circuit.batched else out_GBK[0]


def unit_posteriors(circuit: Circuit, batch: Batch, index_GB: Tensor) -> GradientSpace:
    """p(unit is reached | x) of every row of E, in `inner` of a space that the caller gives back."""
    return _reach(circuit, batch, index_GB)[1]


def _reach(circuit: Circuit, batch: Batch, index_GB: Tensor) -> tuple[Lease[Workspace], GradientSpace]:
    """A forward pass, and a backward pass from the given heads."""
    tables = circuit.probabilities()
    lease = circuit.engine.lease(batch.size, keep=True)
    circuit.engine.run_forward(batch, tables, lease.space)
    check_possible(circuit, _log_of_heads(circuit, lease.space.values, index_GB), index_GB)
    space = circuit.engine.gradient_space(batch.size)
    circuit.engine.head_rows(space.inner).zero_().scatter_(1, index_GB[:, None], 1.0)
    circuit.engine.run_backward(lease.space, tables, space, [None] * len(tables))
    return lease, space


def _reached_units(circuit: Circuit, key: tuple[int, int], space: Workspace, gradient: GradientSpace) -> Tensor:
    """p(unit is reached | x) of the units of a product node, (K, B)."""
    if key in circuit.plan.inner:
        return gradient.inner[torch.from_numpy(circuit.plan.inner[key]).to(circuit.device)]
    number, fold, first = circuit.plan.implicit[key]
    layer = circuit.engine.inner_layers()[number]
    assert isinstance(layer, KroneckerLayer)
    found_KB = layer.unit_posteriors(space, gradient, circuit.probabilities()[layer.group], fold)
    return found_KB[first : first + circuit.structures[key[0]].nodes[key[1]].num_units]


def nothing_observed(circuit: Circuit, n: int) -> tuple[Tensor, Tensor]:
    """`n` rows of x without information, and the mask that says so."""
    shape = (circuit.num_circuits, n, circuit.num_variables) if circuit.batched else (n, circuit.num_variables)
    observed = torch.zeros(shape, dtype=torch.bool, device=circuit.device)
    first = circuit.plan.inputs[0]
    states = (first.num_units,) if first.distribution.is_evidence else ()
    return torch.zeros(*shape, *states, dtype=circuit.dtype, device=circuit.device), observed


def _latent_node(circuit: Circuit, g: int, node: int) -> int:
    """The product node of a latent, in circuit g."""
    structure = circuit.structures[g]
    if not is_whole(node):
        raise ValueError(f"node: got {described(node)}, expected the name of a latent (a whole number)")
    index = structure.latents.get(int(node), int(node) if not structure.latents else -1)
    if (g, index) not in circuit.plan.inner and (g, index) not in circuit.plan.implicit:
        known = sorted(structure.latents) if structure.latents else "the ids of product nodes"
        raise ValueError(f"node: {node} names no latent of the circuit; known are {str(known)[:200]}")
    return index


def _output(circuit: Circuit, x: Tensor) -> Tensor:
    """Where answers go: a copy of x, with a row per circuit, of whole numbers if every variable has them."""
    x = plain_integers(x)
    evidence = circuit.plan.inputs[0].distribution.is_evidence
    shape = x.shape[:-1] if evidence else x.shape
    whole = all(plan.distribution.is_whole or plan.distribution.is_evidence for plan in circuit.plan.inputs)
    kind = torch.int64 if whole else (x.dtype if x.is_floating_point() else circuit.dtype)
    out = torch.zeros(shape, dtype=kind, device=x.device) if evidence else x.nan_to_num(0).to(kind, copy=True)
    if circuit.batched and out.ndim == 2:
        out = out.expand(circuit.num_circuits, *out.shape).clone()
    return out


def _write(
    circuit: Circuit,
    layer: InputLayer,
    batch: Batch,
    number: int,
    reached_FB: Tensor,
    found_FB: Tensor,
    out: Tensor,
    a: int,
    b: int,
) -> None:
    """Put the values of folds a..b where the variable is unobserved and the node is reached."""
    wanted = reached_FB
    if layer.group >= 0:
        wanted = wanted & ~batch.observed[number][a:b] if batch.observed is not None else torch.zeros_like(wanted)
    f, column = wanted.nonzero(as_tuple=True)
    variable = layer.variables[a:b][f]
    value = found_FB[f, column].to(out.dtype)
    if circuit.batched:
        circuit_of = layer.columns[a:b][f] // circuit.num_variables
        out[circuit_of, column, variable] = value
    else:
        out[column, variable] = value


def _log_of_heads(circuit: Circuit, values: Tensor, index_GB: Tensor) -> Tensor:
    """The values of the heads that are asked for, (G, B), in bits as they are in V."""
    return values[circuit.engine.roots].gather(1, index_GB[:, None])[:, 0]


def check_possible(circuit: Circuit, log_GB: Tensor, index_GB: Tensor) -> None:
    """Raise a ValueError if a row is impossible under its head, or the head is not there."""
    if not bool((log_GB > -torch.inf).all()):
        lacking_GB = circuit.engine.roots.gather(1, index_GB) == LOG_ZERO
        if bool(lacking_GB.any()):
            g, b = (int(found) for found in lacking_GB.nonzero()[0])
            num_heads = circuit.structures[g].num_heads
            raise ValueError(
                f"head: circuit {g} has {num_heads} heads, example {b} asks for head {int(index_GB[g, b])}"
            )
        raise ValueError("x: a row has probability zero under its head, so nothing can be conditioned on it")


def _descend(
    circuit: Circuit,
    values: Tensor,
    tables: list[Tensor],
    index_GB: Tensor,
    generator: torch.Generator | None,
    *,
    stochastic: bool,
) -> Tensor:
    """Choose, from the heads down, one inner unit of every reached sum; returns an E matrix of zeros and ones."""
    active = values.new_zeros(circuit.plan.num_edge_rows, values.shape[1])
    circuit.engine.head_rows(active).scatter_(1, index_GB[:, None], 1.0)
    for layer in reversed(circuit.engine.inner_layers()):
        for a, b in _fold_chunks(layer.num_folds, layer.inner_units * values.shape[1]):
            outer_FHB = layer.pulled(active, a, b)
            if not layer.is_sum:
                layer.inner_rows(active, a, b).copy_(outer_FHB)
                continue
            reached_FB, unit_FB = _chosen(outer_FHB)
            weight_FBK = _rows(layer.weights_of(tables[layer.group], a, b), unit_FB)
            score_FKB = layer.log_inner(values, a, b) + weight_FBK.log2().transpose(1, 2)
            if stochastic:  # the exponential race: argmax of log p - log E is a draw from p
                score_FKB -= torch.empty_like(score_FKB).exponential_(generator=generator).log2()
            layer.choose(active, a, b, score_FKB.argmax(1), reached_FB)
    return active


def _maximise(layer: Layer, values: Tensor, tables: list[Tensor]) -> None:
    """One layer with maxima in place of sums."""
    if not layer.is_sum:
        layer.outer_rows(values, 0, layer.num_folds).copy_(layer.log_inner(values, 0, layer.num_folds))
        return
    for a, b in _fold_chunks(layer.num_folds, layer.inner_units * values.shape[1]):
        log_FKB = layer.log_inner(values, a, b)
        log_weight_FHK = layer.weights_of(tables[layer.group], a, b).log2()
        out_FHB = layer.outer_rows(values, a, b)
        for unit in range(layer.outer_units):
            torch.amax(log_FKB + log_weight_FHK[:, unit, :, None], 1, out=out_FHB[:, unit])


def _chosen(active_FKB: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a node is reached, and its active unit, both (F, B)."""
    value, unit = active_FKB.max(1)
    return value > 0, unit


def _rows(table_FHK: Tensor, unit_FB: Tensor) -> Tensor:
    """The rows of the chosen units, shape (F, B, K)."""
    return table_FHK[torch.arange(len(table_FHK), device=table_FHK.device)[:, None], unit_FB]


def _fold_chunks(num_folds: int, size: int) -> list[tuple[int, int]]:
    step = max(1, CHUNK_SIZE // max(size, 1))
    return [(low, min(low + step, num_folds)) for low in range(0, num_folds, step)]

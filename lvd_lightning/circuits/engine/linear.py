"""The forward pass with linear values, for trees over probabilities: faster than the general one, where numbers allow.

Where the largest inner unit of a node is too small to be divided by, it stays as it is: an example that no unit of a
node explains then has sums of 0, and the bound of the error says how little it can be (see `error_bound`).

Shapes: G circuits, H heads, B batch, N sum nodes, L input nodes, F folded nodes, C categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.error_bound import TOLERANCE
from lvd_lightning.circuits.engine.kernels.cpu.passes import FusedWorkspace
from lvd_lightning.circuits.engine.layers import BITS_PER_NAT, TINY
from lvd_lightning.circuits.engine.plan import LOG_ZERO
from lvd_lightning.circuits.engine.workspace import LinearWorkspace

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.batch import Batch
    from lvd_lightning.circuits.engine.engine import Engine

__all__ = ["inexact", "largest_inputs", "run_linear"]


def run_linear(
    engine: Engine, batch: Batch, tables: Sequence[Tensor], space: LinearWorkspace | FusedWorkspace
) -> tuple[Tensor, Tensor]:
    """log p of all heads in nats, (G, H, B), by linear values; see `inexact` for where it holds.

    Besides, what the linear values of the heads were divided by, (G, B), as logarithms to base 2.
    """
    if isinstance(space, FusedWorkspace):
        return space.forward(batch, tables)
    for number, leaf in enumerate(engine.leaf_layers()):
        observed = None if batch.observed is None else batch.observed[number]
        leaf.forward_linear(space.values, tables[leaf.group], batch.values[number], observed)
    for layer in engine.inner_layers():
        layer.forward_linear(space, tables[layer.group])
    log_GB = space.peaks.new_zeros(engine.num_circuits, space.peaks.shape[1])
    log_GB.index_add_(0, engine.circuit_of_node, space.peaks.log2())
    return (space.values[engine.roots].log2() + log_GB[:, None]) / BITS_PER_NAT, log_GB


def inexact(
    engine: Engine,
    batch: Batch,
    tables: Sequence[Tensor],
    space: LinearWorkspace | FusedWorkspace,
    wanted_GHB: Tensor | None = None,
    threshold_GB: Tensor | None = None,
) -> Tensor | None:
    """Where numbers got too small for `run_linear`, and only `Circuit.run_forward` will do: bool (G, B); None: nowhere.

    Values that are certainly below `threshold_GB` (linear, like those of the heads) may be as they are. A backward
    pass may follow all the same, with gradients of 0 for these pairs and for heads that are not wanted.
    """
    dtype = space.peaks_JNC.dtype if isinstance(space, FusedWorkspace) else engine.dtype
    if space.is_large(TINY[dtype]):
        return None
    matters_GHB = (engine.roots != LOG_ZERO)[..., None]
    if wanted_GHB is not None:
        matters_GHB = matters_GHB & wanted_GHB
    bound, inputs_LB = engine.error_bound(), largest_inputs(engine, batch, tables, space)
    if isinstance(space, FusedWorkspace):
        error_GB = space.error(bound, inputs_LB)
    else:
        error_GB = bound.error(space.peaks, space.largest(), inputs_LB)
    error_G1B = error_GB[:, None]
    heads_GHB = space.heads(engine.roots)
    bad_GHB = matters_GHB & ~(error_G1B <= TOLERANCE * heads_GHB)
    if threshold_GB is not None:
        bad_GHB &= ~(heads_GHB + error_G1B < threshold_GB[:, None])
    bad_GB = bad_GHB.any(1)
    if isinstance(space, LinearWorkspace) and space.keep and not float(space.peaks.amin()) >= TINY[dtype]:
        space.make_finite()
    return bad_GB if bool(bad_GB.any()) else None


def largest_inputs(
    engine: Engine, batch: Batch, tables: Sequence[Tensor], space: LinearWorkspace | FusedWorkspace
) -> Tensor:
    """The largest likelihood among the units of every input node, (L, B)."""
    found = []
    for number, leaf in enumerate(engine.leaf_layers()):
        if leaf.distribution.is_table:
            table_FC = tables[leaf.group].amax(1)[leaf.parameter_rows]
            largest_FB = table_FC.gather(1, batch.values[number])
        elif isinstance(space, FusedWorkspace) and (noted := space.largest_FB[number]) is not None:
            largest_FB = noted
        else:
            largest_FB = leaf.largest(tables[leaf.group], batch.values[number])
        observed = None if batch.observed is None else batch.observed[number]
        found.append(largest_FB if observed is None else largest_FB.masked_fill(~observed, 1.0))
    return torch.cat(found)

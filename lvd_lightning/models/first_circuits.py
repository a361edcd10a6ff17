"""The circuits that stage conditional begins with: one for every latent value, learnt on some of its patches.

Shapes: N images, P patches, D variables of a patch, M patches read, G circuits, S slots, n patches of a circuit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.structures import chow_liu_trees
from lvd_lightning.context import Data, StageContext
from lvd_lightning.models.routing import route
from lvd_lightning.models.structures import Leaf, PartStructure, num_outcomes
from lvd_lightning.stopping import stop_if_requested

__all__ = ["first_circuits"]


def first_circuits(
    context: StageContext,
    circuit: Tensor,
    head: Tensor,
    num_circuits: int,
    *,
    structure: PartStructure,
    leaf: Leaf,
    num_latents: int,
    from_data: bool,
    max_examples: int,
    kept: Sequence[int] | None = None,
) -> list[pc.CircuitGraph]:
    """A graph per circuit; a tree, and first parameters, are learnt on a sample of its own training patches.

    Args:
        context: of the stage; random numbers are a function of it.
        circuit: int64 (N, P), which circuit models each training patch; one without patches borrows those of others.
        head: int (N, P), which of its heads. A circuit has as many heads as its patches have.
        structure: of all circuits; random ones (RAT-SPNs) are drawn for each.
        leaf: of the variables of a part.
        num_latents: states of every hidden variable of an HCLT, units of every region of other structures.
        from_data: whether first parameters come from these patches, see `PartStructure`, or are random.
        max_examples: patches per circuit.
        kept: the circuits that are wanted, ascending, as they are among all; None for all.
    """
    sets, heads = _examples(context, circuit, head, num_circuits, max_examples)
    heads_G = torch.zeros(num_circuits, dtype=torch.int64)
    heads_G.scatter_reduce_(0, circuit.reshape(-1), head.reshape(-1).long(), "amax")
    parts = context.data.parts
    trees = (
        chow_liu_trees(sets, num_outcomes(parts.leaf), max_examples=None)
        if structure.needs_tree
        else [None] * num_circuits
    )
    generator, counts = context.generator("parameters"), (heads_G + 1).tolist()
    wanted = set(range(num_circuits) if kept is None else kept)
    graphs = []
    for g, (x, head_n, tree, count) in enumerate(zip(sets, heads, trees, counts, strict=True)):
        settings: dict[str, Any] = {"leaf": leaf, "parents": tree, "generator": generator}
        if from_data:
            graph = structure.graph_from_data(x, parts.shape, num_latents, count, head=head_n, **settings)
        else:
            graph = structure.graph(parts.shape, num_latents, count, **settings)
        if g in wanted:  # all are made, since each draws random numbers
            graphs.append(graph)
    return graphs


def _examples(
    context: StageContext, circuit: Tensor, head: Tensor, num_circuits: int, limit: int
) -> tuple[list[Tensor], list[Tensor]]:
    """At most `limit` random patches of every circuit, (n, D), and their heads (n,)."""
    positions = circuit.shape[1]
    routed = route(circuit.reshape(-1), num_circuits, slots=limit, generator=context.generator("examples"))
    filled_GS = routed.weight > 0
    wanted = routed.index[filled_GS].unique()
    patches_MD = _read_parts(context.data, wanted, positions)
    place_GS = torch.searchsorted(wanted, routed.index)
    head_M = head.reshape(-1)[wanted].long()
    chosen = [place[filled] for place, filled in zip(place_GS, filled_GS, strict=True)]
    others = torch.arange(len(wanted))[:: max(1, len(wanted) // limit)][:limit]
    sets = [patches_MD[found if len(found) else others] for found in chosen]
    return sets, [head_M[found] if len(found) else torch.zeros(len(others), dtype=torch.int64) for found in chosen]


def _read_parts(data: Data, flat: Tensor, positions: int) -> Tensor:
    """Parts at flat numbers example * P + position, ascending; (M, D). Reads every example once."""
    out = []
    images, place = (flat // positions).unique_consecutive(return_inverse=True)
    bounds = torch.searchsorted(place, torch.arange(0, len(images) + 1024, 1024))
    for number, chunk in enumerate(images.split(1024)):
        stop_if_requested()
        at = slice(int(bounds[number]), int(bounds[number + 1]))
        patches_BPD = data.parts.split(data.batch("train", chunk))
        out.append(patches_BPD[place[at] - number * 1024, flat[at] % positions])
    return torch.cat(out)

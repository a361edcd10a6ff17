"""Prune and grow all circuits of a batch by their flows over the training patches.

Shapes: n patches of a chunk, D variables, G circuits, H heads, S slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.growing.examples import Examples
from lvd_lightning.models.evidence import CircuitGroups, split_by_load

__all__ = ["grow_circuits", "prune_circuits"]


def prune_circuits(conditional: pc.Circuit, examples: Examples, threshold: float = 1e-4) -> list[pc.CircuitGraph]:
    """Every circuit without the edges that carry at most `threshold` of the flow of its examples (see `pc.prune`).

    Where processes have circuits of their own, each gets those that it holds.

    A circuit without examples stays as it is. All processes have to call.

    Args:
        conditional: batch of circuits.
        examples: all training patches with their heads.
        threshold: 0 removes only edges without any flow, which never lowers the likelihood of the examples.
    """
    groups = examples.groups(conditional)
    flows = _flows(groups, examples)
    return _joined(
        groups, [pc.prune(part, found, threshold) for part, found in zip(groups.circuits, flows, strict=True)]
    )


def grow_circuits(
    conditional: pc.Circuit,
    examples: Examples,
    heads: list[list[int]],
    *,
    sigma: float = 0.2,
    generator: torch.Generator | None = None,
) -> list[pc.CircuitGraph]:
    """Every circuit with a copy of each of its `heads`, after the heads it has, in the order of the list.

    Units that carry much of the flow of these heads' examples become two as well. All processes have to call, with
    generators in the same state. Where processes have circuits of their own, each gets those that it holds.

    Args:
        conditional: batch of circuits.
        examples: all training patches with their heads; the flows are those of the patches of growing heads.
        heads: of every circuit, of all processes, the heads that grow; a circuit with none stays as it is.
        sigma: standard deviation of the factors that tell copies apart.
        generator: on the CPU.
    """
    grows_GH = torch.zeros(examples.shape(conditional), dtype=torch.bool)
    for g, wanted in enumerate(heads):
        grows_GH[g, wanted] = True
    load_G = examples.counts(*grows_GH.shape).mul(grows_GH).sum(1)
    # Noise goes by the groups of all circuits, and the places in these, whoever has them.
    place_G = torch.arange(len(load_G)) if examples.members is None else examples.members.places()
    everyone = split_by_load(load_G)
    numbers = [(place_G[members] >= 0).nonzero()[:, 0] for members in everyone]
    own = [members[number] for members, number in zip(everyone, numbers, strict=True)]
    groups = CircuitGroups(conditional, members=[place_G[members] for members in own if len(members)])
    parts = iter(zip(groups.circuits, _flows(groups, examples, grows_GH), strict=True))
    grown = []
    for members, number in zip(own, numbers, strict=True):
        if not len(members):
            torch.randint(1 << 62, (), generator=generator)  # as `pc.grow` draws
            continue
        part, flows = next(parts)
        chosen = [heads[g] for g in members.tolist()]
        settings: dict[str, Any] = {"sigma": sigma, "generator": generator, "numbers": number.tolist()}
        grown.append(pc.grow(part, flows, heads=chosen, **settings))
    return _joined(groups, grown)


def _flows(groups: CircuitGroups, examples: Examples, heads: Tensor | None = None) -> list[pc.Flows]:
    """Sums of flows of every group over all patches, or those of `heads`, bool (G, H), of all processes.

    Where processes have circuits of their own, each has all patches of its circuits, and nothing is sent.
    """
    flows = [pc.Flows(part) for part in groups.circuits]
    for chunk in examples.chunks(groups.whole.device, heads):
        for number, index_GS, filled_GS in groups.passes(chunk.circuit, memory=4):  # flows take a backward pass
            head_GS = torch.where(filled_GS, chunk.head[index_GS], 0)
            flows[number].add(chunk.x[index_GS], head=head_GS, weight=filled_GS.to(groups.circuits[number].dtype))
    for found in flows if examples.members is None else ():
        found.all_reduce()
    return flows


def _joined(groups: CircuitGroups, found: list[pc.CircuitGraph | list[pc.CircuitGraph]]) -> list[pc.CircuitGraph]:
    """The graphs of all groups in the order of the circuits, on the CPU as edits give them."""
    graphs: dict[int, pc.CircuitGraph] = {}
    for members, part in zip(groups.members, found, strict=True):
        assert isinstance(part, list)
        graphs.update(zip(members.tolist(), part, strict=True))
    return [graphs[g] for g in range(len(graphs))]

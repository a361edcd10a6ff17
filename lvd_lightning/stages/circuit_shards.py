"""Conditional circuits divided over ranks: their graphs move, and checkpoints are those of all circuits together.

Shapes: G circuits of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.circuits.io import pack_structure, unpack_structure
from lvd_lightning.context import StageContext
from lvd_lightning.models.members import Members, TableRows, balanced_owners, circuit_cost
from lvd_lightning.ranks import from_each, rank_and_size, receive_from, send_to_first, summed

__all__ = ["first_members", "own_checkpoint", "rebalanced", "whole_checkpoint"]

#: The busiest rank may have so many times the mean cost before circuits move.
UNEVEN = 1.1
_TABLES = "assembled.conditional.tables."


def first_members(context: StageContext, circuit: Tensor, head: Tensor, num_circuits: int) -> Members:
    """Which rank will have which circuits, by the heads that these will have; the data will give whole batches.

    circuit, head: int (N, P), of the training patches.

    Raises:
        ValueError: the data cannot do that, or there are fewer circuits than ranks.
    """
    if not hasattr(context.data, "whole_batches"):
        raise ValueError(
            f"sharding: circuits needs data that give every rank whole batches, but {type(context.data).__name__} has "
            "no whole_batches: take datamodules.loaders.GlobalLoaders for its base, or set sharding: data"
        )
    heads_G = torch.ones(num_circuits, dtype=torch.int64)
    heads_G.scatter_reduce_(0, circuit.reshape(-1), head.reshape(-1).long() + 1, "amax")
    found = divided(heads_G.double().tolist(), heads_G.tolist())
    context.data.whole_batches = True
    return found


def divided(cost: list[float], heads: list[int]) -> Members:
    """A division of circuits over ranks by their costs."""
    return Members(balanced_owners(cost, rank_and_size()[1]), tuple(heads))


def rebalanced(graphs: list[pc.CircuitGraph], members: Members) -> tuple[list[pc.CircuitGraph], Members]:
    """This rank's circuits after an edit, with a new division where one rank has got too much to do.

    All ranks have to call.

    graphs: of `members.own`, edited.
    """
    rank, size = rank_and_size()
    facts_G2 = torch.zeros(members.num_circuits, 2, dtype=torch.float64)
    for g, graph in zip(members.own.tolist(), graphs, strict=True):
        facts_G2[g] = torch.tensor([circuit_cost(graph), graph.num_heads])
    facts_G2 = summed(facts_G2)
    cost_G, heads = facts_G2[:, 0], tuple(int(count) for count in facts_G2[:, 1])
    load_R = torch.zeros(size, dtype=torch.float64).index_add_(0, members.owner, cost_G)
    if float(load_R.max()) <= UNEVEN * float(load_R.mean()):
        return graphs, Members(members.owner, heads)
    after = Members(balanced_owners(cost_G.tolist(), size), heads)
    mine = dict(zip(members.own.tolist(), graphs, strict=True))
    moving = {g: graph for g, graph in mine.items() if int(after.owner[g]) != rank}
    for found in from_each(moving):
        mine |= {g: graph for g, graph in found.items() if int(after.owner[g]) == rank}
    return [mine[g] for g in after.own.tolist()], after


def whole_checkpoint(conditional: pc.Circuit, members: Members, checkpoint: dict[str, Any]) -> tuple[str, Any]:
    """Make a checkpoint of one rank's circuits one of all circuits; returns the structure of all, packed.

    All ranks have to call; what the first one has afterwards is what one process would have, and is on the CPU.
    """
    rank, size = rank_and_size()
    found = dict(zip(members.own.tolist(), conditional.structures, strict=True))
    for part in from_each({g: pack_structure([graph]) for g, graph in found.items()} if rank else {}):
        if rank == 0:
            found |= {g: unpack_structure(*packed)[0] for g, packed in part.items()}
    optimizers: list[dict[str, Any]] = checkpoint.get("optimizer_states") or []
    sent = [tensor.detach().cpu() for tensor in conditional.stored()]
    flows = [_flows(state, conditional) for state in optimizers]
    for tensors in flows:
        sent += tensors
    if rank:
        send_to_first(sent)
        return "", {}
    graphs = [found[g] for g in range(members.num_circuits)]
    whole = _blank(graphs, conditional.dtype)
    tables = [table.detach() for table in whole.stored()]
    averages = [_room(whole) if tensors else [] for tensors in flows]
    for other in range(size):
        numbers = members.of_rank(other)
        part_of = conditional if other == 0 else _blank([graphs[int(g)] for g in numbers], conditional.dtype)
        if other:
            sent = [torch.empty_like(table) for table in part_of.stored()]
            for tensors in averages:
                sent += _room(part_of) if tensors else []
            receive_from(other, sent)
        places = [-1] * len(graphs)
        for place, g in enumerate(numbers.tolist()):
            places[g] = place
        rows, count = TableRows(part_of, whole, places), len(part_of.tables)
        for number, target in enumerate([tables, *(tensors for tensors in averages if tensors)]):
            rows.copy(sent[number * count : (number + 1) * count], target)
    state_dict = checkpoint["state_dict"]
    for name in [name for name in state_dict if name.startswith(_TABLES)]:
        del state_dict[name]
    state_dict |= {f"{_TABLES}{number}": table for number, table in enumerate(tables)}
    checkpoint["optimizer_states"] = [
        _optimizer_state(state, tensors, len(tables)) for state, tensors in zip(optimizers, averages, strict=True)
    ]
    return pack_structure(whole.structures)


def own_checkpoint(checkpoint: dict[str, Any], graphs: list[pc.CircuitGraph]) -> Members:
    """Make a checkpoint of all circuits one of those that this rank will have, in place; says which these are.

    graphs: the structure of all circuits.
    """
    members = divided([circuit_cost(graph) for graph in graphs], [graph.num_heads for graph in graphs])
    state_dict = checkpoint["state_dict"]
    tables = [state_dict.pop(name) for name in sorted(_names(state_dict), key=lambda name: int(name.split(".")[-1]))]
    whole = _blank(graphs, tables[0].dtype)
    own = _blank([graphs[int(g)] for g in members.own], tables[0].dtype)
    rows, stored = TableRows(whole, own, members.own.tolist()), [table.detach() for table in own.stored()]
    rows.copy(tables, stored)
    state_dict |= {f"{_TABLES}{number}": table for number, table in enumerate(stored)}
    changed = []
    for state in checkpoint.get("optimizer_states") or []:
        flows, averages = _flows(state, whole), []
        if flows:
            averages = _room(own)
            rows.copy(flows, averages)
        changed.append(_optimizer_state(state, averages, len(stored)))
    checkpoint["optimizer_states"] = changed
    return members


def _names(state_dict: dict[str, Any]) -> list[str]:
    return [name for name in state_dict if name.startswith(_TABLES)]


def _blank(graphs: list[pc.CircuitGraph], dtype: torch.dtype) -> pc.Circuit:
    """Circuits of these structures, with some parameters."""
    return pc.Circuit(unpack_structure(*pack_structure(graphs))).to(dtype)


def _room(circuit: pc.Circuit) -> list[Tensor]:
    """Zeros for the averages that Anemone keeps of every table."""
    out = []
    for number, table in enumerate(circuit.stored()):
        statistics = circuit.engine.statistics_of(number, table)
        out.append(torch.zeros_like(table.detach() if statistics is None else statistics))
    return out


def _flows(state: dict[str, Any], circuit: pc.Circuit) -> list[Tensor]:
    """The averages in an optimizer's state, for every table; none where there are none yet."""
    if not any("flow" in found for found in state["state"].values()):
        return []
    room = _room(circuit)
    return [
        state["state"][number]["flow"].detach().cpu() if number in state["state"] else room[number]
        for number in range(len(room))
    ]


def _optimizer_state(state: dict[str, Any], averages: list[Tensor], count: int) -> dict[str, Any]:
    """An optimizer's state with other averages, for so many tables."""
    steps = [found["step"] for found in state["state"].values() if "step" in found]
    groups = [{**group, "params": list(range(count))} for group in state["param_groups"]]
    kept = {number: {"step": max(steps), "flow": flow} for number, flow in enumerate(averages)}
    return {**state, "state": kept, "param_groups": groups}

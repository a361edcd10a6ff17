"""Parameters of nodes as tables of a compiled circuit: stacked and padded, as probabilities or as logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.plan import ParameterGroup, Plan
from lvd_lightning.circuits.graph import CircuitGraph

__all__ = [
    "check_probabilities",
    "check_type_of_numbers",
    "common_type",
    "from_logits",
    "root_rows",
    "stack",
    "to_logits",
]

#: How far a row of probabilities may be from a sum of one. Rounding in long training stays far below it.
TOLERANCE = 0.01
#: The same for tables that changed since: one step of a gradient optimizer moves a row by more.
CHANGED_TOLERANCE = 1e-3


def common_type(graphs: Sequence[CircuitGraph]) -> torch.dtype:
    """The type of the parameters of all nodes, float32 or float64.

    Raises:
        ValueError: they are of several types, or of another one.
    """
    found: dict[torch.dtype, tuple[int, int]] = {}
    for g, graph in enumerate(graphs):
        for index, node in enumerate(graph.nodes):
            for tensor in (node.weight, node.params):
                if tensor is not None:
                    found.setdefault(tensor.dtype, (g, index))
    if len(found) > 1 or not found.keys() <= {torch.float32, torch.float64}:
        places = " and ".join(f"{str(dtype)[6:]} (node {index} of graph {g})" for dtype, (g, index) in found.items())
        raise ValueError(
            f"Circuit: expected parameters of one type, float32 or float64, got {places}; convert weights and params "
            "with .to(...), or give the dtype to the function that makes the structure"
        )
    return next(iter(found), torch.get_default_dtype())


def check_type_of_numbers(dtype: torch.dtype) -> None:
    """Raise a ValueError for a type in which a circuit does not compute."""
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"Circuit: parameters are float32 or float64, got {dtype}, in which probabilities and flows lose their "
            'small numbers: keep float32, and on a GPU set circuit.matmul_precision = "bf16" for faster sums'
        )


def check_probabilities(tensor: Tensor, group: ParameterGroup) -> None:
    """Raise a ValueError unless a changed table, as (rows, units, alternatives), still holds parameters."""
    check_type_of_numbers(tensor.dtype)
    remedy = "a gradient optimizer needs Circuit(graph, parameterization='logits')"
    where = f"Circuit: parameters were changed, not by EM ({remedy})"
    _check_values(tensor, group, where, CHANGED_TOLERANCE)


def stack(graphs: Sequence[CircuitGraph], group: ParameterGroup) -> tuple[Tensor, Tensor | None]:
    """Parameters of a group, padded, shape (rows, *group.shape), and the mask of live edges.

    Raises:
        ValueError: parameters are missing, or are no probabilities (or no parameters of the inputs' family).
    """
    nodes = [graphs[g].nodes[index] for g, index in group.owners]
    found = [node.weight if group.kind == "sum" else node.params for node in nodes]
    if any(tensor is None for tensor in found):
        raise ValueError("Circuit: the graph has no parameters; it is a structure only")
    tensors = [tensor for tensor in found if tensor is not None]
    given = tensors
    if group.distribution is not None:
        tensors = [group.distribution.floored(tensor) for tensor in tensors]
    exact = all(tensor.shape == group.shape for tensor in tensors)
    if exact:
        table = torch.stack(tensors)
    else:
        table = tensors[0].new_zeros(len(tensors), *group.shape)
        for row, tensor in enumerate(tensors):
            table[row, : tensor.shape[0], : tensor.shape[1]] = tensor
            table[row, tensor.shape[0] :] = tensor[0].new_zeros(group.shape[1])
            table[row, tensor.shape[0] :, : tensor.shape[1]] = tensor[0]  # padding is a copy: valid, and never used
    try:
        _check_values(table, group, "")
    except ValueError:
        for (g, index), tensor in zip(group.owners, given, strict=True):  # which one is it
            _check_values(tensor, group, f"Circuit: node {index}" + (f" of graph {g}" if len(graphs) > 1 else ""))
        raise
    if group.kind != "sum" or (exact and all(node.mask is None for node in nodes)):
        return table, None
    mask = torch.zeros(table.shape, dtype=torch.bool, device=table.device)
    for row, (node, tensor) in enumerate(zip(nodes, tensors, strict=True)):
        mask[row, : tensor.shape[0], : tensor.shape[1]] = True if node.mask is None else node.mask
    return table, mask


def _check_values(tensor: Tensor, group: ParameterGroup, where: str, tolerance: float = TOLERANCE) -> None:
    """Raise a ValueError for numbers that are no parameters."""
    family = group.distribution
    if family is not None and not family.is_table:
        try:
            family.check_params(tensor)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
    elif not (bool((tensor >= 0).all()) and bool(((tensor.sum(-1) - 1).abs() < tolerance).all())):
        name = "weights" if family is None else f"params of {family}"
        raise ValueError(
            f"{where}: rows of {name} must be non-negative and sum to one, got a smallest number of "
            f"{float(tensor.amin()):.3g} and sums from {float(tensor.sum(-1).amin()):.4g} to "
            f"{float(tensor.sum(-1).amax()):.4g}"
        )


def to_logits(table: Tensor, group: ParameterGroup) -> Tensor:
    """What `from_logits` makes these parameters of."""
    if group.distribution is not None:
        return group.distribution.to_logits(table)
    return table.clamp_min(torch.finfo(table.dtype).tiny).log()


def from_logits(logits: Tensor, group: ParameterGroup, mask: Tensor | None) -> Tensor:
    """Normalised parameters; those of pruned edges are 0."""
    if group.distribution is not None:
        return group.distribution.from_logits(logits)
    if mask is None:
        return logits.softmax(-1)
    kept = mask.clone()
    kept[..., 0] |= ~mask.any(-1)  # rows that only pad: any distribution will do
    return logits.masked_fill(~kept, -torch.inf).softmax(-1)


def root_rows(plan: Plan, graphs: Sequence[CircuitGraph]) -> list[tuple[int, Tensor, Tensor]]:
    """Where the weights of the heads are: for every parameter group with some, the circuits and their rows."""
    place = {owner: (number, row) for number, group in enumerate(plan.groups) for row, owner in enumerate(group.owners)}
    found: dict[int, list[tuple[int, int]]] = {}
    for g, graph in enumerate(graphs):
        number, row = place[g, graph.root]
        found.setdefault(number, []).append((g, row))
    return [
        (number, torch.tensor([g for g, _ in pairs]), torch.tensor([row for _, row in pairs]))
        for number, pairs in found.items()
    ]

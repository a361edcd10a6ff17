"""Heads, and leaves from the values of their units: what structures with first parameters from data share.

Shapes: N examples, D variables, K units, S numbers stored per unit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import described
from lvd_lightning.circuits.distributions import Distribution

__all__ = ["check_examples", "check_heads", "leaves_from_data", "variables_of"]


def check_heads(head: Tensor | None, num_heads: int, size: int) -> Tensor:
    """The head of every example, int64 (N,)."""
    if head is None:
        if num_heads > 1:
            raise ValueError(f"head: is needed to tell {num_heads} heads apart: the head of every example")
        return torch.zeros(size, dtype=torch.int64)
    whole = isinstance(head, Tensor) and not head.is_floating_point() and head.dtype != torch.bool
    if not whole or head.shape != (size,) or not bool(((head >= 0) & (head < num_heads)).all()):
        raise ValueError(f"head: got {described(head)}, expected {size} integers 0..{num_heads - 1}")
    return head.cpu().long()


def variables_of(families: Sequence[Distribution]) -> dict[Distribution, list[int]]:
    """Which variables have each family, in the order in which families come first."""
    out: dict[Distribution, list[int]] = {}
    for variable, family in enumerate(families):
        out.setdefault(family, []).append(variable)
    return out


def check_examples(x: Tensor, families: Sequence[Distribution]) -> None:
    """Raise a ValueError unless x has the shape (examples, variables), and values of these families."""
    if x.ndim != 2 or len(x) == 0 or x.shape[1] != len(families):
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected values (examples, {len(families)})")
    for family, variables in variables_of(families).items():
        if family.is_evidence:
            raise ValueError(f"leaf: {family} has no parameters that data could give; use the structure itself")
        family.check_values(x[:, variables])


def leaves_from_data(
    families: Sequence[Distribution], x_ND: Tensor, unit_ND: Tensor, num_units: int, smoothing: float
) -> list[Tensor]:
    """First parameters of every variable, (K, S) each: all variables of a family at once."""
    out: list[Tensor] = [torch.empty(0)] * len(families)
    for family, variables in variables_of(families).items():
        found_DKS = family.from_data(x_ND[:, variables], unit_ND[:, variables], num_units, smoothing=smoothing)
        for variable, params_KS in zip(variables, found_DKS, strict=True):
            out[variable] = params_KS
    return out

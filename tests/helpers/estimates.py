"""What tests of estimated gradients need: exact gradients by central differences, and bounds of a bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import lvd_lightning.circuits as pc

__all__ = ["assert_no_bias", "differences", "gradients", "rows_of", "seeded", "slopes", "with_logits"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_logits(case: Any) -> pc.Circuit:
    """Parameters without constraints: every direction is one in which distributions stay normalised."""
    return pc.Circuit(case.graph, parameterization="logits")


def gradients(circuit: pc.Circuit, loss: Tensor, *others: Tensor) -> list[Tensor]:
    """For all tables and other tensors; zeros where the loss does not depend on one."""
    targets = [*circuit.tables, *others]
    found = torch.autograd.grad(loss, targets, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)]


@torch.no_grad()
def differences(loss: Callable[[], Tensor], targets: list[Tensor], step: float = 1e-5) -> list[Tensor]:
    """The gradient of a loss by central differences; targets are changed in place and restored."""
    out = []
    for target in targets:
        flat, slope = target.view(-1), torch.zeros(target.numel())
        for i in range(len(flat)):
            at = flat[i].item()
            flat[i] = at + step
            high = loss()
            flat[i] = at - step
            low = loss()
            flat[i] = at
            slope[i] = (high - low) / (2 * step)
        out.append(slope.view(target.shape))
    return out


@torch.no_grad()
def slopes(
    loss: Callable[[], Tensor], targets: list[Tensor], directions: list[list[Tensor]], step: float = 1e-5
) -> Tensor:
    """The derivatives of a loss along directions in the space of its targets, by central differences."""
    out = []
    for direction in directions:
        found = []
        for shift in (step, -2 * step, step):
            for target, one in zip(targets, direction, strict=True):
                target.add_(one, alpha=shift)
            found.append(loss())
        out.append((found[0] - found[1]) / (2 * step))
    return torch.stack(out)


def rows_of(case: Any, number: int) -> tuple[Tensor, Tensor]:
    """Some possible rows of a case with their masks; the first knows nothing."""
    pick = torch.linspace(0, len(case.x) - 1, number).long()
    return case.x[pick], case.observed[pick]


def assert_no_bias(batches: list[list[Tensor]], exact: list[Tensor]) -> None:
    """Means of gradients of independent batches agree with the exact ones within 5 standard errors."""
    for found, expected in zip(map(torch.stack, zip(*batches, strict=True)), exact, strict=True):
        error = found.std(0) / len(found) ** 0.5
        assert ((found.mean(0) - expected).abs() <= 5 * error + 1e-8).all()

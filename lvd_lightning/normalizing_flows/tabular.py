"""Flows of rows of a table, by `zuko`: masked autoregressive ones, spline flows, RealNVP.

Shapes: B rows, D columns, K steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.normalizing_flows.flow_pass import FlowPass

__all__ = ["KINDS", "TabularFlow", "random_orders"]

KINDS = ("maf", "nsf", "realnvp")


class TabularFlow(nn.Module):
    """K steps over D columns, each in an order of its own.

    A masked autoregressive step ("maf") shifts and scales a column by what earlier columns say, "nsf" bends it by a
    monotonic rational-quadratic spline, and a coupling ("realnvp") shifts and scales the columns whose place in the
    order is odd by what the others say. Columns stay where they are: an order is what other libraries get by permuting
    columns between the steps, accumulated up to the step.

    Columns are standardised first by numbers that `start_from` takes from data; they count in the density, which is one
    of the data as they are.

    Args:
        kind: one of `KINDS`.
        num_columns: D, at least 2.
        orders: the place of every column in the order of each step: K rows of D whole numbers, each a permutation.
        hidden_size: units of a hidden layer of a step's network.
        num_hidden_layers: of these.

    Raises:
        ValueError: a kind that is unknown, a single column, or rows of orders that are no permutations.
        ModuleNotFoundError: `zuko` is not installed; it is in the extra "flows".

    References:
        Papamakarios, Pavlakou and Murray, Masked Autoregressive Flow for Density Estimation, 2017 (arXiv 1705.07057);
        Durkan et al., Neural Spline Flows, 2019 (arXiv 1906.04032); Dinh et al., 2017 (arXiv 1605.08803).

    Example:
        >>> from lvd_lightning.normalizing_flows.tabular import TabularFlow
        >>> flow = TabularFlow("maf", 3, [[0, 1, 2], [2, 1, 0]], hidden_size=8, num_hidden_layers=2)
        >>> found = flow.encode(torch.randn(5, 3))
        >>> len(found.hidden), found.log_prob.shape, flow.decode(found.latents).shape
        (2, torch.Size([5]), torch.Size([5, 3]))
    """

    shift: Tensor
    scale: Tensor
    orders: Tensor

    def __init__(
        self, kind: str, num_columns: int, orders: Sequence[Sequence[int]], hidden_size: int, num_hidden_layers: int
    ) -> None:
        super().__init__()
        check_choice(KINDS, flow=kind)
        check_counts(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers, num_steps=len(orders))
        expect(num_columns >= 2, "num_columns", num_columns, "2 or more: a flow of one column has nothing to look at")
        columns = list(range(num_columns))
        if any(sorted(order) != columns for order in orders):
            raise ValueError(f"orders: expected {len(orders)} permutations of 0..{num_columns - 1}, got {orders}")
        self.num_columns = num_columns
        self.register_buffer("orders", torch.tensor([list(order) for order in orders]))
        self.register_buffer("shift", torch.zeros(num_columns))
        self.register_buffer("scale", torch.ones(num_columns))
        layers = [hidden_size] * num_hidden_layers
        self.steps = nn.ModuleList(_step(kind, num_columns, order, layers) for order in self.orders)

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parts of a latent, without B: one part with all columns."""
        return [(self.num_columns,)]

    @property
    def data_scale(self) -> Tensor:
        """The standard deviations of the columns (D,), by which differences are told."""
        return self.scale

    def encode(self, x: Tensor) -> FlowPass:
        """Rows (B, D) to a latent of one part."""
        x = (x - self.shift) / self.scale
        hidden, log_det_B = [], -self.scale.log().sum().expand(len(x))
        for step in self.steps:
            x, of_step_B = step().call_and_ladj(x)
            hidden.append(x)
            log_det_B = log_det_B + of_step_B
        return FlowPass([x], hidden, log_det_B)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """The inverse: a latent (B, D) to rows; one pass of the network per column, but for "realnvp"."""
        (x,) = latents
        for step in reversed(list(self.steps)):
            x = step().inv(x)
        return x * self.scale + self.shift

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Standardise columns by the means and deviations of rows (N, D)."""
        std, mean = torch.std_mean(x, dim=0, correction=0)
        self.shift.copy_(mean)
        self.scale.copy_(torch.where(std > 0, std, 1.0))


def random_orders(num_columns: int, num_steps: int, generator: torch.Generator | None = None) -> list[list[int]]:
    """An order for each of `num_steps`, drawn one after another."""
    return [torch.randperm(num_columns, generator=generator).tolist() for _ in range(num_steps)]


def _step(kind: str, num_columns: int, order: Tensor, layers: list[int]) -> nn.Module:
    try:
        from zuko.flows.autoregressive import MaskedAutoregressiveTransform
        from zuko.flows.coupling import GeneralCouplingTransform
        from zuko.transforms import MonotonicRQSTransform
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "flows of tables are those of the package zuko: pip install 'lvd-lightning[flows]', or pip install zuko"
        ) from error
    made: Any
    if kind == "realnvp":
        made = GeneralCouplingTransform(num_columns, mask=order % 2 == 0, hidden_features=layers)
    elif kind == "maf":
        made = MaskedAutoregressiveTransform(num_columns, order=order, hidden_features=layers)
    else:
        bins = 8
        made = MaskedAutoregressiveTransform(
            num_columns,
            order=order,
            univariate=MonotonicRQSTransform,
            shapes=[(bins,), (bins,), (bins - 1,)],
            hidden_features=layers,
        )
    return made

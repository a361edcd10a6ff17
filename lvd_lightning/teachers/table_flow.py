"""A flow of the rows of a table, with exact densities.

Shapes: B rows, D columns, K steps.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lvd_lightning.checks import check_above, check_counts
from lvd_lightning.normalizing_flows.flow_pass import draw_latents
from lvd_lightning.normalizing_flows.tabular import TabularFlow, random_orders

__all__ = ["TableFlow"]


class TableFlow(nn.Module):
    """A `TabularFlow` as a model: log-densities of rows, samples, and the arguments that make it again.

    Args:
        num_columns: D.
        kind: "maf", "nsf" or "realnvp".
        num_steps: of the flow.
        hidden_size, num_hidden_layers: of the network of a step.
        orders: see `TabularFlow`; by default drawn by `generator`.

    Example:
        >>> flow = TableFlow(3, num_steps=2, hidden_size=8)
        >>> flow.log_prob(torch.randn(5, 3)).shape, flow.sample(2).shape
        (torch.Size([5]), torch.Size([2, 3]))
    """

    #: See `lvd_lightning.teachers`.
    contextual = False
    positional = False

    def __init__(
        self,
        num_columns: int,
        kind: str = "maf",
        num_steps: int = 5,
        hidden_size: int = 32,
        num_hidden_layers: int = 2,
        *,
        orders: Sequence[Sequence[int]] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_steps=num_steps)
        orders = random_orders(num_columns, num_steps, generator) if orders is None else orders
        self.init_args: dict[str, Any] = {
            "num_columns": num_columns,
            "kind": kind,
            "num_steps": len(orders),
            "hidden_size": hidden_size,
            "num_hidden_layers": num_hidden_layers,
            "orders": [list(order) for order in orders],
        }
        self.flow = TabularFlow(kind, num_columns, orders, hidden_size, num_hidden_layers)

    @property
    def num_parameters(self) -> int:
        """Parameters that are trained; masked weights count, which libraries keep as numbers too."""
        return sum(parameter.numel() for parameter in self.parameters())

    def continuous(self, rows: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Rows (B, D) as they are, and 0 for each: nothing has to be added to real numbers.

        Raises:
            ValueError: rows of another shape, or whole numbers.
        """
        if not rows.is_floating_point() or rows.ndim != 2 or rows.shape[1] != self.flow.num_columns:
            raise ValueError(
                f"rows: got {rows.dtype} with shape {tuple(rows.shape)}, expected real numbers with shape "
                f"(B, {self.flow.num_columns})"
            )
        x = rows.to(self.flow.shift.dtype)
        return x, x.new_zeros(len(x))

    @torch.no_grad()
    def start_from(self, rows: Tensor, generator: torch.Generator | None = None) -> None:
        """Standardise columns on some rows (B, D), before training."""
        self.flow.start_from(self.continuous(rows)[0])

    @torch.no_grad()
    def log_prob(self, rows: Tensor) -> Tensor:
        """log p(row) of the density in nats, with shape (B,)."""
        return self.flow.encode(self.continuous(rows)[0]).log_prob

    def elbo(self, rows: Tensor) -> Tensor:
        """The same: there is no bound."""
        return self.log_prob(rows)

    @torch.no_grad()
    def features(self, rows: Tensor, visible: Tensor | None = None) -> Tensor:
        """The features of every column, what it is after each of the K steps, with shape (B, D, K).

        Args:
            rows: with shape (B, D).
            visible: None: a flow sees whole rows.

        Raises:
            ValueError: `visible` is given.
        """
        if visible is not None:
            raise ValueError(
                f"visible: got shape {tuple(visible.shape)}, expected None: a flow encodes whole rows (set "
                "latents.context to none)"
            )
        return torch.stack(self.flow.encode(self.continuous(rows)[0]).hidden, 2)

    @torch.no_grad()
    def sample(self, num_samples: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Rows (num_samples, D): latents have the standard deviation `temperature`."""
        check_counts(num_samples=num_samples)
        check_above(0, temperature=temperature)
        z = draw_latents(self.flow.latent_shapes, num_samples, temperature, self.flow.shift, generator)
        return self.flow.decode(z)

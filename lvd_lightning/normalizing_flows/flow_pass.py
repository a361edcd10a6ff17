"""What a flow makes of a batch on its way to the latents.

Shapes: B examples.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["FlowPass", "draw_latents", "standard_normal"]


@dataclass(frozen=True)
class FlowPass:
    """One pass from data to latents.

    latents: the parts of the latent, with shapes (B, ...), normal and independent under the flow.
    hidden: what the flow holds on the way, to be compared with another flow's: of Glow after the steps of every level,
        of a tabular flow after every step.
    log_det: log |det dz/dx| in nats, with shape (B,).
    """

    latents: list[Tensor]
    hidden: list[Tensor]
    log_det: Tensor

    @property
    def log_prob(self) -> Tensor:
        """log p(x) of the density in nats, with shape (B,)."""
        return standard_normal(self.latents) + self.log_det


def standard_normal(latents: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, 1) of latents in parts (B, ...), summed, in nats, with shape (B,).

    Example:
        >>> round(standard_normal([torch.zeros(1, 2), torch.zeros(1, 1, 1)]).item() / math.log(2 * math.pi), 5)
        -1.5
    """
    return torch.stack([-0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) for z in latents]).sum(0)


def draw_latents(
    shapes: Sequence[tuple[int, ...]], count: int, temperature: float, like: Tensor, generator: torch.Generator | None
) -> list[Tensor]:
    """Latents of `count` examples, normal with the standard deviation `temperature`, as numbers and where `like` is.

    They are drawn on the generator's device, by default on that of `like`.
    """
    device = like.device if generator is None else generator.device
    drawn = [torch.randn(count, *shape, generator=generator, device=device, dtype=like.dtype) for shape in shapes]
    return [temperature * z.to(like.device) for z in drawn]

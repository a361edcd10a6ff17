"""Mixtures of discretised logistic distributions over pixels: densities of integers that sum to one.

Shapes: leading dimensions written "..." may be any; Q raw parameters of a pixel, M components, C channels, X pixels.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["LogisticMixture"]

# In units of half the range of values. Below the first a component is sure of one value, beyond the second it knows
# nothing; what is cut off has no gradient that float32 could hold.
_MIN_LOG_SCALE, _MAX_LOG_SCALE = -7.0, 7.0


class LogisticMixture(NamedTuple):
    r"""p(x) = sum_m w_m prod_c P_m(x_c | x_1..x_{c-1}) for every pixel x of C channels with values 0..V-1 each.

    P_m(x_c | ...) is the mass of a logistic distribution on [x_c - 1/2, x_c + 1/2]; the lowest value has all mass below
    as well, the highest all above. Its location is linear in the pixel's earlier channels. With the sigmoid s, and
    a < b the standardised edges, the mass is s(b) - s(a) = s(b) s(-a) (1 - exp(a - b)): a product, so that its
    logarithm is exact far out in the tails too.

    log_weight: log w_m, with shape (..., M, X).
    location, log_scale: values 0..V-1 being scaled to [-1, 1], with shape (..., M, C, X).
    coupling: of a channel's location to each earlier channel, pairs (1, 0), (2, 0), (2, 1), ...; (..., M, C(C-1)/2, X).
    num_values: V, one number or one for each channel.

    References:
        Salimans et al., PixelCNN++, 2017, arXiv:1701.05517, section 2.1 and 2.2.
    """

    log_weight: Tensor
    location: Tensor
    log_scale: Tensor
    coupling: Tensor
    num_values: int | tuple[int, ...]

    @staticmethod
    def num_parameters(num_components: int, num_channels: int) -> int:
        """Q, the raw parameters of a pixel."""
        return num_components * (1 + 2 * num_channels + num_channels * (num_channels - 1) // 2)

    @classmethod
    def from_raw(
        cls, raw: Tensor, num_components: int, num_channels: int, num_values: int | tuple[int, ...] = 256
    ) -> "LogisticMixture":
        """The mixture whose parameters are any real numbers, with shape (..., Q, X)."""
        pairs = num_channels * (num_channels - 1) // 2
        parts = raw.unflatten(-2, (num_components, -1)).split([1, num_channels, num_channels, pairs], dim=-2)
        return cls(
            log_weight=parts[0].squeeze(-2).log_softmax(-2),
            location=parts[1],
            log_scale=parts[2].clamp(_MIN_LOG_SCALE, _MAX_LOG_SCALE),
            coupling=parts[3],
            num_values=num_values,
        )

    def log_prob(self, values: Tensor) -> Tensor:
        """log p of every pixel in nats, with shape (..., X); values: integers 0..V-1 with shape (..., C, X)."""
        levels = values.unsqueeze(-3)
        highest = self._highest()
        scaled = levels.to(self.location.dtype) * (2.0 / highest) - 1.0
        half = 1.0 / highest
        precision = (-self.log_scale).exp()
        deviation = scaled - self._location_given(scaled)
        not_highest, not_lowest = levels < highest, levels > 0
        below = logsigmoid(precision * (deviation + half)) * not_highest
        above = logsigmoid(precision * (half - deviation)) * not_lowest
        between = torch.log(-torch.expm1(-2.0 * half * precision)) * (not_highest & not_lowest)
        return (self.log_weight + (below + above + between).sum(-2)).logsumexp(-2)

    def mean(self) -> Tensor:
        """The mean of every channel as if values were unbounded, cut to 0..V-1; with shape (..., C, X)."""
        means: list[Tensor] = []
        for channel in range(self.location.shape[-2]):
            means.append(self._shifted(channel, means))
        mean = (self.log_weight.exp().unsqueeze(-2) * torch.stack(means, -2)).sum(-3)
        highest = self._highest()
        levels = (mean + 1.0) * (0.5 * highest)
        return levels.clamp_min(0.0).minimum(torch.as_tensor(highest, dtype=mean.dtype, device=mean.device))

    def _highest(self) -> int | Tensor:
        """V - 1: a number where channels are alike, else with shape (C, 1)."""
        if isinstance(self.num_values, int):
            return self.num_values - 1
        if len(set(self.num_values)) == 1:
            return self.num_values[0] - 1
        values = torch.tensor(self.num_values, dtype=self.location.dtype, device=self.location.device)
        return values[:, None] - 1

    def _location_given(self, scaled: Tensor) -> Tensor:
        channels = scaled.unbind(-2)
        shifted = [self._shifted(number, list(channels[:number])) for number in range(len(channels))]
        return torch.stack(torch.broadcast_tensors(*shifted), dim=-2)

    def _shifted(self, channel: int, earlier: list[Tensor]) -> Tensor:
        """A channel's location, given earlier channels in [-1, 1] that broadcast to (..., M, X)."""
        location = self.location.select(-2, channel)
        first = channel * (channel - 1) // 2
        for number, value in enumerate(earlier):
            location = location + self.coupling.select(-2, first + number) * value
        return location

"""Logistic distributions over whole numbers.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lvd_lightning.circuits.distributions.discretized import Discretized
from lvd_lightning.circuits.distributions.moments import central, moments_from_centred

__all__ = ["DiscretizedLogistic"]

#: 7 zeta(3) / (2 pi^2), the mean of tanh(z/2) / z under the standard logistic distribution.
MEAN_PRECISION = 0.4262783988175058


class _Edges(NamedTuple):
    """Standardised edges of the bins of some values, and which values have an edge there."""

    low_FKB: Tensor
    high_FKB: Tensor
    has_low_F1B: Tensor
    has_high_F1B: Tensor


@dataclass(frozen=True)
class DiscretizedLogistic(Discretized):
    r"""A logistic distribution with parameters (mean, scale), rounded to whole numbers 0..num_values - 1.

    With the sigmoid s and edges a = (x - 1/2 - mean) / scale, b = (x + 1/2 - mean) / scale,

    .. math:: p(x) = s(b) - s(a) = s(b) s(-a) (1 - e^{a - b});

    value 0 has all mass below as well (a = -inf) and the last value all mass above (b = inf), so the sum is one. The
    product is exact in log space however far out in the tails. Mean and scale are those before rounding, in units of x;
    the mean may lie outside the values.

    There is no finite sufficient statistic, hence no M-step in closed form: EM takes one gradient step. A logistic
    variable is a normal one of random precision r / scale^2 with E[r | z] = tanh(z / 2) / z (z standardised). Under
    that view, with the flow-weighted means g, h of the gradient of log p for the mean and for the log of the scale, and
    w of an upper bound of E[r | x], a full step (step size 1, no pseudocount) is

    .. math:: \Delta mean = scale^2 g / w, \quad scale^2 \leftarrow scale^2 (1 + h) - w (\Delta mean)^2.

    It maximises a lower bound of the log-likelihood that touches it at the current parameters, so full-batch EM never
    lowers the likelihood, at no step size; but it needs several steps where other inputs need one. Both EM rules blend
    the sums behind it (of r, r y and r y^2, y being the value before rounding) with their current expectations.

    Args:
        num_values: at least 2.
        min_scale: the floor of the scale, in units of x. The scale has a ceiling too, 100 num_values, and the mean
            keeps within num_values of the values: beyond, the probabilities hardly change.

    References:
        Salimans et al., PixelCNN++, 2017 (arXiv 1701.05517), section 2.1 (the likelihood); Andrews and Mallows, Scale
        Mixtures of Normal Distributions, 1974 (the random precision).

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.DiscretizedLogistic(16)))
        >>> values = torch.cartesian_prod(torch.arange(16), torch.arange(16))
        >>> print(f"{circuit.log_prob(values).exp().sum():.4f}")  # probabilities, no density
        1.0000
    """

    min_scale: float = 0.05
    is_linear: ClassVar[bool] = True
    num_statistics: ClassVar[int] = 4
    spread: ClassVar[str] = "scale"
    deviation: ClassVar[float] = math.pi / math.sqrt(3.0)

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        edges = self._edges(params_FKS, x_FB, out_FKB.dtype)
        between_FK1 = torch.log(-torch.expm1(-1 / params_FKS[..., 1:]))
        torch.mul(logsigmoid(edges.high_FKB), edges.has_high_F1B, out=out_FKB)
        out_FKB.addcmul_(logsigmoid(-edges.low_FKB), edges.has_low_F1B)
        out_FKB.addcmul_(between_FK1, edges.has_low_F1B * edges.has_high_F1B)
        out_FKB.div_(math.log(2.0))

    def likelihood(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        self.forward(params_FKS, x_FB, out_FKB)
        out_FKB.exp2_()

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        edges = self._edges(params_FKS, x_FB, params_FKS.dtype)
        between_FK1 = torch.log(-torch.expm1(-1 / params_FKS[..., 1:]))
        log_high_FKB = logsigmoid(edges.high_FKB) * edges.has_high_F1B
        log_low_FKB = logsigmoid(-edges.low_FKB) * edges.has_low_F1B
        return log_high_FKB + log_low_FKB + between_FK1 * edges.has_low_F1B * edges.has_high_F1B

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        out_FKS.copy_(self.gradient_from(params_FKS, self._sums(params_FKS, x_FB, grad_FKB)))

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums of 1 and of what is expected of (r, r y, r y^2), given x and the current parameters."""
        return self.statistics_from(params_FKS, self._sums(params_FKS, x_FB, grad_FKB))

    def prepared(self, params_FKS: Tensor) -> Tensor:
        """What compiled kernels read of a unit with the scale s: mean, 1/s, 1 - e^(-1/s), (1/s)/(e^(1/s) - 1)."""
        mean_FK, scale_FK = params_FKS.unbind(-1)
        width_FK = 1 / scale_FK
        return torch.stack([mean_FK, width_FK, -torch.expm1(-width_FK), width_FK / torch.expm1(width_FK)], -1)

    def gradient_from(self, params_FKS: Tensor, sums_FK4: Tensor) -> Tensor:
        """The gradient for the parameters, float64; for the sums see `_sums`."""
        flow_FK, _, first_FK, second_FK = sums_FK4.double().unbind(-1)
        return torch.stack([first_FK, second_FK - flow_FK], -1) / params_FKS[..., 1:].double()

    def statistics_from(self, params_FKS: Tensor, sums_FK4: Tensor) -> Tensor:
        """`statistics` from the sums of `_sums`."""
        flow_FK, weight_FK, first_FK, second_FK = sums_FK4.double().unbind(-1)
        mean_FK, scale_FK = params_FKS.double().unbind(-1)
        moments_FK3 = moments_from_centred(weight_FK, first_FK * scale_FK, second_FK * scale_FK.square(), mean_FK)
        return torch.cat([flow_FK[..., None], moments_FK3], -1)

    def _sums(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Sums over the batch of g, g w, g E[r z | x] and g E[r z^2 | x], g being the gradients: (F, K, 4)."""
        edges = self._edges(params_FKS, x_FB, grad_FKB.dtype)
        first_FKB, second_FKB = self._scores(params_FKS, edges)
        parts = (grad_FKB, grad_FKB * _largest_precision(edges), grad_FKB * first_FKB, grad_FKB * second_FKB)
        return torch.stack([part.sum(-1) for part in parts], -1)

    def expected(self, params: Tensor) -> Tensor:
        """E (r, r y, r y^2)."""
        mean, scale = params.double().unbind(-1)
        weight = torch.full_like(mean, MEAN_PRECISION)
        return moments_from_centred(weight, torch.zeros_like(mean), scale.square(), mean)

    def maximise(self, expected: Tensor) -> Tensor:
        mean = self._bounded_mean(expected[..., 1] / expected[..., 0].clamp_min(1e-300))
        variance = central(expected, mean).clamp_min(self.min_scale**2)
        return self.floored(torch.stack([mean, variance.sqrt()], -1))

    def noise(self, like_FB: Tensor, generator: torch.Generator | None) -> Tensor:
        up_FB = torch.empty_like(like_FB).exponential_(generator=generator)
        down_FB = torch.empty_like(like_FB).exponential_(generator=generator)
        return up_FB.log() - down_FB.log()  # the log of a ratio of exponential variables is logistic

    def _edges(self, params_FKS: Tensor, x_FB: Tensor, dtype: torch.dtype) -> _Edges:
        x_F1B = x_FB[:, None, :].to(dtype)
        mean_FK1, scale_FK1 = params_FKS[..., :1], params_FKS[..., 1:]
        deviation_FKB = x_F1B - mean_FK1
        return _Edges(
            (deviation_FKB - 0.5) / scale_FK1,
            (deviation_FKB + 0.5) / scale_FK1,
            (x_F1B > 0).to(dtype),
            (x_F1B < self.num_values - 1).to(dtype),
        )

    def _scores(self, params_FKS: Tensor, edges: _Edges) -> tuple[Tensor, Tensor]:
        """E[r z | x] and E[r z^2 | x]: scale d log p / d mean, and 1 + scale d log p / d scale."""
        above_FKB = edges.low_FKB.sigmoid() * edges.has_low_F1B
        below_FKB = (-edges.high_FKB).sigmoid() * edges.has_high_F1B
        width_FK1 = 1 / params_FKS[..., 1:]
        within_FK1 = width_FK1 / torch.expm1(width_FK1)
        second_FKB = 1 + edges.low_FKB * above_FKB - edges.high_FKB * below_FKB
        second_FKB -= within_FK1 * (edges.has_low_F1B * edges.has_high_F1B)
        return above_FKB - below_FKB, second_FKB


def _largest_precision(edges: _Edges) -> Tensor:
    """The largest E[r | z] = tanh(z / 2) / z among the z of a bin: that of the z nearest to 0."""
    above_FKB = edges.low_FKB.clamp_min(0) * edges.has_low_F1B
    below_FKB = (-edges.high_FKB).clamp_min(0) * edges.has_high_F1B
    z_FKB = above_FKB + below_FKB
    return torch.where(z_FKB < 1e-3, 0.5 - z_FKB.square() / 24, (z_FKB / 2).tanh() / z_FKB)

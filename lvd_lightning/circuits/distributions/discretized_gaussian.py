"""Normal distributions over whole numbers.

Shapes: F folded nodes, K units, B batch, S numbers stored per unit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lvd_lightning.circuits.distributions.base import may_ask
from lvd_lightning.circuits.distributions.discretized import Discretized
from lvd_lightning.circuits.distributions.moments import central, moments_from_centred

__all__ = ["DiscretizedGaussian"]

#: From how many deviations on a series takes over, and where `erfc` comes near the smallest number.
FAR = {torch.float32: 11.0, torch.float64: 26.0}
SMALLEST_TAIL = {torch.float32: 12.9, torch.float64: 37.0}
#: The edge at an open end: beyond all mass, and finite, so that 0 times it is 0. Its square is finite too.
OPEN = 1e18
ROOT_HALF = math.sqrt(0.5)
LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class _Bins(NamedTuple):
    """Standardised bins, mirrored (side -1) so that they lie above the mean or, around it, reach further above it."""

    near_FKB: Tensor
    far_FKB: Tensor
    side_FKB: Tensor


@dataclass(frozen=True)
class DiscretizedGaussian(Discretized):
    r"""A normal distribution with parameters (mean, standard deviation), rounded to whole numbers 0..num_values - 1.

    .. math:: p(x) = \Phi(b) - \Phi(a), \quad a, b = (x \mp 1/2 - mean) / std;

    value 0 has all mass below as well (a = -inf) and the last value all mass above (b = inf), so the sum is one: this
    is a probability, and its bits per dimension compare with those of tables, where a density's do not. Bins below the
    mean are mirrored, so that differences are those of small numbers, and a series in log space serves far out.

    EM is exact: the number y before rounding is the hidden variable, and its normal density has sufficient statistics.
    EM reads the sums of (1, E[y | x], E[y^2 | x]), moments of a truncated normal distribution, and sets (blends) the
    moments; the likelihood never falls, at no step size. The moments of x itself would be an approximation, too wide by
    the variance 1/12 of a bin (Sheppard's correction) and wrong at the open ends.

    Args:
        num_values: at least 2.
        min_std: the floor of the standard deviation, in units of x, in (0, num_values).

    References:
        Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977, section 4.2
        (grouped and truncated data).

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0], num_latents=4, leaf=pc.DiscretizedGaussian(16)))
        >>> values = torch.cartesian_prod(torch.arange(16), torch.arange(16))
        >>> print(f"{circuit.log_prob(values).exp().sum():.4f}")  # probabilities, no density
        1.0000
    """

    min_std: float = 0.05
    num_statistics: ClassVar[int] = 3
    spread: ClassVar[str] = "std"
    deviation: ClassVar[float] = 1.0

    def log_prob(self, params_FKS: Tensor, x_FB: Tensor) -> Tensor:
        bins = self._bins(params_FKS, x_FB)
        is_far_FKB = bins.near_FKB > FAR[params_FKS.dtype]
        mass_FKB = _mass(bins.near_FKB, bins.far_FKB).masked_fill(is_far_FKB, 1.0)
        near_FKB = bins.near_FKB.masked_fill(~is_far_FKB, 1.0)  # numbers of which the series has gradients
        far_FKB = bins.far_FKB.masked_fill(~is_far_FKB, 2.0)
        return torch.where(is_far_FKB, _log_tail(near_FKB, far_FKB), mass_FKB.log())

    def forward(self, params_FKS: Tensor, x_FB: Tensor, out_FKB: Tensor) -> None:
        if self.num_values < x_FB.shape[1]:  # special functions go where there are fewer numbers
            table_FKV = out_FKB.new_empty(*params_FKS.shape[:2], self.num_values)
            self.forward(params_FKS, self._values(x_FB), table_FKV)
            torch.gather(table_FKV, 2, x_FB.long()[:, None].expand(out_FKB.shape), out=out_FKB)
            return
        bins = self._bins(params_FKS, x_FB)
        torch.log2(_mass(bins.near_FKB, bins.far_FKB), out=out_FKB)
        is_far_FKB = bins.near_FKB > FAR[params_FKS.dtype]
        if not may_ask(is_far_FKB):
            tail_FKB = _log_tail(bins.near_FKB, bins.far_FKB) / math.log(2.0)
            torch.where(is_far_FKB, tail_FKB, out_FKB, out=out_FKB)
        elif bool(is_far_FKB.any()):
            tail_N = _log_tail(bins.near_FKB[is_far_FKB], bins.far_FKB[is_far_FKB])
            out_FKB.masked_scatter_(is_far_FKB, tail_N / math.log(2.0))

    def backward(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor, out_FKS: Tensor) -> None:
        first_FK, second_FK = self._deviations(params_FKS, x_FB, grad_FKB)
        std_FK = params_FKS[..., 1]
        out_FKS[..., 0] = first_FK / std_FK
        out_FKS[..., 1] = second_FK / std_FK

    def statistics(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> Tensor:
        """Flow-weighted sums of 1 and of what is expected of (y, y^2), given x and the current parameters."""
        first_FK, second_FK = self._deviations(params_FKS, x_FB, grad_FKB)
        flow_FK = grad_FKB.sum(-1).double()
        mean_FK, std_FK = params_FKS.double().unbind(-1)
        return moments_from_centred(flow_FK, first_FK * std_FK, (flow_FK + second_FK) * std_FK.square(), mean_FK)

    def expected(self, params: Tensor) -> Tensor:
        """E (y, y^2)."""
        mean, std = params.double().unbind(-1)
        return torch.stack([mean, mean.square() + std.square()], -1)

    def maximise(self, expected: Tensor) -> Tensor:
        """Where the mean has to stop at its bound, the deviation is the best one around that."""
        mean = self._bounded_mean(expected[..., 0])
        moments = torch.cat([torch.ones_like(expected[..., :1]), expected], -1)
        return self.floored(torch.stack([mean, central(moments, mean).clamp_min(self.min_std**2).sqrt()], -1))

    def noise(self, like_FB: Tensor, generator: torch.Generator | None) -> Tensor:
        return torch.empty_like(like_FB).normal_(generator=generator)

    def _values(self, x_FB: Tensor) -> Tensor:
        return torch.arange(self.num_values, device=x_FB.device).expand(len(x_FB), -1)

    def _bins(self, params_FKS: Tensor, x_FB: Tensor) -> _Bins:
        x_F1B = x_FB[:, None, :].to(params_FKS.dtype)
        mean_FK1, std_FK1 = params_FKS.split(1, -1)
        is_first_F1B, is_last_F1B = x_F1B <= 0, x_F1B >= self.num_values - 1
        deviation_FKB = x_F1B - mean_FK1
        side_FKB = deviation_FKB.sign().masked_fill(is_first_F1B, -1.0).masked_fill(is_last_F1B, 1.0)
        distance_FKB = deviation_FKB * side_FKB
        far_FKB = ((distance_FKB + 0.5) / std_FK1).masked_fill(is_first_F1B | is_last_F1B, OPEN)
        return _Bins((distance_FKB - 0.5) / std_FK1, far_FKB, side_FKB)

    def _deviations(self, params_FKS: Tensor, x_FB: Tensor, grad_FKB: Tensor) -> tuple[Tensor, Tensor]:
        """Flow-weighted sums of E[z | x] and E[z^2 | x] - 1 of the standardised z before rounding, (F, K).

        These are std d log p / d mean and std d log p / d std.
        """
        if self.num_values < x_FB.shape[1]:
            index_FKB = x_FB.long()[:, None].expand(grad_FKB.shape)
            grad_FKV = grad_FKB.new_zeros(*params_FKS.shape[:2], self.num_values).scatter_add_(2, index_FKB, grad_FKB)
            return self._deviations(params_FKS, self._values(x_FB), grad_FKV)
        near_FKB, far_FKB, side_FKB = self._bins(params_FKS, x_FB)
        mass_FKB = _mass(near_FKB, far_FKB)
        at_near_FKB, at_far_FKB = (_density(edge) / mass_FKB for edge in (near_FKB, far_FKB))
        is_far_FKB = near_FKB > FAR[params_FKS.dtype]
        if not may_ask(is_far_FKB):
            tails = _tail_densities(near_FKB, far_FKB)
            at_near_FKB = torch.where(is_far_FKB, tails[0], at_near_FKB)
            at_far_FKB = torch.where(is_far_FKB, tails[1], at_far_FKB)
        elif bool(is_far_FKB.any()):
            tails = _tail_densities(near_FKB[is_far_FKB], far_FKB[is_far_FKB])
            at_near_FKB.masked_scatter_(is_far_FKB, tails[0])
            at_far_FKB.masked_scatter_(is_far_FKB, tails[1])
        first_FKB = (at_near_FKB - at_far_FKB) * side_FKB
        second_FKB = near_FKB * at_near_FKB - far_FKB * at_far_FKB
        return (grad_FKB * first_FKB).sum(-1), (grad_FKB * second_FKB).sum(-1)


def _mass(near: Tensor, far: Tensor) -> Tensor:
    """The standard normal mass between two edges, the nearer one not far out: beyond, numbers would be denormal."""
    most = SMALLEST_TAIL[near.dtype]
    return (torch.erfc(near.clamp_max(most) * ROOT_HALF) - torch.erfc(far.clamp_max(most) * ROOT_HALF)) / 2


def _density(edge: Tensor) -> Tensor:
    return torch.exp(-0.5 * edge.square() - LOG_ROOT_2PI)


def _correction(edge: Tensor) -> Tensor:
    """What the mass beyond an edge far out is, as a multiple of density / edge: an asymptotic series."""
    inverse = edge.square().reciprocal()
    return 1 - inverse * (1 - 3 * inverse * (1 - 5 * inverse * (1 - 7 * inverse * (1 - 9 * inverse))))


def _share_beyond(near: Tensor, far: Tensor) -> Tensor:
    """The mass beyond the farther edge as a share of that beyond the nearer one, far out."""
    ratio = near * _correction(far) / (far * _correction(near))
    return torch.exp(-0.5 * (far - near) * (far + near)) * ratio


def _log_tail(near: Tensor, far: Tensor) -> Tensor:
    """log of `_mass` far out."""
    beyond = _correction(near).log() - 0.5 * near.square() - LOG_ROOT_2PI - near.log()
    return beyond + torch.log1p(-_share_beyond(near, far))


def _tail_densities(near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
    """The densities at both edges, divided by the mass between them, far out."""
    at_near = near / (_correction(near) * (1 - _share_beyond(near, far)))
    return at_near, at_near * torch.exp(-0.5 * (far - near) * (far + near))

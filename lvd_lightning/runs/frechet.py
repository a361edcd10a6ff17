"""The Frechet distance of two sets of features, with an interval: how far samples are from images for a teacher.

It is no FID, which is this distance in the features of one published network, and cannot be compared with one: another
teacher is another unit. Within an experiment it can.

Shapes: N and M features of E numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

from lvd_lightning.checks import check_counts

__all__ = ["Frechet", "frechet", "frechet_distance"]


class Frechet(NamedTuple):
    """A distance, and the interval that holds it with 95 % confidence."""

    distance: float
    low: float
    high: float


def frechet_distance(one: Tensor, other: Tensor) -> float:
    r"""|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), of the means and covariances of two sets of features.

    Few features make it larger than it is: compare sets of equal sizes only.

    Args:
        one: (N, E), other: (M, E); two or more each.

    Raises:
        ValueError: fewer features, or of other sizes.

    References:
        Dowson and Landau, The Frechet Distance between Multivariate Normal Distributions, 1982, equation 4.

    Example:
        >>> import torch
        >>> from lvd_lightning.runs.frechet import frechet_distance
        >>> x = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])
        >>> round(frechet_distance(x, x + 3), 6)  # moved by 3 along each of two axes
        18.0
    """
    if one.ndim != 2 or other.ndim != 2 or one.shape[1] != other.shape[1] or min(len(one), len(other)) < 2:
        raise ValueError(
            f"frechet: got features {tuple(one.shape)}, {tuple(other.shape)}, expected (N, E) and (M, E), N, M >= 2"
        )
    return _distance(*_moments(one.double()), *_moments(other.double()))


def frechet(one: Tensor, other: Tensor, num_groups: int = 20) -> Frechet:
    """The distance with a 95 % interval, by leaving out a group of features at a time (the jackknife).

    A bootstrap would not do: it draws features twice, and sets with repeated features are farther apart.

    Args:
        one, other: features, see `frechet_distance`; in random order.
        num_groups: into how many groups each set falls; fewer where there are fewer features.

    References:
        Efron and Stein, The Jackknife Estimate of Variance, Annals of Statistics, 1981.
    """
    check_counts(num_groups=num_groups)
    distance = frechet_distance(one, other)
    x_NE, y_ME = one.double(), other.double()
    variance, freedom = 0.0, num_groups
    for left, fixed in ((x_NE, y_ME), (y_ME, x_NE)):
        groups = min(num_groups, len(left) // 2)
        if groups < 2:
            return Frechet(distance, 0.0, float("inf"))
        freedom = min(freedom, groups - 1)
        of_fixed, number_N = _moments(fixed), torch.arange(len(left)) % groups
        found = torch.tensor([_distance(*_moments(left[number_N != g]), *of_fixed) for g in range(groups)])
        variance += (groups - 1) / groups * float((found - found.mean()).square().sum())
    half = float(stats.t.ppf(0.975, freedom)) * variance**0.5
    return Frechet(distance, max(0.0, distance - half), distance + half)


def _moments(x_NE: Tensor) -> tuple[Tensor, Tensor]:
    return x_NE.mean(0), torch.atleast_2d(torch.cov(x_NE.T))


def _distance(mean: Tensor, cov: Tensor, other_mean: Tensor, other_cov: Tensor) -> float:
    """The trace of (C C')^(1/2) is that of the symmetric (R C' R)^(1/2), R being the root of C."""
    value_E, vector_EE = torch.linalg.eigh(cov)
    root_EE = vector_EE * value_E.clamp_min(0).sqrt() @ vector_EE.T
    cross_E = torch.linalg.eigvalsh(root_EE @ other_cov @ root_EE).clamp_min(0).sqrt()
    found = (mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * cross_E.sum()
    return max(0.0, float(found))

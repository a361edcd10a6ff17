"""Families of input distributions in NumPy: values, and what an M-step needs.

Shapes: K units, B examples, C values, T statistics.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

import lvd_lightning.circuits as pc

__all__ = ["expectations", "functions_of", "is_table", "logistic_edges", "most_likely", "prior_counts", "table_of"]

Array = NDArray[Any]


def is_table(node: pc.Node) -> bool:
    """Sums and categories: parameters are probabilities, and a row of flows says all."""
    return node.kind == "sum" or isinstance(node.distribution, pc.Categorical)


def prior_counts(family: pc.Distribution | None, flow: Array) -> Array:
    """What the smooth prior of an ordered categorical adds to flows (K, C); nothing of any other family, or of sums."""
    if not isinstance(family, pc.OrderedCategorical):
        return np.zeros(flow.shape)
    out = np.zeros(flow.shape)
    values = np.arange(family.num_categories)
    for value in values:
        near = np.exp(-0.5 * ((values - value) / family.width) ** 2) * (abs(values - value) < 4 * family.width + 1)
        total = flow.sum(1)
        amount = family.share * total + family.constant
        out += np.outer(amount * flow[:, value] / np.where(total > 0, total, 1), near / near.sum())
    return out


def logistic_edges(values: Array, mean: Array, scale: Array, num_values: int) -> tuple[Array, Array]:
    """Standardised edges of the bins of some values; those of the first and last value are infinite."""
    low = np.where(values > 0, values - 0.5, -np.inf)
    high = np.where(values < num_values - 1, values + 0.5, np.inf)
    return (low - mean) / scale, (high - mean) / scale


def edges_of(distribution: pc.Distribution, values: Array, params: Array) -> tuple[Any, Array, Array]:
    """The standard density behind a discretised family, and the edges of the bins of some values."""
    law = stats.norm if isinstance(distribution, pc.DiscretizedGaussian) else stats.logistic
    low, high = logistic_edges(values, params[:, :1], params[:, 1:], distribution.num_values)
    return law, low, high


def table_of(distribution: pc.Distribution, params: Array) -> Array:
    """p(value | unit) of all values of a discrete distribution, shape (K, C)."""
    if isinstance(distribution, pc.Binomial):
        return stats.binom.pmf(np.arange(distribution.total + 1), distribution.total, params)
    if isinstance(distribution, pc.DiscretizedLogistic | pc.DiscretizedGaussian):
        law, low, high = edges_of(distribution, np.arange(distribution.num_values), params)
        return np.where(low > 0, law.sf(low) - law.sf(high), law.cdf(high) - law.cdf(low))
    return params


def functions_of(distribution: pc.Distribution, params: Array, x: Array) -> Array:
    """The functions of x (B,) whose sums an M-step needs, shape (T - 1, B); `params` of one unit.

    A rounded normal variable y has the moments of a truncated one given the bin of y.

    A logistic variable y is normal with a random precision r / scale^2: expectations of (r, r y, r y^2) given the bin
    of y. E[r | y] is -f'(z) / (z f(z)) for the density f of z, so those of r z and r z^2 are integrals of -f' and
    -z f' over the bin; that of r is replaced by a bound, its value at the z of the bin next to 0.
    """
    if isinstance(distribution, pc.Binomial):
        return np.stack([x])
    if isinstance(distribution, pc.Gaussian):
        return np.stack([x, x**2])
    mean, scale = params
    if isinstance(distribution, pc.DiscretizedGaussian):
        _, low, high = edges_of(distribution, x, params[None])
        first, variance = (row[0] for row in stats.truncnorm.stats(low, high, loc=mean, scale=scale, moments="mv"))
        return np.stack([first, variance + first**2])
    low, high = logistic_edges(x, mean, scale, distribution.num_values)
    mass = table_of(distribution, params[None])[0][x.astype(int)]
    at_low, at_high = stats.logistic.pdf(low), stats.logistic.pdf(high)
    times_low, times_high = (np.where(np.isfinite(z), z, 0) * f for z, f in ((low, at_low), (high, at_high)))
    first, second = (at_low - at_high) / mass, 1 + (times_low - times_high) / mass
    nearest = np.clip(0, low, high)
    bound = np.where(nearest == 0, 0.5, np.tanh(nearest / 2) / np.where(nearest == 0, 1, nearest))
    return np.stack(
        [bound, mean * bound + scale * first, mean**2 * bound + 2 * mean * scale * first + scale**2 * second]
    )


def expectations(distribution: pc.Distribution, params: Array) -> Array:
    """What `functions_of` are on average, shape (K, T - 1)."""
    if isinstance(distribution, pc.Binomial):
        return distribution.total * params
    mean, spread = params.T
    if isinstance(distribution, pc.Gaussian | pc.DiscretizedGaussian):
        return np.stack([mean, spread**2 + mean**2], 1)
    precision = 3.5 * special.zeta(3) / np.pi**2
    return np.stack([np.full_like(mean, precision), precision * mean, precision * mean**2 + spread**2], 1)


def most_likely(distribution: pc.Distribution, moments: Array) -> Array:
    """The parameters under which these expectations are most likely, within their bounds."""
    if isinstance(distribution, pc.Binomial):
        return np.clip(moments / distribution.total, distribution.min_prob, 1 - distribution.min_prob)
    if isinstance(distribution, pc.Gaussian):
        mean = moments[:, 0]
        return np.stack([mean, np.sqrt(np.maximum(moments[:, 1] - mean**2, distribution.min_std**2))], 1)
    if isinstance(distribution, pc.DiscretizedGaussian):
        mean = np.clip(moments[:, 0], -distribution.num_values, 2 * distribution.num_values)
        std = np.sqrt(np.maximum(moments[:, 1] - 2 * mean * moments[:, 0] + mean**2, 0))
        return np.stack([mean, np.clip(std, distribution.min_std, 100 * distribution.num_values)], 1)
    mean = np.clip(moments[:, 1] / moments[:, 0], -distribution.num_values, 2 * distribution.num_values)
    variance = moments[:, 2] - 2 * mean * moments[:, 1] + mean**2 * moments[:, 0]
    scale = np.sqrt(np.maximum(variance, 0))
    return np.stack([mean, np.clip(scale, distribution.min_scale, 100 * distribution.num_values)], 1)

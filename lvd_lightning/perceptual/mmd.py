"""Maximum mean discrepancy: how far samples are from data, by a mixture of kernels.

Shapes: N samples, M data, E numbers of each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["WIDTHS", "mmd"]

#: Widths of the kernels, as multiples of the mean squared distance of two data.
WIDTHS = (0.1, 0.3, 1.0, 3.0)


def mmd(samples: Tensor, data: Tensor, widths: Sequence[float] = WIDTHS) -> Tensor:
    r"""The squared maximum mean discrepancy of two sets of vectors, an estimate without bias; it may be below 0.

    The kernel is the mean over `widths` w of exp(-|x - y|^2 / (w s)), s being the mean squared distance of two data: so
    it has no unit, and gradients flow into the samples alone.

    Args:
        samples: (N, ...), two or more; data: (M, ...), two or more, of the same shape but for the first dimension.
        widths: each above 0.

    Raises:
        ValueError: fewer than two samples or data, or other shapes.

    References:
        Gretton, Borgwardt, Rasch, Schoelkopf, Smola, A Kernel Two-Sample Test, JMLR 2012, lemma 6.

    Example:
        >>> import torch
        >>> generator = torch.Generator().manual_seed(0)
        >>> data = torch.randn(200, 3, generator=generator)
        >>> alike, apart = torch.randn(200, 3, generator=generator), torch.randn(200, 3, generator=generator) + 1
        >>> bool(mmd(alike, data).abs() < 0.02), bool(mmd(apart, data) > 0.1)
        (True, True)
    """
    if samples.shape[1:] != data.shape[1:] or min(len(samples), len(data)) < 2:
        raise ValueError(
            f"mmd: got samples {tuple(samples.shape)} and data {tuple(data.shape)}, expected two or more of each, of "
            "one shape"
        )
    x_NE, y_ME = samples.flatten(1), data.detach().flatten(1).to(samples.dtype)
    yy_MM = _squared_distances(y_ME, y_ME)
    num_pairs = len(y_ME) * (len(y_ME) - 1)
    scale = (yy_MM.sum() / num_pairs).clamp_min(torch.finfo(yy_MM.dtype).tiny)
    found = x_NE.new_zeros(())
    xx_NN, xy_NM = _squared_distances(x_NE, x_NE), _squared_distances(x_NE, y_ME)
    for width in widths:
        of_samples, of_data = (_mean_off_diagonal((-d / (width * scale)).exp()) for d in (xx_NN, yy_MM))
        found = found + of_samples + of_data - 2 * (-xy_NM / (width * scale)).exp().mean()
    return found / len(widths)


def _squared_distances(x_NE: Tensor, y_ME: Tensor) -> Tensor:
    """(N, M); rounding may not make them negative."""
    square_N1, square_1M = x_NE.square().sum(1, keepdim=True), y_ME.square().sum(1)[None]
    return (square_N1 + square_1M - 2 * x_NE @ y_ME.T).clamp_min(0.0)


def _mean_off_diagonal(kernel_NN: Tensor) -> Tensor:
    count = len(kernel_NN)
    return (kernel_NN.sum() - kernel_NN.diagonal().sum()) / (count * (count - 1))

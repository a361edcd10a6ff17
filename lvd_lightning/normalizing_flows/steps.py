"""The invertible steps of Glow.

Scales are bounded from both sides, smoothly: exp(limit tanh(raw / limit)). A scale near zero is what makes samples of
other implementations infinite (normflows, issue 67); here a step never stretches by more than exp(limit), either way.

Shapes: B images, C channels, H x W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from lvd_lightning.checks import check_counts, expect

__all__ = ["ActNorm", "AffineCoupling", "GlowStep", "InvertibleConvolution", "bounded"]

#: Bounds of the logarithms of scales. A channel of bytes in [-0.5, 0.5] that is all noise needs exp(6.8).
NORM_LIMIT, CONVOLUTION_LIMIT, COUPLING_LIMIT = 8.0, 4.0, 2.0


def bounded(raw: Tensor, limit: float) -> Tensor:
    """limit tanh(raw / limit): about the number itself, and never beyond the limit.

    Example:
        >>> [round(value, 3) for value in bounded(torch.tensor([-100.0, 0.1, 2.0]), 2.0).tolist()]
        [-2.0, 0.1, 1.523]
    """
    return limit * torch.tanh(raw / limit)


class ActNorm(nn.Module):
    """y = (x + shift) exp(log-scale) for every channel; `start_from` makes y standard on given images.

    Args:
        num_channels: C.

    References:
        Kingma and Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, 2018 (arXiv 1807.03039), section
        3.1.
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(num_channels, 1, 1))
        self.raw_scale = nn.Parameter(torch.zeros(num_channels, 1, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to images, and log |det| with shape ()."""
        log_scale = bounded(self.raw_scale, NORM_LIMIT)
        return (x + self.shift) * log_scale.exp(), log_scale.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        return y * (-bounded(self.raw_scale, NORM_LIMIT)).exp() - self.shift

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Let every channel of these images have mean 0 and variance 1."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3), correction=0)
        log_scale = -std.clamp_min(1e-3).log()
        self.shift.copy_(-mean[:, None, None])
        self.raw_scale.copy_((NORM_LIMIT * torch.atanh(log_scale / NORM_LIMIT))[:, None, None])


class InvertibleConvolution(nn.Module):
    """A 1x1 convolution with W = P L (U + diag(s)): P a fixed permutation, L and U unit triangular, s of fixed signs.

    Args:
        num_channels: C.
        generator: of the random rotation that W begins as.

    References:
        Kingma and Dhariwal, 2018, section 3.2 and equation 10.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, num_channels: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        check_counts(num_channels=num_channels)
        normal = torch.randn(num_channels, num_channels, generator=generator, dtype=torch.float64)
        permutation, lower, upper = torch.linalg.lu(torch.linalg.qr(normal).Q)
        diagonal, dtype = upper.diagonal(), torch.get_default_dtype()
        self.register_buffer("permutation", permutation.argmax(1))  # row i of W is row permutation[i] of L (U + s)
        self.register_buffer("sign", diagonal.sign().to(dtype))
        log_scale = diagonal.abs().log().clamp(-0.9 * CONVOLUTION_LIMIT, 0.9 * CONVOLUTION_LIMIT)
        raw = CONVOLUTION_LIMIT * torch.atanh(log_scale / CONVOLUTION_LIMIT)
        self.lower = nn.Parameter(lower.tril(-1).to(dtype))
        self.upper = nn.Parameter(upper.triu(1).to(dtype))
        self.raw_scale = nn.Parameter(raw.to(dtype))

    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """L, U + diag(s), and log |s|."""
        log_scale = bounded(self.raw_scale, CONVOLUTION_LIMIT)
        lower = self.lower.tril(-1) + torch.eye(len(log_scale), dtype=log_scale.dtype, device=log_scale.device)
        return lower, self.upper.triu(1) + torch.diag(self.sign * log_scale.exp()), log_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to images, and log |det| with shape ()."""
        lower, upper, log_scale = self.factors()
        weight = (lower @ upper)[self.permutation]
        return conv2d(x, weight[:, :, None, None]), log_scale.sum() * x.shape[2] * x.shape[3]

    def inverse(self, y: Tensor) -> Tensor:
        lower, upper, _ = (factor.double() for factor in self.factors())  # solved in double: an inverse of many steps
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        permuted = identity[:, self.permutation]  # the inverse of the permutation of rows
        half = torch.linalg.solve_triangular(lower, permuted, upper=False, unitriangular=True)
        weight = torch.linalg.solve_triangular(upper, half, upper=True).to(y.dtype)
        return conv2d(y, weight[:, :, None, None])


class AffineCoupling(nn.Module):
    """Half of the channels is shifted and scaled by what a small network says of the other half.

    The network's last convolution begins at zero, so that the step begins as the identity.

    Args:
        num_channels: C, at least 2; the first half is read.
        hidden_size: channels of the network.
        num_context: channels of an image that the network reads besides.

    References:
        Dinh, Sohl-Dickstein and Bengio, Density estimation using Real NVP, 2017 (arXiv 1605.08803), section 3.2.
    """

    def __init__(self, num_channels: int, hidden_size: int, num_context: int = 0) -> None:
        super().__init__()
        check_counts(hidden_size=hidden_size)
        expect(num_channels >= 2, "num_channels", num_channels, "2 or more, so that there are two halves")
        self.num_read = num_channels // 2
        self.body = nn.Sequential(
            nn.Conv2d(self.num_read + num_context, hidden_size, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(hidden_size, hidden_size, 1),
            nn.ReLU(),
        )
        self.last = nn.Conv2d(hidden_size, 2 * (num_channels - self.num_read), 3, padding=1)
        nn.init.zeros_(self.last.weight)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W), and a context with as many pixels, to images and log |det| with shape (B,)."""
        read, changed = x[:, : self.num_read], x[:, self.num_read :]
        shift, log_scale = self._shift_and_log_scale(read, context)
        return torch.cat([read, (changed + shift) * log_scale.exp()], 1), log_scale.flatten(1).sum(1)

    def inverse(self, y: Tensor, context: Tensor | None = None) -> Tensor:
        read, changed = y[:, : self.num_read], y[:, self.num_read :]
        shift, log_scale = self._shift_and_log_scale(read, context)
        return torch.cat([read, changed * (-log_scale).exp() - shift], 1)

    def activations(self, x: Tensor) -> Tensor:
        """What the network's last hidden layer says of images (B, C, H, W); with shape (B, hidden_size, H, W)."""
        found: Tensor = self.body(x[:, : self.num_read])
        return found

    def _shift_and_log_scale(self, read: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        seen = read if context is None else torch.cat([read, context], 1)
        shift, raw = self.last(self.body(seen)).to(read.dtype).chunk(2, 1)
        return shift, bounded(raw, COUPLING_LIMIT)


class GlowStep(nn.Module):
    """ActNorm, then a 1x1 convolution, then a coupling.

    Args:
        num_channels, hidden_size: see `AffineCoupling`.
        generator: see `InvertibleConvolution`.
    """

    def __init__(self, num_channels: int, hidden_size: int, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.norm = ActNorm(num_channels)
        self.convolution = InvertibleConvolution(num_channels, generator)
        self.coupling = AffineCoupling(num_channels, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, H, W) to images, and log |det| with shape (B,)."""
        x, of_norm = self.norm(x)
        x, of_convolution = self.convolution(x)
        x, of_coupling = self.coupling(x)
        return x, of_norm + of_convolution + of_coupling

    def inverse(self, y: Tensor) -> Tensor:
        return self.norm.inverse(self.convolution.inverse(self.coupling.inverse(y)))

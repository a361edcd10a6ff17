"""Glow: steps at several resolutions, with half of the channels done at each.

Shapes: B images, C channels, H x W pixels, L levels, K steps of a level.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from lvd_lightning.checks import check_counts
from lvd_lightning.normalizing_flows.flow_pass import FlowPass
from lvd_lightning.normalizing_flows.steps import COUPLING_LIMIT, GlowStep, bounded

__all__ = ["Glow", "GlowLevel", "Split"]


class Split(nn.Module):
    """The second half of the channels becomes a latent, standardised by what the first half says of it.

    Args:
        num_channels: C, an even number.

    References:
        Kingma and Dhariwal, 2018, section 3 (the split of Dinh et al., 2017, section 3.6, with a learned conditional
        prior as in their code).
    """

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.prior = nn.Conv2d(num_channels // 2, num_channels, 3, padding=1)
        nn.init.zeros_(self.prior.weight)
        assert self.prior.bias is not None
        nn.init.zeros_(self.prior.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) to those that go on, a latent, both (B, C / 2, H, W), and log |det| with shape (B,)."""
        kept, done = x.chunk(2, 1)
        mean, log_scale = self._mean_and_log_scale(kept)
        return kept, (done - mean) * (-log_scale).exp(), -log_scale.flatten(1).sum(1)

    def inverse(self, kept: Tensor, latent: Tensor) -> Tensor:
        mean, log_scale = self._mean_and_log_scale(kept)
        return torch.cat([kept, latent * log_scale.exp() + mean], 1)

    def _mean_and_log_scale(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = self.prior(kept).to(kept.dtype).chunk(2, 1)
        return mean, bounded(raw, COUPLING_LIMIT)


class GlowLevel(nn.Module):
    """Squares of four pixels become channels of one, then K steps, then a split except at the last level."""

    def __init__(
        self, num_channels: int, num_steps: int, hidden_size: int, is_last: bool, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.steps = nn.ModuleList(GlowStep(4 * num_channels, hidden_size, generator) for _ in range(num_steps))
        self.split = None if is_last else Split(4 * num_channels)


class Glow(nn.Module):
    """A multi-scale flow of images.

    Args:
        image_shape: (C, H, W); H and W are multiples of 2^L.
        num_steps: K, of every level.
        num_levels: L.
        hidden_size: channels of the networks of couplings.
        generator: of the rotations that convolutions begin as.

    Raises:
        ValueError: sizes that are no positive whole numbers, or sides that cannot be halved so often.

    References:
        Kingma and Dhariwal, Glow: Generative Flow with Invertible 1x1 Convolutions, 2018 (arXiv 1807.03039).

    Example:
        >>> glow = Glow((3, 8, 8), num_steps=2, num_levels=2, hidden_size=4)
        >>> found = glow.encode(torch.randn(5, 3, 8, 8))
        >>> [tuple(z.shape) for z in found.latents], found.log_prob.shape
        ([(5, 6, 4, 4), (5, 24, 2, 2)], torch.Size([5]))
        >>> glow.decode(found.latents).shape
        torch.Size([5, 3, 8, 8])
    """

    def __init__(
        self,
        image_shape: Sequence[int],
        num_steps: int,
        num_levels: int,
        hidden_size: int,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_counts(num_steps=num_steps, num_levels=num_levels, hidden_size=hidden_size)
        channels, height, width = image_shape
        if height % 2**num_levels or width % 2**num_levels:
            raise ValueError(
                f"num_levels: got {num_levels} for images of {height} x {width}, expected sides that can be halved so "
                "often: choose fewer levels or another image size"
            )
        self.image_shape = (channels, height, width)
        self.levels = nn.ModuleList(
            GlowLevel(channels * 2**level, num_steps, hidden_size, level == num_levels - 1, generator)
            for level in range(num_levels)
        )

    @property
    def latent_shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parts of a latent, without B: one of every level."""
        channels, height, width = self.image_shape
        shapes: list[tuple[int, ...]] = []
        last = len(self.levels) - 1
        for level in range(last + 1):
            halves = 2 ** (level + 1)
            shapes.append((channels * halves * (2 if level == last else 1), height // halves, width // halves))
        return shapes

    @property
    def data_scale(self) -> float:
        """By what differences of images are told: as they are."""
        return 1.0

    def level_steps(self, level: int) -> list[GlowStep]:
        """The steps of a level, in order."""
        return list(self._level(level).steps)  # type: ignore[arg-type]

    def encode(self, x: Tensor) -> FlowPass:
        """Images (B, C, H, W) of real numbers to latents, one part of every level."""
        latents, hidden, log_det = [], [], x.new_zeros(len(x))
        for number in range(len(self.levels)):
            level = self._level(number)
            x = pixel_unshuffle(x, 2)
            for step in level.steps:
                x, of_step = step(x)
                log_det = log_det + of_step
            hidden.append(x)
            if level.split is None:
                latents.append(x)
            else:
                x, latent, of_split = level.split(x)
                latents.append(latent)
                log_det = log_det + of_split
        return FlowPass(latents, hidden, log_det)

    def decode(self, latents: Sequence[Tensor]) -> Tensor:
        """The inverse: latents to images (B, C, H, W) of real numbers."""
        x = latents[-1]
        for number in reversed(range(len(self.levels))):
            level = self._level(number)
            if level.split is not None:
                x = level.split.inverse(x, latents[number])
            for step in reversed(list(level.steps)):
                assert isinstance(step, GlowStep)
                x = step.inverse(x)
            x = pixel_shuffle(x, 2)
        return x

    @torch.no_grad()
    def start_from(self, x: Tensor) -> None:
        """Let every step see standard channels, on some images (B, C, H, W) of real numbers; before training."""
        for step, seen in self._inputs(x):
            step.norm.start_from(seen)

    def _inputs(self, x: Tensor) -> Iterator[tuple[GlowStep, Tensor]]:
        """Every step with what it is given; whoever asks may change the step first."""
        for number in range(len(self.levels)):
            level = self._level(number)
            x = pixel_unshuffle(x, 2)
            for step in level.steps:
                assert isinstance(step, GlowStep)
                yield step, x
                x = step(x)[0]
            if level.split is not None:
                x = level.split(x)[0]

    def _level(self, number: int) -> GlowLevel:
        level = self.levels[number]
        assert isinstance(level, GlowLevel)
        return level

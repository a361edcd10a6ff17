"""A learned encoder: what a network thinks of the latent values of an image's patches.

Shapes: B images, P patches, K latent values, C channels, p patch side.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lvd_lightning.checks import check_counts

__all__ = ["LatentEncoder"]


class LatentEncoder(nn.Module):
    """Images to log-likelihoods of latent values, which take the place of the conditionals' own in `reconstruct`.

    Every patch becomes a vector, which two convolutions over the grid of patches let see its neighbours.

    Args:
        image_shape: (C, H, W).
        patch_size: p, a divisor of both sides.
        num_states: K.
        channels: of the convolutions.

    Example:
        >>> import torch
        >>> LatentEncoder((3, 8, 8), patch_size=4, num_states=5, channels=8)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 4, 5])
    """

    def __init__(self, image_shape: tuple[int, int, int], patch_size: int, num_states: int, channels: int = 64) -> None:
        super().__init__()
        check_counts(channels=channels)
        self.layers = nn.Sequential(
            nn.Conv2d(image_shape[0], channels, patch_size, stride=patch_size),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(channels, num_states, 3, padding=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """(B, P, K) in nats; images (B, C, H, W) in -1..1."""
        raw_BKP: Tensor = self.layers(images).flatten(2)
        return log_softmax(raw_BKP, 1).transpose(1, 2)

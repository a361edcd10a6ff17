"""An adversary: a small network that tells samples from images, and what both sides of the game minimise.

Shapes: B images, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from lvd_lightning.checks import check_counts

__all__ = ["Discriminator", "adversary_loss", "sample_loss"]


class Discriminator(nn.Module):
    """Convolutions that halve the sides down to 4 pixels or fewer, then one number for an image: above 0 if it is real.

    Args:
        image_shape: (C, H, W).
        channels: of the first convolution; doubled with every halving, up to eight times.

    Example:
        >>> import torch
        >>> Discriminator((3, 32, 32), channels=8)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2])
    """

    def __init__(self, image_shape: tuple[int, int, int], channels: int = 32) -> None:
        super().__init__()
        check_counts(channels=channels)
        number, height, width = image_shape
        layers: list[nn.Module] = [nn.Conv2d(number, channels, 3, padding=1), nn.LeakyReLU(0.2)]
        wide = channels
        while max(height, width) > 4:
            narrow, wide = wide, min(2 * wide, 8 * channels)
            layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
            height, width = (height + 1) // 2, (width + 1) // 2
        self.layers = nn.Sequential(*layers)
        self.last = nn.Linear(wide * height * width, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B,), of images (B, C, H, W) in -1..1."""
        found: Tensor = self.last(self.layers(images).flatten(1))[:, 0]
        return found


def sample_loss(judged: Tensor) -> Tensor:
    """What samples minimise, given what the discriminator says of them, (B,): minus the mean log of being taken for
    real (Goodfellow et al., Generative Adversarial Nets, NeurIPS 2014, section 3).
    """
    return softplus(-judged).mean()


def adversary_loss(discriminator: nn.Module, samples: Tensor, images: Tensor, penalty: float) -> Tensor:
    """What the discriminator minimises: to be wrong about samples and images, and to be steep at the images (R1).

    Args:
        samples, images: (B, C, H, W) in -1..1; no gradient flows into them.
        penalty: R1's weight of half the mean squared gradient at the images.

    References:
        Mescheder, Geiger, Nowozin, Which Training Methods for GANs do actually Converge?, ICML 2018, equation 9.
    """
    images = images.detach().requires_grad_(penalty > 0)
    real_B, drawn_B = discriminator(images), discriminator(samples.detach())
    loss = softplus(-real_B).mean() + softplus(drawn_B).mean()
    if penalty > 0:
        (slope,) = torch.autograd.grad(real_B.sum(), images, create_graph=True)
        loss = loss + penalty / 2 * slope.square().flatten(1).sum(1).mean()
    return loss

"""From whole numbers to real ones: noise that makes the density of a flow a bound of a probability.

With u in [0, 1) per dimension and any q(u | x), Jensen's inequality gives
log P(x) >= E_q[log p(x + u) - log q(u | x)]; P(x) is the integral of p over x + [0, 1)^D.

Shapes: B images, C channels, H x W pixels.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, pixel_shuffle, pixel_unshuffle

from lvd_lightning.checks import check_choice, check_counts
from lvd_lightning.normalizing_flows.flow_pass import standard_normal
from lvd_lightning.normalizing_flows.steps import AffineCoupling

__all__ = ["DEQUANTIZATIONS", "Dequantizer"]

DEQUANTIZATIONS = ("uniform", "variational")

# Couplings that make normal noise the noise of variational dequantisation, and the channels of their networks.
NUM_COUPLINGS = 4


class Dequantizer(nn.Module):
    """Images of whole numbers 0..n-1 plus noise, spread over [-0.5, 0.5).

    Args:
        kind: "uniform", or "variational": q is a flow that looks at the image, which is learned with the flow and makes
            the bound tighter.
        image_shape: (C, H, W); even sides for "variational".
        num_categories: n of every channel.
        hidden_size: channels of the networks of a variational q.

    References:
        uniform: Theis, van den Oord and Bethge, A note on the evaluation of generative models, 2016 (arXiv 1511.01844),
        section 3.1; variational: Ho et al., Flow++, 2019 (arXiv 1902.00275), section 3.1.

    Example:
        >>> dequantizer = Dequantizer("uniform", (1, 2, 2), [16], hidden_size=4)
        >>> x, log_weight = dequantizer(torch.full((3, 1, 2, 2), 15))
        >>> bool((x >= 15 / 16 - 0.5).all()), log_weight.tolist() == [-4 * math.log(16)] * 3
        (True, False)
        >>> round(float(log_weight[0]) / math.log(16), 5)
        -4.0
    """

    sizes: Tensor

    def __init__(
        self, kind: str, image_shape: Sequence[int], num_categories: Sequence[int], hidden_size: int = 32
    ) -> None:
        super().__init__()
        check_choice(DEQUANTIZATIONS, dequantization=kind)
        check_counts(hidden_size=hidden_size)
        channels, height, width = image_shape
        sizes = torch.tensor(num_categories, dtype=torch.get_default_dtype())[:, None, None]
        self.register_buffer("sizes", sizes, persistent=False)
        self.log_volume = -height * width * sum(math.log(number) for number in num_categories)
        self.look: nn.Module | None = None
        if kind == "variational":
            if height % 2 or width % 2:
                raise ValueError(
                    f"dequantization: variational needs even sides, got images of {height} x {width}: take uniform"
                )
            self.look = nn.Sequential(nn.Conv2d(4 * channels, hidden_size, 3, padding=1), nn.ReLU())
            self.couplings = nn.ModuleList(
                AffineCoupling(4 * channels, hidden_size, hidden_size) for _ in range(NUM_COUPLINGS)
            )

    def forward(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Add noise to images (B, C, H, W) of whole numbers.

        Args:
            generator: of the noise, drawn on its device.

        Returns:
            x (B, C, H, W) in [-0.5, 0.5), and log |dx/du| - log q(u | image) in nats, with shape (B,): added to
            log p(x) it gives a bound of the log-probability of the image, on average over the noise.
        """
        dtype = self.sizes.dtype
        device = images.device if generator is None else generator.device
        if self.look is None:
            noise = torch.rand(images.shape, generator=generator, device=device, dtype=dtype).to(images.device)
            return (images + noise) / self.sizes - 0.5, noise.new_full((len(images),), self.log_volume)
        normal = torch.randn(images.shape, generator=generator, device=device, dtype=dtype).to(images.device)
        noise, log_q_B = self._noise(images, normal)
        return (images + noise) / self.sizes - 0.5, self.log_volume - log_q_B

    def levels(self, x: Tensor) -> Tensor:
        """The whole numbers that real ones (B, C, H, W) lie above, within 0..n-1; not finite ones are 0."""
        found = torch.nan_to_num((x + 0.5) * self.sizes, 0.0, 0.0, 0.0).floor()
        highest = int(self.sizes.max()) - 1
        kind = torch.uint8 if highest < 256 else torch.int16 if highest < 1 << 15 else torch.int32
        return torch.minimum(found.clamp_min(0), self.sizes - 1).to(kind)

    def _noise(self, images: Tensor, normal: Tensor) -> tuple[Tensor, Tensor]:
        """u (B, C, H, W) in (0, 1), and log q(u | image) in nats, with shape (B,)."""
        assert self.look is not None
        context = self.look(pixel_unshuffle((images + 0.5) / self.sizes - 0.5, 2))
        y, log_q_B = pixel_unshuffle(normal, 2), standard_normal([normal])
        for coupling in self.couplings:
            y, log_det_B = coupling(y.flip(1), context)
            log_q_B = log_q_B - log_det_B
        y = pixel_shuffle(y, 2)
        log_q_B = log_q_B - (logsigmoid(y) + logsigmoid(-y)).flatten(1).sum(1)
        return torch.sigmoid(y), log_q_B

"""A flow of images of whole numbers: Glow after dequantisation, a teacher and a model with a bound of its likelihood.

Shapes: B images, C channels, H x W pixels, P patches, p patch side, E features.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lvd_lightning.checks import check_above, check_choice, check_counts
from lvd_lightning.normalizing_flows import Dequantizer, Glow
from lvd_lightning.normalizing_flows.flow_pass import FlowPass, draw_latents

__all__ = ["FEATURES", "ImageFlow"]

FEATURES = ("latents", "hidden")


class ImageFlow(nn.Module):
    """Glow on images plus noise; log P(image) is bounded from below by the density, on average over the noise.

    Its features of a patch of side p are those of the level whose grid is that of the patches, log2(p) levels down, of
    the image with noise 0.5: "latents" are what that level hands to the latent and to the next level, "hidden" the
    activations in the network of its last coupling. Both know of neighbouring patches.

    Args:
        image_shape: (C, H, W).
        num_steps, num_levels, hidden_size: see `Glow`.
        dequantization: "uniform" or "variational", see `Dequantizer`.
        patch_size: p, for the features alone.
        num_categories: values of a pixel, one number or one for each channel.
        feature: one of `FEATURES`.
        generator: of the rotations that convolutions begin as.

    References:
        see `Glow` and `Dequantizer`.

    Example:
        >>> flow = ImageFlow((3, 8, 8), num_steps=1, num_levels=2, hidden_size=4)
        >>> images = torch.randint(256, (5, 3, 8, 8))
        >>> flow.log_prob(images).shape, flow.features(images).shape
        (torch.Size([5]), torch.Size([5, 4, 24]))
        >>> flow.sample(2, temperature=0.7).dtype
        torch.uint8
    """

    #: See `lvd_lightning.teachers`.
    contextual = False
    positional = False
    #: Draws of the noise behind `log_prob` and `elbo`.
    num_draws = 1

    def __init__(
        self,
        image_shape: Sequence[int],
        num_steps: int = 8,
        num_levels: int = 3,
        hidden_size: int = 64,
        dequantization: str = "uniform",
        *,
        patch_size: int = 4,
        num_categories: int | Sequence[int] = 256,
        feature: str = "latents",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check_choice(FEATURES, feature=feature)
        channels = image_shape[0]
        numbers = [num_categories] * channels if isinstance(num_categories, int) else list(num_categories)
        self.init_args: dict[str, Any] = {
            "image_shape": list(image_shape),
            "num_steps": num_steps,
            "num_levels": num_levels,
            "hidden_size": hidden_size,
            "dequantization": dequantization,
            "patch_size": patch_size,
            "num_categories": numbers,
            "feature": feature,
        }
        self.image_shape = tuple(image_shape)
        self.patch_size = patch_size
        self.feature = feature
        self.flow = Glow(image_shape, num_steps, num_levels, hidden_size, generator)
        self.dequantizer = Dequantizer(dequantization, image_shape, numbers)

    @property
    def num_parameters(self) -> int:
        """Parameters that are trained."""
        return sum(parameter.numel() for parameter in self.parameters())

    def continuous(self, images: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Images with noise, (B, C, H, W) in [-0.5, 0.5), and what their density is multiplied by, log, shape (B,).

        Raises:
            ValueError: images of another shape, or no whole numbers.
        """
        if images.is_floating_point() or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images: got {images.dtype} with shape {tuple(images.shape)}, expected whole numbers with shape "
                f"(B, {', '.join(map(str, self.image_shape))})"
            )
        found: tuple[Tensor, Tensor] = self.dequantizer(images, generator)
        return found

    @torch.no_grad()
    def start_from(self, images: Tensor, generator: torch.Generator | None = None) -> None:
        """Standardise what the steps see on some images (B, C, H, W), before training."""
        self.flow.start_from(self.continuous(images, generator)[0])

    @torch.no_grad()
    def log_prob_bound(self, images: Tensor, num_draws: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """E_u[log p(x + u) - log q(u | x)] <= log P(x) in nats, with shape (B,), over `num_draws` of the noise."""
        return self._draws(images, num_draws, generator).mean(0)

    @torch.no_grad()
    def importance_weighted_bound(
        self, images: Tensor, num_draws: int = 100, generator: torch.Generator | None = None
    ) -> Tensor:
        """log of the mean of p(x + u) / q(u | x) over `num_draws`: on average between the bound and log P(x); (B,).

        References:
            Burda, Grosse and Salakhutdinov, Importance Weighted Autoencoders, 2016 (arXiv 1509.00519), equation 8.
        """
        log_DB = self._draws(images, num_draws, generator)
        log_count = torch.tensor(float(num_draws), dtype=log_DB.dtype, device=log_DB.device).log()
        return log_DB.logsumexp(0) - log_count

    def log_prob(self, images: Tensor) -> Tensor:
        """The bound with `num_draws` of the noise, the same whenever it is called for the same batch; shape (B,)."""
        return self.log_prob_bound(images, self.num_draws, torch.Generator(images.device).manual_seed(0))

    def elbo(self, images: Tensor) -> Tensor:
        """The same: dequantisation is inference of a latent, the noise."""
        return self.log_prob(images)

    @torch.no_grad()
    def features(self, images: Tensor, visible: Tensor | None = None) -> Tensor:
        """The features of every patch, with shape (B, P, E).

        Args:
            images: whole numbers with shape (B, C, H, W).
            visible: None: a flow sees whole images.

        Raises:
            ValueError: a flow without a level for patches of this size, or `visible` is given.
        """
        if visible is not None:
            raise ValueError(
                f"visible: got shape {tuple(visible.shape)}, expected None: a flow encodes whole images (set "
                "latents.context to none)"
            )
        return self._of_patches(self.flow.encode((images + 0.5) / self.dequantizer.sizes - 0.5))

    def activations(self, scaled: Tensor) -> list[Tensor]:
        """What the last coupling of every level makes of images, each (B, places, channels), features last; with
        gradients.

        Args:
            scaled: floating point images (B, C, H, W) in [-1, 1].
        """
        sizes = self.dequantizer.sizes
        found = self.flow.encode(((scaled + 1) * (sizes - 1) / 2 + 0.5) / sizes - 0.5)
        layers = [self._of_coupling(found, level).flatten(2).transpose(1, 2) for level in range(len(found.hidden))]
        return [*layers, self._of_patches(found)]

    @torch.no_grad()
    def sample(self, num_samples: int, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Images of whole numbers (num_samples, C, H, W): latents have the standard deviation `temperature`."""
        check_counts(num_samples=num_samples)
        check_above(0, temperature=temperature)
        like = self.dequantizer.sizes
        parts = []
        for count in _sizes(num_samples):
            z = draw_latents(self.flow.latent_shapes, count, temperature, like, generator)
            parts.append(self.dequantizer.levels(self.flow.decode(z)))
        return torch.cat(parts)

    def _of_patches(self, found: FlowPass) -> Tensor:
        """The features (B, P, E) at the level whose grid is that of the patches."""
        level, num_levels = self.patch_size.bit_length() - 2, len(self.flow.levels)
        if self.patch_size != 2 ** (level + 1) or not 0 <= level < num_levels:
            sides = ", ".join(str(2 ** (number + 1)) for number in range(num_levels))
            raise ValueError(
                f"patch_size: got {self.patch_size}, but the {num_levels} levels of the flow have patches of side "
                f"{sides}: choose one of these, or another number of levels"
            )
        seen = found.hidden[level]
        if self.feature == "hidden":
            seen = self._of_coupling(found, level)
        elif level < num_levels - 1:
            seen = torch.cat([seen[:, : seen.shape[1] // 2], found.latents[level]], 1)
        return seen.flatten(2).transpose(1, 2)

    def _of_coupling(self, found: FlowPass, level: int) -> Tensor:
        """The activations in the last coupling of a level, which leaves what it reads as it was; (B, hidden, H, W)."""
        return self.flow.level_steps(level)[-1].coupling.activations(found.hidden[level])

    def _draws(self, images: Tensor, num_draws: int, generator: torch.Generator | None) -> Tensor:
        """log p(x + u) - log q(u | x) in nats of every draw, with shape (draws, B)."""
        check_counts(num_draws=num_draws)
        found = []
        for _ in range(num_draws):
            x, log_weight_B = self.continuous(images, generator)
            found.append(self.flow.encode(x).log_prob + log_weight_B)
        return torch.stack(found)


def _sizes(count: int, largest: int = 64) -> list[int]:
    """`count` as a sum of batches, in order."""
    return [min(largest, count - start) for start in range(0, count, largest)]

"""Pixels as networks want them: whole numbers of every channel spread over [-1, 1].

Shapes: B images, C channels, H x W pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lvd_lightning.checks import expect

__all__ = ["PixelScale", "image_sides"]


class PixelScale:
    """Maps the values 0..n-1 of a channel to [-1, 1] and back.

    Args:
        image_shape: (C, H, W), what images have to have.
        num_categories: n, one number or one for each channel.

    Raises:
        ValueError: fewer than two values, or not one number per channel.

    Example:
        >>> scale = PixelScale((1, 1, 3), 17)
        >>> scale.floats(torch.tensor([0, 8, 16]).view(1, 1, 1, 3), torch.float32).flatten().tolist()
        [-1.0, 0.0, 1.0]
    """

    def __init__(self, image_shape: tuple[int, int, int], num_categories: int | Sequence[int]) -> None:
        channels = image_shape[0]
        numbers = [num_categories] * channels if isinstance(num_categories, int) else list(num_categories)
        fits = len(numbers) == channels and min(numbers) >= 2
        expect(fits, "num_categories", num_categories, "2 or more, or one such for each channel")
        self.image_shape = image_shape
        self.num_categories = numbers
        # One number where channels are alike, which is what most images have.
        self._half: float | list[float] = [(number - 1) / 2 for number in numbers]
        if len(set(numbers)) == 1:
            self._half = (numbers[0] - 1) / 2

    @property
    def dtype(self) -> torch.dtype:
        """The smallest integer type that holds all values."""
        largest = max(self.num_categories)
        return torch.uint8 if largest <= 256 else torch.int16 if largest <= 1 << 15 else torch.int32

    @property
    def smallest_step(self) -> float:
        """The distance of neighbouring values of the channel with the most values."""
        return 2.0 / (max(self.num_categories) - 1)

    def floats(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Images (B, C, H, W) of whole numbers in [-1, 1].

        Raises:
            ValueError: images of another shape, or no whole numbers.
        """
        if images.is_floating_point() or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images: got {images.dtype} with shape {tuple(images.shape)}, expected whole numbers with shape "
                f"(B, {', '.join(map(str, self.image_shape))})"
            )
        wide = torch.promote_types(dtype, torch.float32)  # bfloat16 has no place for 511 values
        return self.spread(images.to(wide)).to(dtype)

    def spread(self, values: Tensor) -> Tensor:
        """Real-valued images (B, C, H, W), such as differentiable samples, from 0..n-1 to [-1, 1]; gradients flow."""
        return values / self._halves(values) - 1.0

    def levels(self, scaled: Tensor) -> Tensor:
        """The inverse for images (B, C, H, W) in about [-1, 1]: the nearest values, of `dtype`."""
        highest = torch.tensor(self.num_categories, device=scaled.device)[:, None, None] - 1
        levels = ((scaled + 1.0) * self._halves(scaled)).round()
        return torch.minimum(levels.clamp_min(0), highest).to(self.dtype)

    def _halves(self, like: Tensor) -> float | Tensor:
        if isinstance(self._half, float):
            return self._half
        return torch.tensor(self._half, device=like.device)[:, None, None]


def image_sides(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width: of square images one number says both."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return int(height), int(width)

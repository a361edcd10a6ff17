"""How pictures become the whole numbers that a circuit models, and back.

Shapes: N images, C channels, H x W pixels.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.color import COLORS, REGIONS, crop_region, decode_color, decode_mean, encode_color, is_lossy

__all__ = ["GREY", "ImageCodes"]

#: The code of one channel: levels of grey, evenly spread over 0..255.
GREY = "grey"


@dataclass(frozen=True)
class ImageCodes:
    """The code of pictures: colours by `lvd_lightning.color`, or levels of grey.

    Args:
        color: one of `lvd_lightning.color.COLORS`, or "grey".
        region: the part of a picture that is modelled, one of `lvd_lightning.color.REGIONS`.
        num_levels: of grey.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import torch
        >>> from lvd_lightning.use.codes import ImageCodes
        >>> codes = ImageCodes("grey", num_levels=17)
        >>> pixels = torch.tensor([0, 16, 255], dtype=torch.uint8).expand(1, 3, 1, 3)
        >>> codes.encode(pixels).flatten().tolist(), codes.is_exact(pixels).tolist()
        ([0, 1, 16], [True])
    """

    color: str = "rgb"
    region: str = "whole"
    num_levels: int = 256

    def __post_init__(self) -> None:
        check_choice((*COLORS, GREY), color=self.color)
        check_choice(REGIONS, region=self.region)
        check_counts(num_levels=self.num_levels)
        expect(2 <= self.num_levels <= 256, "num_levels", self.num_levels, "2 to 256")

    @classmethod
    def of_data(cls, data: Any) -> ImageCodes:
        """Those of a datamodule of images, which need not hold any yet.

        Raises:
            ValueError: its pictures are neither RGB nor grey.
        """
        if hasattr(data, "color"):
            return cls(data.color, data.region)
        numbers = data.parts.num_categories
        if len(numbers) != 1 or numbers[0] > 256:
            raise ValueError(
                f"{type(data).__name__}: its images have {len(numbers)} channels of {numbers} values; what is done "
                "with files of pictures is for RGB data modules and for grey ones of at most 256 levels"
            )
        return cls(GREY, num_levels=numbers[0])

    @property
    def is_grey(self) -> bool:
        return self.color == GREY

    @property
    def is_lossless(self) -> bool:
        """Whether every colour of a whole picture has a code of its own; levels of grey are looked at one by one."""
        return self.is_grey or (not is_lossy(self.color) and self.region == "whole")

    def picture_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Height and width of the pictures whose codes have the shape (C, H, W)."""
        times = 2 if self.region == "quadrant" else 1
        return times * shape[1], times * shape[2]

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes (N, C, H, W) of uint8 RGB (N, 3, H', W'); of a grey code the nearest level of each pixel's luma."""
        cropped = crop_region(pixels, self.region)
        if not self.is_grey:
            return encode_color(cropped, self.color)
        red, green, blue = cropped.long().unbind(1)
        luma = (299 * red + 587 * green + 114 * blue + 500) // 1000
        highest = self.num_levels - 1
        return ((2 * luma * highest + 255) // 510).to(torch.uint8)[:, None]

    def to_rgb(self, codes: Tensor) -> Tensor:
        """What a person sees: uint8 (N, 3, H, W) of codes (N, C, H, W), or of real-valued means of them."""
        if not self.is_grey:
            return (decode_mean if codes.is_floating_point() else decode_color)(codes, self.color)
        levels = (codes.double() * 255 / (self.num_levels - 1)).round().clamp(0, 255).to(torch.uint8)
        return levels.expand(-1, 3, -1, -1)

    def is_exact(self, pixels: Tensor) -> Tensor:
        """Which of uint8 RGB pictures (N, 3, H, W) come back from their codes as they were, bool (N,)."""
        if not self.is_lossless:
            return torch.zeros(len(pixels), dtype=torch.bool)
        return (self.to_rgb(self.encode(pixels)) == pixels).flatten(1).all(1)

    def spread(self, variance: Tensor) -> Tensor:
        """A standard deviation per pixel, (N, H, W), of variances of codes (N, C, H, W): that of the luma, in codes of
        its channel; of RGB and grey the root of the mean over channels."""
        if self.color in ("rgb", GREY):
            return variance.mean(1).sqrt()
        return variance[:, 0].sqrt()

    def plain(self) -> dict[str, Any]:
        """Plain values that make the same codes."""
        return asdict(self)

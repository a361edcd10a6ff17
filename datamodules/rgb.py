"""The frame of data modules whose images are square RGB bytes: colour and region are applied once."""

from typing import Any

from torch import Tensor
from typing_extensions import override

from datamodules.base import ImageDataModule
from datamodules.images import Pixels, encode_images
from lvd_lightning.checks import check_choice, check_counts, expect
from lvd_lightning.color import COLORS, REGIONS, decode_color, decode_mean, is_color, is_lossy, num_codes
from lvd_lightning.units import BitsPerDimension, Unit

__all__ = ["RGBDataModule"]


class RGBDataModule(ImageDataModule):
    """Square RGB images, colour-encoded and cropped.

    A subclass says where images come from in `load`, and gives them to `encode`.

    Args:
        image_size: the side of the images, in pixels.
        color: `rgb`, `ycocg_r` (reversible), `ycbcr_lossy` (only to reproduce published figures) or `ycocg_r_mod256`
            (only for runs that were begun with it); see `lvd_lightning.color.encode_color`.
        region: `whole`, or `quadrant` for the top-left quarter.
        **common: the settings of every `ImageDataModule`.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import numpy as np
        >>> from datamodules import RGBDataModule
        >>> class Black(RGBDataModule):
        ...     def load(self):
        ...         pixels = np.zeros((5, 3, self.image_size, self.image_size), dtype=np.uint8)
        ...         return {split: self.encode(pixels) for split in ("train", "val", "test")}
        >>> data = Black(image_size=8, region="quadrant")
        >>> data.setup()
        >>> data.images("train").shape, data.protocol
        (torch.Size([5, 3, 4, 4]), 'quadrant')
    """

    def __init__(self, image_size: int = 32, color: str = "ycocg_r", region: str = "whole", **common: Any) -> None:
        super().__init__(**common)
        check_choice(COLORS, color=color)
        check_choice(REGIONS, region=region)
        check_counts(image_size=image_size)
        expect(region != "quadrant" or not image_size % 2, "image_size", image_size, "an even number, for quadrants")
        self.image_size = image_size
        self.color = color
        self.region = region

    @property
    @override
    def image_shape(self) -> tuple[int, int, int]:
        side = self.image_size // 2 if self.region == "quadrant" else self.image_size
        return 3, side, side

    @property
    @override
    def num_categories(self) -> tuple[int, ...]:
        return num_codes(self.color)

    @property
    @override
    def unit(self) -> Unit:
        """Bits per dimension of RGB bytes, of which a likelihood of codes is a bound."""
        return BitsPerDimension()

    def is_color(self, images: Tensor) -> Tensor:
        """Whether pixels (..., 3, H, W), such as those of samples, have the codes of colours: bool (..., H, W)."""
        return is_color(images, self.color)

    @property
    @override
    def protocol(self) -> str:
        notes = [*(["lossy"] if is_lossy(self.color) else []), *([] if self.region == "whole" else [self.region])]
        return ", ".join(notes)

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"color": self.color, "region": self.region, "lossy": is_lossy(self.color)}

    def encode(self, pixels: Pixels) -> Tensor:
        """Crop and colour-encode raw RGB bytes (N, 3, image_size, image_size)."""
        return encode_images(pixels, self.color, self.region)

    @override
    def to_rgb(self, images: Tensor) -> Tensor:
        return (decode_mean if images.is_floating_point() else decode_color)(images, self.color)

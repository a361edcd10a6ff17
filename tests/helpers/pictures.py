"""What the images of tests say of themselves: patches, unit, protocol, and how they look."""

import math
from typing import Any

from torch import Tensor

from lvd_lightning.color import decode_color, decode_mean
from lvd_lightning.parts import ImagePatches
from lvd_lightning.units import BitsPerDimension

__all__ = ["Pictures"]


class Pictures:
    """RGB images of bytes; a class that has them says their shape, the side of a patch, and their colour code."""

    image_shape: tuple[int, int, int]
    patch_size = 2
    color = "rgb"
    protocol = ""
    unit = BitsPerDimension()

    @property
    def parts(self) -> ImagePatches:
        return ImagePatches(self.image_shape, self.patch_size)

    @property
    def num_dims(self) -> int:
        return math.prod(self.image_shape)

    @property
    def facts(self) -> dict[str, Any]:
        return {"color": self.color, "region": "whole", "lossy": False}

    def to_rgb(self, images: Tensor) -> Tensor:
        return (decode_mean if images.is_floating_point() else decode_color)(images, self.color)

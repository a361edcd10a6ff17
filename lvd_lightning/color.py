"""Colour transforms on bytes, and images as rows of patches.

Shapes: B images, P patches, H height, W width, p patch side; leading dimensions written "..." may be any.
"""

import torch
from torch import Tensor

from lvd_lightning.checks import check_choice

__all__ = [
    "COLORS",
    "REGIONS",
    "crop_region",
    "decode_color",
    "decode_mean",
    "encode_color",
    "is_lossy",
    "patchify",
    "unpatchify",
]

COLORS = ("rgb", "ycocg_r", "ycbcr_lossy")
REGIONS = ("whole", "quadrant")

# ITU-R BT.709, in ten-thousandths: luma weights, and 2 (1 - weight) of blue and of red, which scale the chroma.
LUMA_R, LUMA_G, LUMA_B, LUMA_UNIT = 2126, 7152, 722, 10000
CHROMA_B, CHROMA_R = 18556, 15748


def encode_color(images: Tensor, color: str) -> Tensor:
    """Encode RGB bytes in another colour space, byte for byte.

    `rgb` is the identity. `ycocg_r` is a bijection on {0..255}^3, so that a likelihood of its values is one of the RGB
    values: with `s` the signed reading of a byte and every step modulo 256,

        Co = R - B;  t = B + (s(Co) >> 1);  Cg = G - t;  Y = t + (s(Cg) >> 1);  stored: Y, Co + 128, Cg + 128

    `ycbcr_lossy` is full-range BT.709 Y'CbCr rounded to bytes. It merges three colours in four, so its likelihoods do
    not compare with those of the other two.

    Args:
        images: uint8 RGB images, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        A uint8 tensor of the same shape (the same tensor for `rgb`).

    Raises:
        ValueError: the colour is unknown, or the images are not bytes with three channels.

    References:
        Malvar and Sullivan, YCoCg-R: A Color Space with RGB Reversibility and Low Dynamic Range, 2003.
    """
    _check(images, color)
    if color == "rgb":
        return images
    red, green, blue = images.unbind(-3)
    if color == "ycbcr_lossy":
        return _to_ycbcr(red, green, blue)
    # uint8 arithmetic wraps around, which is the modulo of every step.
    orange = red - blue
    base = blue + _half_signed(orange)
    green_chroma = green - base
    luma = base + _half_signed(green_chroma)
    return torch.stack([luma, orange + 128, green_chroma + 128], dim=-3)


def decode_color(images: Tensor, color: str) -> Tensor:
    """Give the RGB bytes back: exactly for `rgb` and `ycocg_r`, the nearest in-range colour for `ycbcr_lossy`.

    Args:
        images: uint8 images as `encode_color` returns them, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        A uint8 tensor of the same shape (the same tensor for `rgb`).

    Raises:
        ValueError: the colour is unknown, or the images are not bytes with three channels.
    """
    _check(images, color)
    if color == "rgb":
        return images
    if color == "ycbcr_lossy":
        return _from_ycbcr(*images.unbind(-3))
    luma, orange, green_chroma = images.unbind(-3)
    orange, green_chroma = orange - 128, green_chroma - 128
    base = luma - _half_signed(green_chroma)
    green = green_chroma + base
    blue = base - _half_signed(orange)
    return torch.stack([blue + orange, green, blue], dim=-3)


def decode_mean(images: Tensor, color: str) -> Tensor:
    """RGB bytes for real-valued codes, such as means: nearest in-range colours, nothing wraps around.

    Args:
        images: floating point codes as `encode_color` makes them, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        A uint8 tensor of the same shape.

    Raises:
        ValueError: the colour is unknown, or there are not three channels.
    """
    check_choice(COLORS, color=color)
    if images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (..., 3, H, W)")
    first, second, third = images.double().unbind(-3)
    if color == "ycocg_r":
        orange, green_chroma = second - 128, third - 128
        base = first - green_chroma / 2
        blue = base - orange / 2
        first, second, third = blue + orange, green_chroma + base, blue
    elif color == "ycbcr_lossy":
        red = first + (third - 128) * CHROMA_R / LUMA_UNIT
        blue = first + (second - 128) * CHROMA_B / LUMA_UNIT
        green = (LUMA_UNIT * first - LUMA_R * red - LUMA_B * blue) / LUMA_G
        first, second, third = red, green, blue
    return torch.stack([first, second, third], dim=-3).round_().clamp_(0, 255).to(torch.uint8)


def is_lossy(color: str) -> bool:
    """Whether the encoding merges colours, so that whatever prints a likelihood has to say so."""
    check_choice(COLORS, color=color)
    return color == "ycbcr_lossy"


def crop_region(images: Tensor, region: str) -> Tensor:
    """The part of the images that is modelled: the `whole` or the top-left `quadrant`.

    Args:
        images: images with shape (..., H, W); H and W even for a quadrant.
        region: one of `REGIONS`.

    Returns:
        A view with shape (..., H, W) or (..., H / 2, W / 2).

    Raises:
        ValueError: the region is unknown, or an odd side has no half.
    """
    check_choice(REGIONS, region=region)
    if region == "whole":
        return images
    height, width = images.shape[-2:]
    if height % 2 or width % 2:
        raise ValueError(f"region: a quadrant needs even sides, got images of {height} x {width}")
    return images[..., : height // 2, : width // 2]


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cut images into square patches.

    Args:
        images: images with shape (B, C, H, W), of any dtype.
        patch_size: the side p of a patch; it divides H and W.

    Returns:
        The patches with shape (B, P, C p p), row by row over the grid; inside a patch channel, then row, then column.

    Raises:
        ValueError: the patches do not tile the images.
    """
    if images.ndim != 4:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected (B, C, H, W)")
    count, channels, height, width = images.shape
    rows, columns = _grid(height, width, patch_size)
    cells = images.reshape(count, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, rows * columns, channels * patch_size * patch_size)


def unpatchify(patches: Tensor, patch_size: int, height: int, width: int) -> Tensor:
    """Put patches back together, the inverse of `patchify`.

    Args:
        patches: the patches with shape (B, P, C p p).
        patch_size: the side p of a patch.
        height: the height of the images.
        width: the width of the images.

    Returns:
        The images with shape (B, C, H, W).

    Raises:
        ValueError: so many patches of this size do not make images of that size.
    """
    rows, columns = _grid(height, width, patch_size)
    if patches.ndim != 3 or patches.shape[1] != rows * columns or patches.shape[2] % patch_size**2:
        raise ValueError(
            f"patches: got shape {tuple(patches.shape)}, expected (B, {rows * columns}, a multiple of {patch_size**2}) "
            f"for images of {height} x {width} in patches of {patch_size}"
        )
    count, _, size = patches.shape
    channels = size // patch_size**2
    cells = patches.reshape(count, rows, columns, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(count, channels, height, width)


def _check(images: Tensor, color: str) -> None:
    check_choice(COLORS, color=color)
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (..., 3, H, W)")


def _grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size: {patch_size} does not tile images of {height} x {width}; choose a divisor of both"
        )
    return height // patch_size, width // patch_size


def _half_signed(values: Tensor) -> Tensor:
    """Read bytes as signed, halve them rounding down, and give the bytes of that."""
    return (values.view(torch.int8) >> 1).view(torch.uint8)


def _round_divide(numerator: Tensor, denominator: int) -> Tensor:
    """The quotient of integers, rounded to the nearest one, halves upwards."""
    return torch.div(2 * numerator + denominator, 2 * denominator, rounding_mode="floor")


def _to_ycbcr(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    red, green, blue = red.int(), green.int(), blue.int()
    luma = LUMA_R * red + LUMA_G * green + LUMA_B * blue  # in units of 1 / LUMA_UNIT
    values = [
        _round_divide(luma, LUMA_UNIT),
        128 + _round_divide(LUMA_UNIT * blue - luma, CHROMA_B),
        128 + _round_divide(LUMA_UNIT * red - luma, CHROMA_R),
    ]
    return torch.stack(values, dim=-3).clamp_(0, 255).to(torch.uint8)


def _from_ycbcr(luma: Tensor, chroma_b: Tensor, chroma_r: Tensor) -> Tensor:
    luma, chroma_b, chroma_r = luma.long(), chroma_b.long() - 128, chroma_r.long() - 128
    # Everything in units of 1 / LUMA_UNIT.
    red = LUMA_UNIT * luma + CHROMA_R * chroma_r
    blue = LUMA_UNIT * luma + CHROMA_B * chroma_b
    green = _round_divide(LUMA_UNIT * LUMA_UNIT * luma - LUMA_R * red - LUMA_B * blue, LUMA_G)
    values = [_round_divide(value, LUMA_UNIT) for value in (red, green, blue)]
    return torch.stack(values, dim=-3).clamp_(0, 255).to(torch.uint8)

"""Colour codes of RGB bytes, and images as rows of patches.

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
    "is_color",
    "is_lossy",
    "num_codes",
    "patchify",
    "unpatchify",
]

COLORS = ("rgb", "ycocg_r", "ycbcr_lossy", "ycocg_r_mod256")
REGIONS = ("whole", "quadrant")

# What is added to the chroma of ycocg_r, so that its codes start at 0.
CHROMA_OFFSET = 255

# ITU-R BT.709, in ten-thousandths: luma weights, and 2 (1 - weight) of blue and of red, which scale the chroma.
LUMA_R, LUMA_G, LUMA_B, LUMA_UNIT = 2126, 7152, 722, 10000
CHROMA_B, CHROMA_R = 18556, 15748


def num_codes(color: str) -> tuple[int, int, int]:
    """How many values each channel of a code has, 0..n-1.

    Raises:
        ValueError: the colour is unknown.

    Example:
        >>> from lvd_lightning.color import num_codes
        >>> num_codes("ycocg_r")
        (256, 511, 511)
    """
    check_choice(COLORS, color=color)
    return (256, 2 * CHROMA_OFFSET + 1, 2 * CHROMA_OFFSET + 1) if color == "ycocg_r" else (256, 256, 256)


def encode_color(images: Tensor, color: str) -> Tensor:
    """Encode RGB bytes in another colour space, on whole numbers.

    `rgb` is the identity. `ycocg_r` gives every RGB triple a code of its own, by lifting steps that nothing wraps:

        Co = R - B;  t = B + (Co >> 1);  Cg = G - t;  Y = t + (Cg >> 1);  stored: Y, Co + 255, Cg + 255

    Codes of no RGB triple exist too (see `is_color`). What a circuit gives to them is lost, so a likelihood of codes is
    a lower bound of the RGB likelihood, and its bits per dimension an upper bound.

    `ycocg_r_mod256` reduces every step modulo 256, which keeps codes in bytes but puts saturated colours beside their
    opposites: for runs that were begun with it. `ycbcr_lossy` is full-range BT.709 Y'CbCr rounded to bytes. It merges
    three colours in four, so its likelihoods do not compare with those of the others.

    Args:
        images: uint8 RGB images, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        A tensor of the same shape (the same tensor for `rgb`): int16 for `ycocg_r`, uint8 for the others.

    Raises:
        ValueError: the colour is unknown, or the images are not bytes with three channels.

    Example:
        >>> import torch
        >>> from lvd_lightning.color import encode_color
        >>> orange = torch.tensor([255, 128, 0], dtype=torch.uint8).view(3, 1, 1)
        >>> encode_color(orange, "ycocg_r").flatten().tolist()
        [127, 510, 256]

    References:
        Malvar and Sullivan, YCoCg-R: A Color Space with RGB Reversibility and Low Dynamic Range, 2003.
    """
    check_choice(COLORS, color=color)
    if images.dtype != torch.uint8 or images.ndim < 3 or images.shape[-3] != 3:
        raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (..., 3, H, W)")
    if color == "rgb":
        return images
    if color == "ycbcr_lossy":
        return _to_ycbcr(*images.unbind(-3))
    luma, orange, green_chroma = _lifted(images, wraps=color == "ycocg_r_mod256")
    if color == "ycocg_r_mod256":  # uint8 arithmetic wraps around, which is the modulo of every step
        return torch.stack([luma, orange + 128, green_chroma + 128], dim=-3)
    return torch.stack([luma, orange + CHROMA_OFFSET, green_chroma + CHROMA_OFFSET], dim=-3)


def decode_color(images: Tensor, color: str) -> Tensor:
    """RGB bytes of codes: exact where the codes are those of RGB bytes, else the nearest that channels can show.

    Args:
        images: whole numbers of any type, codes as `encode_color` returns them, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        A uint8 tensor of the same shape (the same tensor for uint8 `rgb`).

    Raises:
        ValueError: the colour is unknown, there are not three channels, or a code is out of range.
    """
    _check_codes(images, color)
    if color == "rgb":
        return images.to(torch.uint8)
    if color == "ycbcr_lossy":
        return _from_ycbcr(*images.unbind(-3))
    if color == "ycocg_r_mod256":
        luma, orange, green_chroma = images.to(torch.uint8).unbind(-3)
        orange, green_chroma = orange - 128, green_chroma - 128
        base = luma - _half(green_chroma)
        blue = base - _half(orange)
        return torch.stack([blue + orange, green_chroma + base, blue], dim=-3)
    return _unlifted(images).clamp_(0, 255).to(torch.uint8)


def is_color(images: Tensor, color: str) -> Tensor:
    """Whether codes are those of RGB bytes; pixels of samples need not be.

    Args:
        images: whole numbers of any type, with shape (..., 3, H, W).
        color: one of `COLORS`.

    Returns:
        bool with shape (..., H, W).

    Raises:
        ValueError: as `decode_color`.

    Example:
        >>> import torch
        >>> from lvd_lightning.color import is_color
        >>> codes = torch.tensor([[0, 255, 255], [0, 510, 255]]).view(2, 3, 1, 1)  # black; red and yet dark
        >>> is_color(codes, "ycocg_r").flatten()
        tensor([ True, False])
    """
    return (encode_color(decode_color(images, color), color) == images).all(-3)


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
    if color in ("ycocg_r", "ycocg_r_mod256"):
        offset = CHROMA_OFFSET if color == "ycocg_r" else 128
        orange, green_chroma = second - offset, third - offset
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


def _check_codes(images: Tensor, color: str) -> None:
    numbers = num_codes(color)
    if images.is_floating_point() or images.dtype == torch.bool or images.ndim < 3 or images.shape[-3] != 3:
        expected = "whole numbers (..., 3, H, W)"
        raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected {expected}")
    if images.dtype == torch.uint8 or not images.numel():
        return
    for channel, number in enumerate(numbers):
        lowest, highest = (int(value) for value in images.select(-3, channel).aminmax())
        if lowest < 0 or highest >= number:
            raise ValueError(
                f"images: channel {channel} holds codes {lowest} to {highest}, expected 0 to {number - 1} for {color}"
            )


def _grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise ValueError(
            f"patch_size: {patch_size} does not tile images of {height} x {width}; choose a divisor of both"
        )
    return height // patch_size, width // patch_size


def _lifted(images: Tensor, wraps: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Y, Co and Cg of RGB bytes, in bytes that wrap around or in int16, where they do not."""
    red, green, blue = (images if wraps else images.short()).unbind(-3)
    orange = red - blue
    base = blue + _half(orange)
    green_chroma = green - base
    return base + _half(green_chroma), orange, green_chroma


def _unlifted(images: Tensor) -> Tensor:
    """Red, green and blue of ycocg_r codes, int16; not all in 0..255 where the codes are no colour."""
    luma, orange, green_chroma = images.short().unbind(-3)
    orange, green_chroma = orange - CHROMA_OFFSET, green_chroma - CHROMA_OFFSET
    base = luma - _half(green_chroma)
    blue = base - _half(orange)
    return torch.stack([blue + orange, green_chroma + base, blue], dim=-3)


def _half(values: Tensor) -> Tensor:
    """Whole numbers halved, rounding down; bytes are read as signed for that."""
    if values.dtype == torch.uint8:
        return (values.view(torch.int8) >> 1).view(torch.uint8)
    return values >> 1


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

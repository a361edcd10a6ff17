"""Colour transforms on all 2^24 colours; patches; regions."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lvd_lightning.color import (
    COLORS,
    crop_region,
    decode_color,
    decode_mean,
    encode_color,
    is_color,
    is_lossy,
    num_codes,
    patchify,
    unpatchify,
)


@pytest.fixture(scope="module")
def every_color() -> Tensor:
    """All 2^24 RGB triples, as one image with shape (3, 4096, 4096)."""
    code = torch.arange(1 << 24, dtype=torch.int32)
    return torch.stack([(code >> shift).to(torch.uint8) for shift in (16, 8, 0)]).view(3, 4096, 4096)


def number_of_colors(image: Tensor) -> int:
    """The number of distinct triples in an image (3, H, W)."""
    red, green, blue = image.int().flatten(1)
    seen = torch.zeros(1 << 24, dtype=torch.bool)
    seen[(red << 16) | (green << 8) | blue] = True
    return int(seen.sum())


@pytest.mark.parametrize("color", ["rgb", "ycocg_r", "ycocg_r_mod256"])
def test_reversible_colors_give_every_triple_its_own_code(every_color: Tensor, color: str) -> None:
    encoded = encode_color(every_color, color)
    assert encoded.dtype == (torch.int16 if color == "ycocg_r" else torch.uint8)
    for channel, number in zip(encoded, num_codes(color), strict=True):
        assert tuple(int(value) for value in channel.aminmax()) == (0, number - 1)
    assert torch.equal(decode_color(encoded, color), every_color)
    assert not is_lossy(color)
    assert is_color(encoded[:, :64], color).all()
    if color != "ycocg_r":  # bytes: as many codes as triples
        assert number_of_colors(encoded) == 1 << 24


def lifted_by_the_book(red: int, green: int, blue: int) -> list[int]:
    """The lifting steps in Python integers."""
    orange = red - blue
    base = blue + (orange >> 1)
    green_chroma = green - base
    return [base + (green_chroma >> 1), orange + 255, green_chroma + 255]


def wrapped_by_the_book(red: int, green: int, blue: int) -> list[int]:
    """The lifting steps in Python integers, each reduced modulo 256."""

    def signed(value: int) -> int:
        return ((value + 128) & 255) - 128

    orange = (red - blue) & 255
    base = (blue + (signed(orange) >> 1)) & 255
    green_chroma = (green - base) & 255
    luma = (base + (signed(green_chroma) >> 1)) & 255
    return [luma, (orange + 128) & 255, (green_chroma + 128) & 255]


@pytest.mark.parametrize(
    ("color", "by_the_book"), [("ycocg_r", lifted_by_the_book), ("ycocg_r_mod256", wrapped_by_the_book)]
)
def test_ycocg_r_takes_the_documented_steps(color: str, by_the_book: Callable[[int, int, int], list[int]]) -> None:
    generator = torch.Generator().manual_seed(0)
    random = torch.randint(256, (500, 3), generator=generator)
    corners = torch.cartesian_prod(*[torch.tensor([0, 1, 127, 128, 254, 255])] * 3)
    colors = torch.cat([random, corners])
    encoded = encode_color(colors.to(torch.uint8)[:, :, None, None], color)[:, :, 0, 0]
    assert encoded.tolist() == [by_the_book(*triple) for triple in colors.tolist()]


@pytest.mark.parametrize(
    ("rgb", "expected", "wrapped"),
    [
        ((0, 0, 0), (0, 255, 255), (0, 128, 128)),
        ((255, 255, 255), (255, 255, 255), (255, 128, 128)),
        ((100, 100, 100), (100, 255, 255), (100, 128, 128)),
        ((110, 100, 90), (100, 275, 255), (100, 148, 128)),  # Co = 20, t = 100, Cg = 0
        ((90, 105, 100), (100, 245, 265), (100, 118, 138)),  # Co = -10, t = 95, Cg = 10
        ((255, 0, 0), (63, 510, 128), (255, 127, 129)),  # Co = 255, t = 127, Cg = -127; wrapped, Co reads as -1
    ],
)
def test_ycocg_r_values(
    rgb: tuple[int, int, int], expected: tuple[int, int, int], wrapped: tuple[int, int, int]
) -> None:
    image = torch.tensor(rgb, dtype=torch.uint8)[:, None, None]
    assert tuple(encode_color(image, "ycocg_r").flatten().tolist()) == expected
    assert tuple(encode_color(image, "ycocg_r_mod256").flatten().tolist()) == wrapped


def test_codes_of_no_color_go_to_the_nearest_values_of_the_channels() -> None:
    """A level below black and above white stays dark and bright; all codes beyond the cube are told."""
    random = torch.Generator().manual_seed(0)
    codes = torch.stack([torch.randint(number, (400,), generator=random) for number in num_codes("ycocg_r")])
    codes = codes.view(3, 20, 20)
    red, green, blue = [], [], []
    for luma, orange, green_chroma in (codes - torch.tensor([0, 255, 255])[:, None, None]).flatten(1).T.tolist():
        base = luma - (green_chroma >> 1)
        blue.append(base - (orange >> 1))
        green.append(green_chroma + base)
        red.append(blue[-1] + orange)
    exact = torch.tensor([red, green, blue]).view(3, 20, 20)
    inside = ((exact >= 0) & (exact <= 255)).all(0)
    assert 0 < inside.sum() < 400
    for kind in (torch.int16, torch.int64):
        assert torch.equal(decode_color(codes.to(kind), "ycocg_r").long(), exact.clamp(0, 255))
        assert torch.equal(is_color(codes.to(kind), "ycocg_r"), inside)
    noisy_black = torch.tensor([0, 250, 252]).view(3, 1, 1)
    assert decode_color(noisy_black, "ycocg_r").max() <= 5


def test_lossy_color_rounds_and_merges_three_in_four(every_color: Tensor) -> None:
    encoded = encode_color(every_color, "ycbcr_lossy")
    assert is_lossy("ycbcr_lossy")
    assert number_of_colors(encoded) / 2**24 == pytest.approx(0.247, abs=5e-4)
    # A rounded luma is at most half a step off, a truncated one up to a whole step.
    red, green, blue = every_color[:, ::7, ::5].double()
    luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert float((encoded[0, ::7, ::5].double() - luma).abs().max()) <= 0.5 + 1e-9
    # Greys survive exactly.
    grey = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256)
    assert torch.equal(decode_color(encode_color(grey, "ycbcr_lossy"), "ycbcr_lossy"), grey)


def test_lossy_color_decodes_close_by(every_color: Tensor) -> None:
    some = every_color[:, ::13, ::11]
    back = decode_color(encode_color(some, "ycbcr_lossy"), "ycbcr_lossy")
    # Half a step of luma and half a step of chroma times 1.8556, and half a step for rounding to bytes.
    assert int((back.int() - some.int()).abs().max()) <= 2


@pytest.mark.parametrize("color", COLORS)
def test_leading_dimensions_do_not_matter(color: str) -> None:
    images = torch.randint(256, (2, 5, 3, 4, 6), dtype=torch.uint8)
    encoded = encode_color(images, color)
    assert torch.equal(encoded[1, 3], encode_color(images[1, 3], color))
    assert decode_color(encoded, color).shape == images.shape


def test_patchify_order_and_inverse() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (2, 6, 12)
    # Patch 4 is the second row's second; its variables run over channel, row, column.
    assert torch.equal(patches[1, 4], images[1, :, 2:4, 2:4].reshape(-1))
    assert torch.equal(unpatchify(patches, 2, 4, 6), images)


def test_regions() -> None:
    images = torch.arange(2 * 3 * 4 * 6).view(2, 3, 4, 6)
    assert crop_region(images, "whole") is images
    assert torch.equal(crop_region(images, "quadrant"), images[:, :, :2, :3])


def test_errors_name_the_argument() -> None:
    image = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="color: got 'yuv'"):
        encode_color(image, "yuv")
    with pytest.raises(ValueError, match="float32"):
        decode_color(image.float(), "ycocg_r")
    for code in (-1, 511):
        with pytest.raises(ValueError, match=r"channel 1 holds codes .*, expected 0 to 510 for ycocg_r"):
            decode_color(torch.tensor([0, code, 0]).view(3, 1, 1), "ycocg_r")
    with pytest.raises(ValueError, match="float32"):
        encode_color(image.float(), "ycocg_r")
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        decode_color(image[:, 0], "rgb")
    with pytest.raises(ValueError, match="region: got 'half'"):
        crop_region(image, "half")
    with pytest.raises(ValueError, match="even sides"):
        crop_region(image[..., :3], "quadrant")
    with pytest.raises(ValueError, match="patch_size: 3"):
        patchify(image, 3)
    with pytest.raises(ValueError, match="patches: got shape"):
        unpatchify(torch.zeros(1, 3, 12), 2, 4, 4)


@pytest.mark.parametrize("color", COLORS)
def test_means_are_decoded_without_wrapping_around(color: str) -> None:
    """Codes of moderate colours come back; what lies a little outside the cube goes to its side."""
    rgb = torch.randint(70, 180, (5, 3, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    found = decode_mean(encode_color(rgb, color).float(), color)
    assert int((found.int() - rgb.int()).abs().max()) <= 1
    dark = encode_color(torch.zeros(1, 3, 1, 1, dtype=torch.uint8), color).float()
    assert decode_mean(dark - 2.0, color).max() <= 6
    with pytest.raises(ValueError, match="images: got shape"):
        decode_mean(torch.zeros(2, 4, 4), color)
    with pytest.raises(ValueError, match="color: got 'hsv'"):
        decode_mean(torch.zeros(3, 4, 4), "hsv")

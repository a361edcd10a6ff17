"""Pixels of channels with different numbers of values, in every type that networks compute in."""

import pytest
import torch

from lvd_lightning.teachers.scaling import PixelScale


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [(256, 256, 256), (256, 511, 511)])
def test_every_channel_spans_the_same_range(numbers: tuple[int, ...], dtype: torch.dtype) -> None:
    images = torch.stack([torch.linspace(0, number - 1, 512).round() for number in numbers]).short()[None, :, None]
    scale = PixelScale((3, 1, 512), numbers)
    scaled = scale.floats(images, dtype)
    assert scaled.dtype == dtype
    halves = (torch.tensor(numbers, dtype=torch.float64)[:, None, None] - 1) / 2
    exact = images.double() / halves - 1
    assert (scaled.double() - exact).abs().max() <= torch.finfo(dtype).eps
    if dtype in (torch.float32, torch.float64):
        assert torch.equal(scale.levels(scaled).short(), images)

"""Contrast and colour of images made by hand."""

import pytest
import torch

from lvd_lightning.runs.contrast import contrast, histogram_distance


def test_the_deviation_is_that_within_images() -> None:
    flat = torch.tensor([10, 200], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4)  # two grey images
    assert contrast(flat).std == 0
    striped = torch.tensor([0, 100, 0, 100], dtype=torch.uint8).expand(2, 3, 4, 4)
    assert contrast(striped).std == pytest.approx(50)
    assert contrast(torch.cat([flat, striped])).std == pytest.approx(25)


def test_saturation_is_that_of_colours() -> None:
    images = torch.zeros(1, 3, 1, 4, dtype=torch.uint8)  # black
    images[0, :, 0, 1] = torch.tensor([200, 0, 0])  # red
    images[0, :, 0, 2] = torch.tensor([200, 200, 100])
    images[0, :, 0, 3] = 255
    assert contrast(images).saturation == pytest.approx((0 + 1 + 0.5 + 0) / 4)


def test_steps_lie_in_both_directions() -> None:
    image = torch.tensor([[0, 3], [0, 10]], dtype=torch.uint8).expand(1, 3, 2, 2)
    steps = contrast(image).steps
    assert {level: int(count) for level, count in enumerate(steps) if count} == {0: 1, 3: 1, 7: 1, 10: 1}
    assert int(contrast(torch.randint(256, (501, 3, 4, 5), dtype=torch.uint8)).steps.sum()) == 501 * (3 * 5 + 4 * 4)


def test_histograms_are_as_far_as_values_have_to_be_moved() -> None:
    one = torch.zeros(256)
    one[10] = 8.0
    other = torch.zeros(256)
    other[[4, 10, 20]] = torch.tensor([1.0, 2.0, 1.0])
    assert histogram_distance(one, other) == pytest.approx((6 + 0 + 0 + 10) / 4)
    assert histogram_distance(other, other) == 0


def test_errors() -> None:
    for images in (torch.zeros(1, 3, 4, 4), torch.zeros(0, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4).byte()):
        with pytest.raises(ValueError, match="images: got"):
            contrast(images)

"""Figures of samples: hand-made images whose figures are known, and circuits that draw such images."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.sample_figures import border_step, isolated_pixels, sample_figures


def grey(*rows: list[int]) -> Tensor:
    """One image, uint8 (1, 3, H, W), of three equal channels."""
    return torch.tensor(rows, dtype=torch.uint8).expand(1, 3, -1, -1)


def test_a_pixel_is_isolated_if_one_channel_differs_from_each_neighbour_by_more_than_60() -> None:
    images = torch.full((1, 3, 5, 5), 100, dtype=torch.uint8)
    assert isolated_pixels(images) == 0
    images[0, 2, 2, 2] = 160
    assert isolated_pixels(images) == 0
    images[0, 2, 2, 2] = 161
    assert isolated_pixels(images) == 1 / 25
    images[0, 0, 0, 0] = 39  # a corner has three neighbours
    assert isolated_pixels(images) == 2 / 25
    images[0, 0, 1, 1] = 39  # the corner's equal at its side: neither is isolated
    assert isolated_pixels(images) == 1 / 25


def test_bytes_do_not_wrap_around() -> None:
    assert isolated_pixels(grey([255, 0])) == 1
    assert border_step(grey([255, 0, 255, 0], [255, 0, 255, 0]), 2) == (2.0, 127.5)  # half of the inner steps are 0


def test_neighbours_across_a_corner_count() -> None:
    assert isolated_pixels(grey([0, 255, 0], [255, 0, 255], [0, 255, 0])) == 0
    assert isolated_pixels(grey([0, 255, 0], [255, 100, 255], [0, 255, 0])) == 1 / 9 + 4 / 9  # centre and corners


def test_border_steps_are_those_between_patches_in_both_directions() -> None:
    # Patches of 2 x 2, constant but for a step of 3 from column to column inside and of 12 between patches.
    across = grey(*[[0, 3, 15, 18]] * 4)
    assert border_step(across, 2) == (pytest.approx(4.0), pytest.approx(1.5))  # 12 and 0 against 3 and 0
    assert border_step(across.mT, 2) == border_step(across, 2)
    assert border_step(across, 4)[1] == pytest.approx((3 + 12 + 3) / 6)  # everything is inside of one patch


def test_luma_has_the_weights_of_bt_709() -> None:
    images = torch.zeros(1, 3, 2, 4, dtype=torch.uint8)
    for channel, weight in enumerate((0.2126, 0.7152, 0.0722)):
        images.zero_()
        images[0, channel, :, 1::2] = 100
        assert border_step(images, 2) == (pytest.approx(2.0), pytest.approx(100 * weight / 2))


def test_what_does_not_count_is_left_out() -> None:
    images = grey([0, 3, 9, 90], [0, 3, 9, 9])
    right = torch.tensor([False, False, True, True])
    assert isolated_pixels(images) == 1 / 8
    assert isolated_pixels(images, right) == 1 / 4
    assert isolated_pixels(images, ~right) == 0
    # Steps to a pixel that counts: 6 across and 81, 0 and 0, 81 inside; of the left ones 6 across, 3 inside, 0 and 0.
    assert border_step(images, 2, right) == (pytest.approx(6 / ((81 + 0 + 0 + 81) / 4)), pytest.approx(40.5))
    assert border_step(images, 2, ~right) == (pytest.approx(6 / 1.5), pytest.approx(1.5))


def test_what_there_is_not_is_nan() -> None:
    assert math.isnan(isolated_pixels(grey([1, 2]), torch.tensor([False])))
    assert math.isnan(border_step(grey([1, 2], [1, 2]), 2)[0])
    assert math.isnan(border_step(grey([1, 2], [1, 2]), 1)[1])


def test_errors() -> None:
    for images in (torch.zeros(1, 3, 4, 4), torch.zeros(3, 4, 4, dtype=torch.uint8), grey([1])):
        with pytest.raises(ValueError, match="images: got"):
            isolated_pixels(images)
        with pytest.raises(ValueError, match="images: got"):
            border_step(images, 1)
    for size in (0, 3):
        with pytest.raises(ValueError, match=f"patch_size: got {size}, expected a divisor of both sides of 2 x 4"):
            border_step(grey([1, 2, 3, 4], [1, 2, 3, 4]), size)


class Greys:
    """Data of 8 x 8 images in grey, whose test images are `pixels`; pixels above 200 are no colour."""

    image_shape = (1, 8, 8)
    parts = SimpleNamespace(shape=(1, 4, 4))

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def num_examples(self, split: str) -> int:
        return len(self.pixels)

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.pixels[indices]

    def to_rgb(self, images: Tensor) -> Tensor:
        return images.to(torch.uint8).expand(-1, 3, -1, -1)


class ColouredGreys(Greys):
    def is_color(self, images: Tensor) -> Tensor:
        return (images <= 200).all(1)


class Noise:
    """A model that draws every pixel by itself."""

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        return torch.randint(256, (n, 1, 8, 8), generator=generator)

    def inpaint(self, x: Tensor, observed: Tensor, generator: torch.Generator) -> Tensor:
        drawn = torch.randint(256, x.shape, generator=generator, dtype=x.dtype)
        return torch.where(observed, x, drawn)

    def redraw(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, 255)


def figures(data: Any, max_images: int, ranks: Any = None) -> dict[str, Any]:
    return sample_figures(Noise(), data, ranks or Ranks({"accelerator": "cpu", "devices": 1}), 0, max_images)  # type: ignore[arg-type]


def test_samples_and_completions_stand_beside_test_images() -> None:
    ramp = torch.arange(8, dtype=torch.uint8).expand(120, 1, 8, 8)
    found = figures(ColouredGreys(ramp), 110)
    assert (found["num_samples"], found["num_completions"]) == (110, 110)
    for name in ("samples", "completions"):
        assert found[name]["isolated_pixels"] > 0.05
        assert found[name]["inside_step"] == pytest.approx(256 / 3, rel=0.05)
        assert found[name]["no_color"] == pytest.approx(55 / 256, rel=0.1)
        assert (found[name]["isolated_pixels_test"], found[name]["inside_step_test"]) == (0, pytest.approx(0.5, 0.1))
        assert "no_color_test" not in found[name]
    assert found["redrawn"]["no_color"] == pytest.approx(0.5, rel=0.05)
    assert not [name for name in found["redrawn"] if name.endswith("_test")]
    assert found["samples"]["border_step"] == pytest.approx(1.0, rel=0.05)
    assert found["samples"]["border_step_test"] == pytest.approx(1.0)


def test_data_without_codes_of_no_colour_have_no_such_figure_and_few_test_images_are_all_used() -> None:
    found = figures(Greys(torch.zeros(7, 1, 8, 8, dtype=torch.uint8)), 20)
    assert found["num_completions"] == 7
    assert "no_color" not in found["samples"]
    assert "border_step_test" not in found["samples"]  # nothing changes in a constant image
    assert found["samples"]["inside_step_test"] == 0


def test_figures_do_not_depend_on_the_ranks_and_follow_the_seed() -> None:
    data = ColouredGreys(torch.randint(256, (130, 1, 8, 8), dtype=torch.uint8))
    whole = figures(data, 120)
    assert figures(data, 120) == whole
    shares: list[list[Tensor]] = []

    class Share:
        """One of two ranks: writes down what it sums, and once the first has, sums both."""

        device = torch.device("cpu")

        def __init__(self, rank: int) -> None:
            self.rank, self.sums = rank, list[Tensor]()
            shares.append(self.sums)

        def share(self, indices: Tensor) -> Tensor:
            return indices[self.rank :: 2]

        def sum(self, values: Tensor) -> Tensor:
            self.sums.append(values)
            return sum((found[len(self.sums) - 1] for found in shares), torch.zeros(()))

    assert figures(data, 120, Share(0)) != whole
    assert figures(data, 120, Share(1)) == whole

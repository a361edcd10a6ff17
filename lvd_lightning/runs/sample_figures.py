"""Two figures of samples that likelihoods do not show: pixels that stand alone, and steps at the borders of patches.

Shapes: N images, H height, W width.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.color import LUMA_B, LUMA_G, LUMA_R, LUMA_UNIT
from lvd_lightning.context import VisibleData
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.ranks import Ranks
from lvd_lightning.runs.pictures import half_masks
from lvd_lightning.runs.settings import EVALUATE
from lvd_lightning.seeds import generator_for
from lvd_lightning.stopping import stop_if_requested

__all__ = ["BATCH", "MAX_IMAGES", "batches", "border_step", "isolated_pixels", "sample_figures"]

#: So many samples are drawn, and so many test images completed and compared with.
MAX_IMAGES = 500
#: A pixel is isolated if a channel differs by more levels than these from each neighbour.
ISOLATED = 60
#: Images that are drawn and looked at together: memory does not grow with their number, nor depend on the ranks.
BATCH = 50
_NEIGHBOURS = [(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1) if (down, right) != (0, 0)]


def isolated_pixels(images: Tensor, counted: Tensor | None = None) -> float:
    """The share of pixels that look like none of their neighbours.

    Such a pixel's largest difference of a channel exceeds 60 levels from each of its eight neighbours (fewer at the
    edge of the image). Photographs have next to none.

    Args:
        images: uint8 RGB, with shape (N, 3, H, W).
        counted: bool that broadcasts to (N, 1, H, W), the pixels that the share is of; all by default.

    Returns:
        A number in [0, 1]; NaN if no pixel counts.

    Raises:
        ValueError: the images are not RGB bytes, or have a single pixel, which has no neighbours.

    Example:
        >>> import torch
        >>> from lvd_lightning.runs.sample_figures import isolated_pixels
        >>> images = torch.zeros(1, 3, 4, 5, dtype=torch.uint8)
        >>> images[0, 0, 1, 1] = 61  # one red pixel in the dark
        >>> isolated_pixels(images)
        0.05
    """
    _check(images)
    return _Totals().add(images, images.shape[-1], counted).isolated_pixels


def border_step(images: Tensor, patch_size: int, counted: Tensor | None = None) -> tuple[float, float]:
    """How much more the luma changes across the borders of patches than inside of them.

    A step is the absolute difference of BT.709 luma, 0.2126 R + 0.7152 G + 0.0722 B, of two pixels side by side or one
    above the other. In photographs borders of patches are nothing special: the ratio is close to 1.

    Args:
        images: uint8 RGB, with shape (N, 3, H, W).
        patch_size: the side of the patches that tile the images.
        counted: bool that broadcasts to (N, 1, H, W); steps count that lead to or from such a pixel, all by default.

    Returns:
        The mean step across borders over the mean step inside of patches, and the latter, in levels; NaN where there
        are no such steps.

    Raises:
        ValueError: the images are not RGB bytes or have a single pixel, or patches do not tile them.

    Example:
        >>> import torch
        >>> from lvd_lightning.runs.sample_figures import border_step
        >>> row = torch.tensor([10, 12, 18, 20], dtype=torch.uint8)  # patches of two pixels: steps of 2, 6 and 2
        >>> ratio, inside = border_step(row.expand(1, 3, 4, 4), 2)
        >>> ratio, inside  # half of the steps are up and down, and are 0
        (3.0, 1.0)
    """
    _check(images)
    if patch_size < 1 or images.shape[-2] % patch_size or images.shape[-1] % patch_size:
        height, width = images.shape[-2:]
        raise ValueError(f"patch_size: got {patch_size}, expected a divisor of both sides of {height} x {width} images")
    totals = _Totals().add(images, patch_size, counted)
    return totals.border_step, totals.inside_step


@torch.inference_mode()
def sample_figures(
    circuit: AssembledCircuit, data: VisibleData, ranks: Ranks, seed: int, max_images: int = MAX_IMAGES
) -> dict[str, Any]:
    """The figures of what a circuit draws, beside those of test images; all ranks have to call.

    Every batch of samples has a generator of its own, derived from `seed`: the ranks share the batches, and figures do
    not depend on how many there are.

    Args:
        circuit: the model, on the ranks' device.
        data: images; with `is_color` if there are codes that are no colour.
        ranks: the processes that share the work.
        seed: the seed of the run.
        max_images: so many samples, and at most so many test images.

    Returns:
        "samples": {"isolated_pixels", "border_step", "inside_step", the same of test images with "_test" appended,
        "no_color": the share of pixels whose code is no colour}; "completions": the same of test images one half of
        which was drawn given the other, where only pixels that were drawn count, in the test images as well;
        "redrawn": those of test images drawn anew given their latent values, which the prior has no part in;
        "num_samples" and "num_completions". What there is not is absent, such as a step where nothing changes, and
        completions of a model that has no `inpaint`.
    """
    num_test = min(max_images, data.num_examples("test"))
    row_N = torch.linspace(0, data.num_examples("test") - 1, num_test).long()
    observed_N1HW = half_masks(num_test, *data.image_shape[1:])
    drawn, completed, redrawn, test, test_halves = (_Totals() for _ in range(5))
    patch_size = int(data.parts.shape[-1])

    def add(totals: _Totals, images: Tensor, counted: Tensor | None = None) -> None:
        totals.add(data.to_rgb(images), patch_size, counted)

    for number, size in batches(max_images, ranks):
        stop_if_requested()
        generator = generator_for(seed, EVALUATE, "samples", number, device=ranks.device)
        images = circuit.sample(size, generator=generator).cpu()
        add(drawn, images)
        drawn.add_colors(data, images)
    can_complete = hasattr(circuit, "inpaint")
    for number, size in batches(num_test, ranks):
        stop_if_requested()
        chosen = slice(number * BATCH, number * BATCH + size)
        original, observed = data.batch("test", row_N[chosen]), observed_N1HW[chosen]
        add(test, original)
        if not can_complete:
            continue
        generator = generator_for(seed, EVALUATE, "completions", number, device=ranks.device)
        images = circuit.inpaint(original.to(ranks.device), observed.to(ranks.device), generator=generator).cpu()
        generator = generator_for(seed, EVALUATE, "redrawn", number, device=ranks.device)
        again = circuit.redraw(original.to(ranks.device), generator=generator).cpu()
        add(redrawn, again)
        redrawn.add_colors(data, again)
        add(test_halves, original, ~observed)
        add(completed, images, ~observed)
        completed.add_colors(data, images, ~observed)
    for totals in (drawn, completed, redrawn, test, test_halves):
        totals.sums = ranks.sum(totals.sums)
    samples = {"samples": {**_figures(drawn), **_figures(test, "_test")}, "num_samples": max_images}
    if not can_complete:
        return samples
    return {
        **samples,
        "completions": {**_figures(completed), **_figures(test_halves, "_test")},
        "redrawn": _figures(redrawn),
        "num_completions": num_test,
    }


class _Totals:
    """What the figures are quotients of, over batches of images: whole numbers, so that no order of adding matters."""

    def __init__(self) -> None:
        self.sums = torch.zeros(8, dtype=torch.float64)

    def add(self, images: Tensor, patch_size: int, counted: Tensor | None = None) -> "_Totals":
        """Add images uint8 (N, 3, H, W), a few at a time."""
        pixels_N1HW = torch.ones_like(images[:, :1], dtype=torch.bool)
        if counted is not None:
            pixels_N1HW &= counted
        for part, part_counted in zip(images.split(BATCH), pixels_N1HW.split(BATCH), strict=True):
            counted_NHW = part_counted[:, 0]
            red, green, blue = part.int().unbind(1)
            luma_NHW = LUMA_R * red + LUMA_G * green + LUMA_B * blue  # in units of 1 / LUMA_UNIT
            self.sums[0] += (_isolated(part) & counted_NHW).sum()
            self.sums[1] += counted_NHW.sum()
            for luma, where in ((luma_NHW, counted_NHW), (luma_NHW.mT, counted_NHW.mT)):
                step = (luma[..., 1:] - luma[..., :-1]).abs()
                counts = where[..., 1:] | where[..., :-1]
                across = torch.arange(1, luma.shape[-1], device=luma.device) % patch_size == 0
                self.sums[2] += (step * (counts & across)).sum()
                self.sums[3] += (counts & across).sum()
                self.sums[4] += (step * (counts & ~across)).sum()
                self.sums[5] += (counts & ~across).sum()
        return self

    def add_colors(self, data: VisibleData, images: Tensor, counted: Tensor | None = None) -> None:
        """Add whether the pixels of images (N, C, H, W), encoded, are colours; nothing for data where all are."""
        is_color = getattr(data, "is_color", None)
        if is_color is None:
            return
        no_color_NHW = ~is_color(images)
        counted_NHW = torch.ones_like(no_color_NHW) if counted is None else counted[:, 0].expand_as(no_color_NHW)
        self.sums[6] += (no_color_NHW & counted_NHW).sum()
        self.sums[7] += counted_NHW.sum()

    @property
    def isolated_pixels(self) -> float:
        return float(self.sums[0] / self.sums[1])

    @property
    def border_step(self) -> float:
        return float(self.sums[2] / self.sums[3] / (self.sums[4] / self.sums[5]))

    @property
    def inside_step(self) -> float:
        return float(self.sums[4] / self.sums[5]) / LUMA_UNIT

    @property
    def no_color(self) -> float:
        return float(self.sums[6] / self.sums[7])


def _figures(totals: _Totals, ending: str = "") -> dict[str, float]:
    """The figures that there are, by name."""
    names = ("isolated_pixels", "border_step", "inside_step", "no_color")
    found = {f"{name}{ending}": getattr(totals, name) for name in names}
    return {name: value for name, value in found.items() if math.isfinite(value)}


def batches(count: int, ranks: Ranks) -> Iterator[tuple[int, int]]:
    """The number and the size of each of this rank's batches of `count` images."""
    for number in ranks.share(torch.arange(-(-count // BATCH))).tolist():
        yield number, min(BATCH, count - number * BATCH)


def _isolated(images: Tensor) -> Tensor:
    """Whether pixels of images uint8 (N, 3, H, W) are isolated, bool (N, H, W)."""
    images = images.short()
    height, width = images.shape[-2:]
    isolated_NHW = torch.ones_like(images[:, 0], dtype=torch.bool)
    for down, right in _NEIGHBOURS:
        here = (..., slice(max(0, -down), height - max(0, down)), slice(max(0, -right), width - max(0, right)))
        there = (..., slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right)))
        isolated_NHW[here] &= (images[here] - images[there]).abs().amax(1) > ISOLATED
    return isolated_NHW


def _check(images: Tensor) -> None:
    fits = images.dtype == torch.uint8 and images.ndim == 4 and images.shape[1] == 3
    if not fits or images.shape[2] * images.shape[3] < 2:
        raise ValueError(
            f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (N, 3, H, W) of several pixels"
        )

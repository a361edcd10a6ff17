"""A picture with missing pixels, completed: samples, the mean, the most likely completion, and what is uncertain.

Shapes: S samples, n tiles, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.checks import check_at_least, check_choice, check_counts, expect
from lvd_lightning.color import crop_region
from lvd_lightning.files import write_atomically
from lvd_lightning.models.decoding import max_product
from lvd_lightning.runs.pictures import grid, save_image
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.folders import check_place
from lvd_lightning.use.pictures import Picture, fitted, joined, tiled
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.sampling import write_png
from lvd_lightning.use.trained import Trained

__all__ = ["ANIMATIONS", "Completed", "inpaint"]

#: Kinds of animation, by the ending of their files.
ANIMATIONS = ("gif", "webp")
_GREY = 128
#: Milliseconds that one picture of an animation is seen, and pixels that its shorter side has at least.
_MILLISECONDS, _SIDE = 400, 192
#: Pictures that are completed together.
_BATCH = 16


@dataclass(frozen=True)
class Completed:
    """uint8 RGB pictures (3, H, W), but for `samples` (S, 3, H, W).

    given: what the circuit was given, the rest grey.
    mean: the conditional mean of every code, shown as a colour.
    best: max-product decoding.
    deviation: conditional standard deviation (H, W) of the luma, in codes of its channel; of RGB and grey pictures the
        root of the mean variance over channels.
    """

    original: Tensor
    given: Tensor
    samples: Tensor
    mean: Tensor
    best: Tensor
    deviation: Tensor


def inpaint(
    trained: Trained,
    picture: Picture,
    missing: Callable[[tuple[int, int]], Tensor],
    out: Path,
    *,
    num_samples: int = 8,
    fit: str | None = None,
    animation: str = "gif",
    seed: int = 0,
) -> Completed:
    """Complete a picture, and write what was found into a folder.

    `grid.png`: the picture, what is given, mean, most likely completion, deviation (bright: uncertain), then samples.
    Each of these as PNG, and `samples.gif` (or `.webp`), in which one sample follows the other.

    Args:
        trained: see `open_trained`.
        picture: what is missing of it may have any values.
        missing: which pixels, bool (H, W), of a picture of the size (H, W) that it is called with: that of the fitted
            picture. See `missing_box` and the others.
        out: the folder.
        num_samples: S.
        fit: what to do with a picture of another size, see `fitted`. Tiles are completed each on its own.
        animation: one of `ANIMATIONS`.
        seed: of the samples.

    Raises:
        ValueError: the picture or the mask do not fit, or a number is out of range.
    """
    check_counts(num_samples=num_samples)
    check_place(out)
    check_at_least(0, seed=seed)
    check_choice(ANIMATIONS, animation=animation)
    tiles = fitted(picture, trained.size, fit)
    is_tiled = fit == "tile"
    expect(not is_tiled or trained.codes.region == "whole", "fit", fit, "another one for a circuit of quadrants")
    size = (int(picture.pixels.shape[1]), int(picture.pixels.shape[2])) if is_tiled else trained.size
    missing_HW = missing(size)
    missing_n1HW = tiled(missing_HW[None], trained.size) if is_tiled else missing_HW[None, None]
    observed = ~crop_region(missing_n1HW, trained.codes.region)
    if bool(observed.all()):
        raise ValueError("mask: nothing is missing in the part of the picture that the circuit models")
    codes = trained.codes.encode(tiles)

    def whole(found: Tensor) -> Tensor:
        """Tiles (n, C, H, W) as the picture that they are of, (C, H', W')."""
        return joined(found, size) if is_tiled else found[0]

    def completed(complete: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        pairs = zip(codes.split(_BATCH), observed.split(_BATCH), strict=True)
        return torch.cat([complete(x.to(trained.device), mask.to(trained.device)).cpu() for x, mask in pairs])

    circuit = trained.circuit
    mean = completed(circuit.expected)
    square = completed(lambda x, mask: circuit.expected(x, mask, lambda values: values.square()))
    best = completed(lambda x, mask: max_product(circuit, x, mask)[0])
    samples = []
    for number in tracked(range(num_samples), "samples", num_samples):
        generator = generator_for(seed, "inpaint", number, device=trained.device)
        drawn = completed(lambda x, mask, random=generator: circuit.inpaint(x, mask, random))  # type: ignore[misc]
        samples.append(whole(trained.codes.to_rgb(drawn)))
    original = trained.codes.to_rgb(codes)
    variance = (square.double() - mean.double().square()).clamp_min(0)
    found = Completed(
        original=whole(original),
        given=whole(torch.where(observed, original, _GREY).to(torch.uint8)),
        samples=torch.stack(samples),
        mean=whole(torch.where(observed, original, trained.codes.to_rgb(mean))),
        best=whole(trained.codes.to_rgb(best)),
        deviation=whole(trained.codes.spread(torch.where(observed, 0.0, variance))[:, None])[0],
    )
    _write(found, out, animation)
    return found


def _write(found: Completed, out: Path, animation: str) -> None:
    out.mkdir(parents=True, exist_ok=True)
    levels = (found.deviation * 255 / found.deviation.max().clamp_min(1e-9)).round().to(torch.uint8)
    deviation = levels.expand(3, -1, -1)
    for name in ("original", "given", "mean", "best"):
        write_png(out / f"{name}.png", getattr(found, name))
    write_png(out / "deviation.png", deviation)
    for number, picture in enumerate(found.samples):
        write_png(out / f"sample_{number:02}.png", picture)
    first = torch.stack([found.original, found.given, found.mean, found.best, deviation])
    save_image(out / "grid.png", grid(torch.cat([first, found.samples]), 5, gap=2), found.original.shape[-1])
    _animate(out / f"samples.{animation}", found.samples)


def _animate(path: Path, pictures: Tensor) -> None:
    from PIL import Image

    height, width = pictures.shape[-2:]
    scale = max(1, -(-_SIDE // min(height, width)))
    images = [
        Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy()).resize(
            (scale * width, scale * height), Image.Resampling.NEAREST
        )
        for picture in pictures
    ]
    first, *others = images
    settings: dict[str, Any] = {"save_all": True, "append_images": others, "duration": _MILLISECONDS, "loop": 0}
    if path.suffix == ".webp":
        settings["lossless"] = True
    write_atomically(path, lambda target: first.save(target, **settings))

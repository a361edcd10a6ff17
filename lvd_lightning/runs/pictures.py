"""Pictures of a run: samples, completed images, patches of clusters, likelihoods over time."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.context import Data, VisibleData
from lvd_lightning.files import write_atomically
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.runs.metrics_file import read_metrics
from lvd_lightning.runs.progress import Noted
from lvd_lightning.runs.run import RunStage
from lvd_lightning.units import Unit

__all__ = [
    "cluster_picture",
    "curve_picture",
    "gap_picture",
    "grid",
    "growth_picture",
    "growth_series",
    "half_masks",
    "inpainting_picture",
    "patches_picture",
    "sample_picture",
    "save_image",
]

_WHITE, _GREY = 255, 128
_MIN_SIDE = 96  # pixels on the screen that one image takes at least


def grid(images: Tensor, columns: int, gap: int = 1) -> Tensor:
    """Images uint8 (N, 3, H, W) side by side, row by row, on white: uint8 (3, H', W')."""
    count, channels, height, width = images.shape
    rows = math.ceil(count / columns)
    canvas = torch.full((channels, rows * (height + gap) - gap, columns * (width + gap) - gap), _WHITE).to(torch.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        canvas[:, top : top + height, left : left + width] = image
    return canvas


def sample_picture(path: Path, circuit: AssembledCircuit, data: VisibleData, generator: torch.Generator) -> None:
    """64 samples, eight in a row."""
    drawn = data.to_rgb(circuit.sample(64, generator=generator).cpu())
    save_image(path, grid(drawn, 8), data.image_shape[1])


def inpainting_picture(path: Path, circuit: AssembledCircuit, data: VisibleData, generator: torch.Generator) -> None:
    """Test images in four rows: the original, the half that the circuit is given, a sample given that, and the mean."""
    count = min(12, data.num_examples("test"))
    device = circuit.prior.device
    original = data.batch("test", torch.linspace(0, data.num_examples("test") - 1, count).long())
    observed = half_masks(count, *data.image_shape[1:])
    completed = circuit.inpaint(original.to(device), observed.to(device), generator=generator).cpu()
    mean = data.to_rgb(circuit.expected(original.to(device), observed.to(device)).cpu())
    original, completed = data.to_rgb(original), data.to_rgb(completed)
    mean = torch.where(observed, original, mean)
    masked = torch.where(observed, original, _GREY).to(torch.uint8)
    save_image(path, grid(torch.cat([original, masked, completed, mean]), count), data.image_shape[1])


def half_masks(count: int, height: int, width: int) -> Tensor:
    """Which pixels are given, bool (count, 1, H, W): by turns the left half and the upper half."""
    observed = torch.zeros(count, 1, height, width, dtype=torch.bool)
    observed[0::2, :, :, : width // 2] = True
    observed[1::2, :, : height // 2] = True
    return observed


def cluster_picture(
    path: Path, latents: Path, data: VisibleData, generator: torch.Generator, examples: int = 16
) -> None:
    """Training patches of 24 clusters, one cluster a row, from the most to the least used one.

    Where every position has clusters of its own, those of the middle position are shown.
    """
    z_NP = load_assignments(latents, "train")
    position = None if load_latents_info(latents)["pooled"] else z_NP.shape[1] // 2
    z_NP = z_NP if position is None else z_NP[:, position : position + 1]
    uses = z_NP.flatten().bincount()
    by_use = uses.argsort(descending=True)[: int((uses > 0).sum())]
    chosen = by_use[torch.linspace(0, len(by_use) - 1, min(24, len(by_use))).long()]
    patches_picture(path, z_NP, chosen.tolist(), data, generator, examples, position or 0)


def patches_picture(
    path: Path,
    z_NP: Tensor,
    clusters: Sequence[int],
    data: VisibleData,
    generator: torch.Generator,
    examples: int = 16,
    first: int = 0,
) -> None:
    """Random training patches of clusters, one cluster a row; a row without patches is white.

    z_NP: int64 (N, P), the cluster of every patch, of the positions from `first` on.
    """
    rows = []
    for cluster in clusters:
        members = (z_NP.flatten() == cluster).nonzero()[:, 0]
        members = members[torch.randperm(len(members), generator=generator)[:examples]]
        rows.append(_patches(data, members, z_NP.shape[1], first, examples))
    save_image(path, grid(torch.cat(rows), examples), data.parts.shape[1])


def growth_picture(path: Path, metrics: Path, data: Data) -> bool:
    """Heads, parameters and validation likelihood by epoch, from a metrics.csv with edits; whether there were any."""
    series = growth_series(read_metrics(metrics), data.unit)
    if not series:
        return False
    figure = _figure(figsize=(7, 7))
    titles = ("heads", "parameters", _axis(data, " (validation)"))
    epochs, *curves = zip(*series)
    for number, (title, values) in enumerate(zip(titles, curves)):
        axes = figure.add_subplot(3, 1, number + 1, ylabel=title, xlabel="epoch" if number == 2 else "")
        axes.plot([epoch + 1 for epoch in epochs], values, marker=".", drawstyle="default" if number == 2 else "steps")
        if number < 2:
            axes.set_ylim(bottom=0)
    write_atomically(path, figure.savefig)
    return True


def growth_series(rows: Sequence[Mapping[str, str]], unit: Unit) -> list[tuple[int, float, float, float]]:
    """(epoch, heads, parameters, validation likelihood) of every validated epoch, if circuits were edited in any.

    rows: of a metrics.csv; edits are rows with "<edit>/heads_before", "<edit>/heads_after" and so on.
    """
    names, series = ("heads", "parameters"), []
    current = {name: next(filter(None, (_ending(row, f"/{name}_before") for row in rows)), "") for name in names}
    if not all(current.values()):
        return []
    for row in rows:
        current = {name: _ending(row, f"/{name}_after") or value for name, value in current.items()}
        if row.get(f"val/{unit.name}"):
            numbers = [float(current[name]) for name in names]
            series.append((int(float(row["epoch"])), numbers[0], numbers[1], float(row[f"val/{unit.name}"])))
    return series


def _ending(row: Mapping[str, str], ending: str) -> str:
    """The value of a row in a column that ends like this, or an empty string."""
    return next((value for name, value in row.items() if name.endswith(ending) and value), "")


def _patches(data: VisibleData, members: Tensor, num_positions: int, first: int, count: int) -> Tensor:
    """RGB patches (count, 3, p, p) of flat (image, position) numbers, filled up with white."""
    images = data.batch("train", members // num_positions)
    patches_nPD = data.parts.split(images)
    chosen_nD = patches_nPD[torch.arange(len(members)), first + members % num_positions]
    rgb = data.to_rgb(chosen_nD.reshape(-1, *data.parts.shape))
    blank = torch.full((count - len(members), *rgb.shape[1:]), _WHITE, dtype=torch.uint8)
    return torch.cat([rgb, blank])


def curve_picture(path: Path, stages: Sequence[RunStage], data: Data) -> None:
    """Every stage's likelihood curves, train solid and val dashed, against the seconds of all stages so far.

    A baseline's clock starts at zero, and counts its own share of the stage that trains all of them.

    stages: the finished ones, in order.
    """
    figure = _figure(figsize=(9, 5))
    axes = figure.add_subplot(ylabel=_axis(data), xlabel="seconds")
    unit, start = data.unit.name, 0.0
    for stage in stages:
        rows = read_metrics(stage.folder / "metrics.csv")
        if stage.baselines():
            for name, figures in stage.baselines().items():
                _draw_curves(axes, rows, f"{name}_{unit}", f"baseline {name}", 0.0, figures["seconds"])
            continue
        for name in (unit, f"lvd_objective_{unit}"):
            _draw_curves(axes, rows, name, stage.name if name == unit else f"{stage.name}, log p(x, z)", start)
        start += stage.figures().get("seconds", 0.0)
        axes.axvline(start, color="0.85", linewidth=1, zorder=0)
        place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "rotation": 90, "ha": "right", "va": "top"}
        axes.annotate(stage.name, (start, 0.99), fontsize=7, color="0.5", **place)
    axes.set_xlim(left=0.0)
    if axes.get_legend_handles_labels()[0]:
        _ignore_outliers(axes, data.unit)
        axes.legend(fontsize=8)
        write_atomically(path, figure.savefig)


def gap_picture(path: Path, figures: Sequence[tuple[str, float]], data: Data) -> None:
    """A point for the likelihood of each title, labelled with it."""
    figure = _figure(figsize=(7, 0.6 + 0.4 * len(figures)))
    axes = figure.add_subplot(xlabel=_axis(data, ", test examples"))
    values = [value for _, value in figures]
    axes.plot(values, range(len(values)), "o", color="0.3")
    axes.set_yticks(range(len(values)), [title for title, _ in figures])
    axes.set_ylim(-0.5, len(values) - 0.5)
    for place, value in enumerate(values):
        if math.isfinite(value):
            axes.annotate(f"{value:.3f}", (value, place), xytext=(7, -3), textcoords="offset points", fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    finite = [value for value in values if math.isfinite(value)] or [1.0]
    spread = max(max(finite) - min(finite), 0.05)
    axes.set_xlim(min(finite) - 0.1 * spread, max(finite) + 0.2 * spread)
    axes.invert_yaxis()
    write_atomically(path, figure.savefig)


def _axis(data: Data, what: str = "") -> str:
    """The unit written out, for an axis, with the data's protocol."""
    return f"{data.unit.title}{what}{Noted(data.unit.name, data.protocol).beside(data.unit.name)}"


def _draw_curves(
    axes: Any, rows: Sequence[Mapping[str, str]], name: str, label: str, start: float, total: float | None = None
) -> None:
    """One metric's curves on training and validation images in one colour.

    start: added to the seconds; total: what the last row's seconds stand for.
    """
    scale = 1.0 if total is None or not rows else total / max(float(rows[-1]["seconds"]), 1e-9)
    color = None
    for split, style in (("train", "-"), ("val", "--")):
        metric = f"{split}/{name}"
        points = [(start + scale * float(row["seconds"]), float(row[metric])) for row in rows if row.get(metric)]
        if points:
            line = axes.plot(*zip(*points), style, marker=".", markersize=4, color=color, label=f"{label}, {split}")
            color = line[0].get_color()


def _ignore_outliers(axes: Any, unit: Unit) -> None:
    """The first epochs of a random circuit would press everything else into one line."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines() if not line.get_label().startswith("_")])
    sign = 1 if unit.lower_is_better else -1
    best, middle, worst = (float(found) for found in np.quantile(sign * values, (0.0, 0.5, 1.0)))
    limit = max(min(worst, middle + 4 * (middle - best) + 0.5), best + 0.2)
    axes.set_ylim(*sorted((sign * (best - 0.1), sign * limit)))


def save_image(path: Path, image: Tensor, side: int) -> None:
    """Write uint8 RGB (3, H, W) as PNG, enlarged so that what is `side` pixels wide in it can be looked at."""
    from matplotlib.image import imsave

    scale = max(1, math.ceil(_MIN_SIDE / side)) if side >= 16 else 8
    pixels = image.permute(1, 2, 0).repeat_interleave(scale, 0).repeat_interleave(scale, 1).numpy()
    write_atomically(path, lambda target: imsave(target, pixels))


def _figure(**arguments: Any) -> Any:
    """An empty one; matplotlib is imported when something is drawn."""
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **arguments)

"""Bits per dimension of pictures: which are unusual, where, and how well that tells two sets apart.

Shapes: N pictures, n tiles of one, H x W pixels.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lvd_lightning.checks import check_at_least, check_counts
from lvd_lightning.files import write_atomically, write_json
from lvd_lightning.models.surprise import part_surprise, pixel_surprise
from lvd_lightning.runs.pictures import grid, save_image
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.folders import check_place
from lvd_lightning.use.pictures import Picture, PictureSet, fitted, joined
from lvd_lightning.use.progress import tracked
from lvd_lightning.use.roc import auroc, roc_curve
from lvd_lightning.use.trained import Trained

__all__ = ["Scored", "Scores", "bits_per_dimension", "score"]

#: Pixels of pictures that are looked at together, whatever their size.
_BATCH_PIXELS = 1 << 18


@dataclass(frozen=True)
class Scored:
    """A picture's bits per dimension, and log p in nats (of all its tiles together). source: number of its set."""

    name: str
    bpd: float
    log_prob: float
    source: int = 0


@dataclass(frozen=True)
class Scores:
    """Pictures from the least to the most likely one.

    auroc: how well bits per dimension tell the second set from the first; None if there is one set.
    """

    pictures: list[Scored]
    auroc: float | None = None

    def bpd(self, source: int = 0) -> list[float]:
        """Bits per dimension of one set."""
        return [found.bpd for found in self.pictures if found.source == source]


def bits_per_dimension(trained: Trained, tiles: Tensor) -> tuple[float, float]:
    """Bits per dimension and log p in nats of the tiles of one picture, uint8 (n, 3, H, W)."""
    with torch.no_grad():
        log_n = trained.circuit.log_prob(trained.codes.encode(tiles).to(trained.device)).double()
    total = float(log_n.sum())
    return -total / (len(tiles) * trained.circuit.num_dims * math.log(2)), total


def score(
    trained: Trained,
    sets: Sequence[PictureSet],
    out: Path,
    *,
    fit: str | None = None,
    num_shown: int = 12,
    max_images: int | None = None,
    seed: int = 0,
) -> Scores:
    """Score pictures, and write what was found into a folder.

    `scores.csv`: rank, set, name, bits per dimension and log p in nats of every picture, the least likely first.
    `summary.json`: means, and the AUROC of two sets. `surprise/`: for the least likely pictures of the last set the
    picture beside how unexpected every patch, and every pixel, is given all the rest (exact conditionals, in bits per
    dimension); `outliers.png` has these below each other. `roc.png`: of two sets.

    Args:
        trained: see `open_trained`.
        sets: one or two; of two the second is expected to be the unusual one.
        out: the folder.
        fit: what to do with pictures of another size, see `fitted`.
        num_shown: of how many pictures the surprise is drawn.
        max_images: at most so many of each set, chosen at random.
        seed: of that choice.

    Raises:
        ValueError: more than two sets, a picture that does not fit, or a number out of range.
    """
    check_counts(max_images=max_images)
    check_place(out)
    check_at_least(0, num_shown=num_shown, seed=seed)
    if not 1 <= len(sets) <= 2:
        raise ValueError(f"score: got {len(sets)} sets of pictures, expected one or two")
    found: list[Scored] = []
    where: dict[tuple[int, str], int] = {}
    for source, pictures in enumerate(sets):
        chosen = _chosen(len(pictures), max_images, seed)
        where |= {(source, pictures.names[number]): number for number in chosen}
        named = ((pictures[number]) for number in chosen)
        found += [
            Scored(picture.name, *bits_per_dimension(trained, tiles), source)
            for picture, tiles in _fitted(trained, tracked(named, f"set {source + 1}", len(chosen)), fit)
        ]
    found.sort(key=lambda one: (-one.bpd, one.source, one.name))
    last = len(sets) - 1
    scores = Scores(found)
    if last:
        scores = Scores(found, auroc(scores.bpd(0), scores.bpd(1)))
    out.mkdir(parents=True, exist_ok=True)
    shown = [one for one in found if one.source == last][:num_shown]
    rows = [_surprise(trained, sets[last][where[last, one.name]], fit) for one in tracked(shown, "shown", len(shown))]
    for number, (one, row) in enumerate(zip(shown, rows, strict=True)):
        (out / "surprise").mkdir(exist_ok=True)
        name = f"{number + 1:03}_{Path(one.name).stem}.png"
        save_image(out / "surprise" / name, grid(row, 3, gap=2), row.shape[-1])
    if rows and len({row.shape for row in rows}) == 1:
        save_image(out / "outliers.png", grid(torch.cat(rows), 3, gap=2), rows[0].shape[-1])
    if last:
        _draw_roc(out / "roc.png", scores)
    write_atomically(out / "scores.csv", _table(found))
    write_json(out / "summary.json", _summary(trained, scores, len(sets)), indent=2)
    return scores


def _chosen(count: int, limit: int | None, seed: int) -> list[int]:
    if limit is None or limit >= count:
        return list(range(count))
    order = torch.randperm(count, generator=generator_for(seed, "score"))
    return sorted(order[:limit].tolist())


def _fitted(trained: Trained, pictures: Iterator[Picture], fit: str | None) -> Iterator[tuple[Picture, Tensor]]:
    for picture in pictures:
        yield picture, fitted(picture, trained.size, fit)


def _surprise(trained: Trained, picture: Picture, fit: str | None) -> Tensor:
    """The picture, and its surprise by patches and by pixels as colours: uint8 (3, 3, H, W)."""
    tiles = fitted(picture, trained.size, fit)
    codes = trained.codes.encode(tiles).to(trained.device)
    channels, height, width = trained.shape
    size = trained.parts.patch_size
    patch_maps, pixel_maps = [], []
    for chunk in codes.split(max(1, _BATCH_PIXELS // (height * width * 16))):
        patch_nP = part_surprise(trained.circuit, chunk) / (channels * size**2 * math.log(2))
        rows, columns = trained.parts.grid
        patch_maps.append(patch_nP.view(-1, rows, columns).repeat_interleave(size, 1).repeat_interleave(size, 2))
        pixel_maps.append(pixel_surprise(trained.circuit, chunk) / (channels * math.log(2)))
    shown = trained.codes.to_rgb(codes).cpu()
    maps = [torch.cat(found).cpu() for found in (patch_maps, pixel_maps)]
    if fit == "tile" and trained.codes.region == "whole":
        size_of = (int(picture.pixels.shape[1]), int(picture.pixels.shape[2]))
        shown, *maps = (joined(found, size_of)[None] for found in (shown, *(found[:, None] for found in maps)))
        maps = [found[:, 0] for found in maps]
    highest = max(float(found.max()) for found in maps)
    return torch.cat([shown[:1], *(_colored(found[:1], highest) for found in maps)])


def _colored(values: Tensor, highest: float) -> Tensor:
    """Numbers (n, H, W) from 0 to `highest` as colours, uint8 (n, 3, H, W): from dark to bright."""
    from matplotlib import colormaps

    rgba = colormaps["inferno"](values.double().clamp(0, highest).div(max(highest, 1e-9)).numpy(), bytes=True)
    return torch.from_numpy(rgba[..., :3].copy()).permute(0, 3, 1, 2)


def _draw_roc(path: Path, scores: Scores) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for source, label in ((0, "first set"), (1, "second set")):
        left.hist(scores.bpd(source), bins=40, alpha=0.6, density=True, label=label)
    left.set(xlabel="bits per dimension", ylabel="density")
    left.legend()
    right.plot(*roc_curve(scores.bpd(0), scores.bpd(1)))
    right.plot([0, 1], [0, 1], color="0.8", zorder=0)
    right.set(xlabel="share of the first set", ylabel="share of the second set", title=f"AUROC {scores.auroc:.4f}")
    write_atomically(path, figure.savefig)


def _table(found: Sequence[Scored]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rank", "set", "name", "bpd", "log_p"])
    for rank, one in enumerate(found, 1):
        writer.writerow([rank, one.source + 1, one.name, f"{one.bpd:.6f}", f"{one.log_prob:.4f}"])
    return text.getvalue()


def _summary(trained: Trained, scores: Scores, num_sets: int) -> dict[str, object]:
    sets = [scores.bpd(source) for source in range(num_sets)]
    summary: dict[str, object] = {
        "circuit": str(trained.folder),
        "codes": trained.codes.plain(),
        "sets": [{"count": len(bpd), "mean_bpd": sum(bpd) / len(bpd)} for bpd in sets],
    }
    return summary if scores.auroc is None else {**summary, "auroc": scores.auroc}

"""How circuits grew, as trees of heads: which head is a copy of which, since when, and what it looks like."""

from __future__ import annotations

from pathlib import Path

import torch

from lvd_lightning.files import write_atomically
from lvd_lightning.growing import Ancestry
from lvd_lightning.use.explained_patches import mean_patches
from lvd_lightning.use.trained import Trained

__all__ = ["HeadTree", "draw_heads", "heads_of"]

#: Heads in a picture, whole circuits of them.
_MOST_LINES = 64

HeadTree = tuple[Ancestry, list[list[int]]]


def heads_of(trained: Trained) -> HeadTree | None:
    """The tree of heads and how many training patches each has; None if that was not recorded.

    Raises:
        ValueError: the file is damaged.
    """
    folder = trained.folder if trained.run is None else trained.run.artefact("conditionals")
    found = None if folder is None else Ancestry.read(folder)
    if found is None or found[0].num_heads != [each.num_heads for each in trained.circuit.conditional.structures]:
        return None
    return found


def draw_heads(trained: Trained, tree: HeadTree, path: Path) -> list[int]:
    """A line for every head, from the epoch of its copy on, hanging from the head that it grew from.

    Lines are as thick as the head's share of its circuit's training patches; at their end stands the head's mean patch.

    Returns:
        The circuits that are drawn: those that grew, the ones with the most patches first, as far as there is room.
    """
    from matplotlib.figure import Figure

    ancestry, patches = tree
    grown = [g for g, heads in enumerate(ancestry.heads) if any(head.parent is not None for head in heads)]
    grown.sort(key=lambda g: -sum(patches[g]))
    chosen: list[int] = []
    for g in grown:
        if not chosen or sum(len(ancestry.heads[c]) for c in [*chosen, g]) <= _MOST_LINES:
            chosen.append(g)
    if not chosen:
        return []
    lines = [(g, h) for g in chosen for h in ancestry.ordered(g)]
    last = max(head.epoch for g in chosen for head in ancestry.heads[g])
    end = last + max(1.0, 0.2 * last)
    height = {line: number + chosen.index(line[0]) for number, line in enumerate(lines)}
    figure = Figure(figsize=(7, 1 + 0.24 * (len(lines) + len(chosen))), layout="constrained")
    axes = figure.add_subplot(xlabel="epoch at whose start heads were copied")
    for g, h in lines:
        head, y = ancestry.heads[g][h], height[g, h]
        share = patches[g][h] / max(1, sum(patches[g]))
        axes.plot([head.epoch, end], [y, y], color="tab:blue", linewidth=0.6 + 6 * share, solid_capstyle="butt")
        if head.parent is not None:
            axes.plot([head.epoch] * 2, [height[g, head.parent], y], color="0.5", linewidth=0.8)
    _draw_means(trained, lines, height, end, axes)
    first_lines = [height[g, ancestry.ordered(g)[0]] for g in chosen]
    axes.set_yticks(first_lines, [f"circuit {g}, {sum(patches[g]):,} patches" for g in chosen], fontsize=7)
    axes.set_xlim(-0.02 * end, 1.22 * end)
    axes.set_xticks(sorted({head.epoch for g in chosen for head in ancestry.heads[g]}))
    axes.invert_yaxis()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))
    return chosen


def _draw_means(
    trained: Trained, lines: list[tuple[int, int]], height: dict[tuple[int, int], int], end: float, axes: object
) -> None:
    """The mean patch of every head behind the end of its line, and the head's number."""
    from matplotlib.axes import Axes
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    assert isinstance(axes, Axes)
    circuit_V, head_V = torch.tensor(lines).T
    zoom = 12 / trained.parts.patch_size  # pixels on the screen
    for line, patch in zip(lines, mean_patches(trained, circuit_V, head_V), strict=True):
        image = OffsetImage(patch.permute(1, 2, 0).numpy(), zoom=zoom, interpolation="nearest")
        axes.add_artist(AnnotationBbox(image, (1.05 * end, height[line]), frameon=False))
        axes.text(1.1 * end, height[line], f"head {line[1]}", fontsize=7, va="center")

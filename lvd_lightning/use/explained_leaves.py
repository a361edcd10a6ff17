"""What leaves have learnt: where the units of each family sit, how wide they are, what they leave open.

Shapes: U units, V values of a variable.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lvd_lightning.coding.leaf_tables import leaf_table
from lvd_lightning.files import write_atomically
from lvd_lightning.use.trained import Trained

__all__ = ["LEAF_COLUMNS", "LeafUnits", "draw_leaves", "leaf_lines", "leaf_rows", "leaf_units"]

LEAF_COLUMNS = ("channel", "row", "column", "family", "units", "bits", "of")


@dataclass(frozen=True)
class LeafUnits:
    """All units of one family at one variable of a patch.

    channel, row, column: of the variable. num_values: that it may take. num_units: how many there are.
    mean_U, deviation_U: of each unit, in values. bits_U: its entropy. All three are empty for families of densities.
    """

    channel: int
    row: int
    column: int
    family: str
    num_values: int
    num_units: int
    mean_U: Tensor
    deviation_U: Tensor
    bits_U: Tensor


def leaf_units(trained: Trained) -> list[LeafUnits]:
    """The units of every variable of a patch, by family, of all circuits together."""
    graphs = trained.circuit.conditional.to_graph()
    assert isinstance(graphs, list)
    side, found = trained.parts.patch_size, []
    nodes: dict[tuple[int, str], list[Any]] = {}
    for graph in graphs:
        for node in graph.nodes:
            if node.kind == "input":
                nodes.setdefault((int(node.variable), type(node.distribution).__name__), []).append(node)
    for (variable, family), members in sorted(nodes.items()):
        moments = [_moments(node) for node in members if node.distribution.num_outcomes and node.params is not None]
        mean_U, deviation_U, bits_U = torch.cat(moments, 1) if moments else torch.zeros(3, 0)
        channel, place = divmod(variable, side**2)
        num_values = trained.parts.num_categories[channel]
        num_units = sum(node.num_units for node in members)
        where = (channel, place // side, place % side)
        found.append(LeafUnits(*where, family, num_values, num_units, mean_U, deviation_U, bits_U))
    return found


def leaf_rows(leaves: Sequence[LeafUnits]) -> list[tuple[Any, ...]]:
    """Rows of a table with the columns `LEAF_COLUMNS`; bits: the mean entropy of a unit; of: that of even values."""
    rows = []
    for found in leaves:
        bits = f"{float(found.bits_U.mean()):.3f}" if len(found.bits_U) else ""
        where = (found.channel, found.row, found.column)
        rows.append((*where, found.family, found.num_units, bits, f"{math.log2(found.num_values):.3f}"))
    return rows


def leaf_lines(leaves: Sequence[LeafUnits]) -> list[str]:
    """A Markdown table with a row for every channel and family: quantiles over all of its units."""
    lines = [
        "| channel | family | units | means of units, 10 / 50 / 90 % | deviations, 10 / 50 / 90 % "
        "| bits that a unit leaves open | of |",
        "|---|---|---:|---|---|---:|---:|",
    ]
    for (channel, family), members in _by_channel(leaves).items():
        mean, deviation, bits = (torch.cat([getattr(m, name) for m in members]) for name in _MOMENTS)
        cells = [_quantiles(mean), _quantiles(deviation), f"{float(bits.mean()):.3f}" if len(bits) else ""]
        units = sum(m.num_units for m in members)
        of = f"{math.log2(members[0].num_values):.3f}"
        lines.append(f"| {channel} | {family} | {units:,} | {' | '.join(cells)} | {of} |")
    return lines


def draw_leaves(leaves: Sequence[LeafUnits], path: Path) -> bool:
    """A row for every channel and family: where units sit and how wide they are, what they leave open, and where.

    Returns whether there is anything to draw: densities have no table of values.
    """
    groups = {key: members for key, members in _by_channel(leaves).items() if any(len(m.bits_U) for m in members)}
    if not groups:
        return False
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8 * len(groups)), layout="constrained")
    all_axes = figure.subplots(len(groups), 3, squeeze=False)
    for axes, ((channel, family), members) in zip(all_axes, groups.items(), strict=True):
        mean, deviation, bits = (torch.cat([getattr(m, name) for m in members]).numpy() for name in _MOMENTS)
        axes[0].hist2d(mean, deviation, bins=48, norm=LogNorm())
        axes[0].set(title=f"channel {channel}, {family}", xlabel="mean of a unit", ylabel="standard deviation")
        axes[1].hist(bits, bins=48, color="tab:blue")
        axes[1].set(xlabel="bits that a unit leaves open", ylabel="units", xlim=(0, None))
        axes[1].axvline(math.log2(members[0].num_values), color="0.5", linestyle=":")
        size = (1 + max(m.row for m in members), 1 + max(m.column for m in members))
        where = torch.full(size, torch.nan)
        for m in members:
            where[m.row, m.column] = float(m.bits_U.mean()) if len(m.bits_U) else torch.nan
        shown = axes[2].imshow(where.numpy())
        axes[2].set(title="mean bits by pixel of the patch")
        axes[2].set_axis_off()
        figure.colorbar(shown, ax=axes[2])
    write_atomically(path, figure.savefig)
    return True


_MOMENTS = ("mean_U", "deviation_U", "bits_U")


def _moments(node: Any) -> Tensor:
    """Mean, standard deviation and entropy in bits of every unit of a node, float32 (3, U)."""
    p_UV = leaf_table(node.distribution, node.params)
    value_V = torch.arange(p_UV.shape[1], dtype=torch.float64)
    mean_U = p_UV @ value_V
    deviation_U = (p_UV * (value_V - mean_U[:, None]).square()).sum(1).sqrt()
    bits_U = -torch.where(p_UV > 0, p_UV * p_UV.clamp_min(1e-300).log2(), 0.0).sum(1)
    return torch.stack([mean_U, deviation_U, bits_U]).float()


def _by_channel(leaves: Sequence[LeafUnits]) -> dict[tuple[int, str], list[LeafUnits]]:
    groups: dict[tuple[int, str], list[LeafUnits]] = {}
    for found in sorted(leaves, key=lambda found: (found.channel, found.family)):
        groups.setdefault((found.channel, found.family), []).append(found)
    return groups


def _quantiles(values: Tensor) -> str:
    if not len(values):
        return ""
    ordered = values.sort().values  # torch.quantile has a limit to its size
    return " / ".join(f"{float(ordered[round(q * (len(ordered) - 1))]):.1f}" for q in (0.1, 0.5, 0.9))

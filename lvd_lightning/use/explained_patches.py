"""What heads of a circuit look like: mean patches, patches that are drawn, training patches that were kept.

Shapes: V latent values, G circuits, D variables of a patch, S patches, p x p pixels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.files import write_atomically
from lvd_lightning.latents.assignments import assignments_folder
from lvd_lightning.latents.kept_patches import KeptPatches, load_kept_patches
from lvd_lightning.runs.pictures import grid
from lvd_lightning.seeds import generator_for
from lvd_lightning.use.trained import Trained

__all__ = ["draw_clusters", "drawn_patches", "kept_patches_of", "mean_patches"]

_BLANK = 255


def kept_patches_of(trained: Trained) -> KeptPatches | None:
    """The training patches that the run kept; None for an exported folder, and for runs that kept none."""
    folder = None if trained.run is None else assignments_folder(trained.run)
    found = None if folder is None else load_kept_patches(folder)
    if found is None or found.patch_nD.shape[1] != trained.circuit.conditional.num_variables:
        return None
    return found


def mean_patches(trained: Trained, circuit_V: Tensor, head_V: Tensor) -> Tensor:
    """The mean of heads of some circuits, as uint8 RGB (V, 3, p, p); exact."""
    conditional = trained.circuit.conditional
    place_V, heads_GB = _rows(conditional, circuit_V, head_V)
    nothing_GBD = torch.zeros(*heads_GB.shape, conditional.num_variables, device=heads_GB.device)
    mean_GBD = pc.expectation(
        conditional, lambda values, _: values, x=nothing_GBD, observed=nothing_GBD.bool(), head=heads_GB
    )
    return _rgb(trained, mean_GBD[circuit_V.to(heads_GB.device), place_V.to(heads_GB.device)])


def drawn_patches(trained: Trained, circuit_V: Tensor, head_V: Tensor, count: int, seed: int) -> Tensor:
    """Samples of heads of some circuits, as uint8 RGB (V * S, 3, p, p), `count` = S of each together."""
    conditional = trained.circuit.conditional
    place_V, heads_GB = _rows(conditional, circuit_V, head_V)
    generator = generator_for(seed, "explain", device=trained.device)
    num_rows = heads_GB.shape[1]
    heads_GN = heads_GB.repeat_interleave(count, 1)
    drawn_GND = conditional.sample(num_rows * count, head=heads_GN, generator=generator)
    drawn_GBSD = drawn_GND.view(len(heads_GN), num_rows, count, -1)
    chosen_VSD = drawn_GBSD[circuit_V.to(heads_GB.device), place_V.to(heads_GB.device)]
    return _rgb(trained, chosen_VSD.flatten(0, 1))


def draw_clusters(
    trained: Trained, values: Sequence[int], shares: Sequence[float], position: int, path: Path, count: int, seed: int
) -> bool:
    """A row for each latent value: share, mean, training patches, patches drawn; whether there are training ones.

    position: where the values are looked at, if every position has circuits of its own.
    count: patches of each kind in a row.
    """
    from matplotlib.figure import Figure

    index = trained.circuit.head_index
    value_V = torch.tensor(list(values))
    circuit_V, head_V = (found.cpu() for found in index.locate(value_V, torch.full_like(value_V, position)))
    mean_V = mean_patches(trained, circuit_V, head_V)
    drawn_VS = drawn_patches(trained, circuit_V, head_V, count, seed).unflatten(0, (len(value_V), count))
    kept = kept_patches_of(trained)
    columns: list[tuple[str, Tensor]] = [("mean", mean_V[:, None])]
    if kept is not None:
        real = [_filled(trained, kept.of(value, None if index.tied else position)[:count], count) for value in values]
        columns.append(("training patches", torch.stack(real)))
    columns.append(("drawn by the circuit", drawn_VS))
    blank_V = torch.full_like(mean_V, _BLANK)[:, None]
    parts = [part for _, column in columns for part in (column, blank_V)][:-1]
    rows_VC = torch.cat(parts, 1)
    side = trained.parts.patch_size + 1
    whole = grid(rows_VC.flatten(0, 1), rows_VC.shape[1])
    figure = Figure(figsize=(1.6 + 0.3 * rows_VC.shape[1], 0.6 + 0.3 * len(values)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(whole.permute(1, 2, 0).numpy(), interpolation="nearest")
    labels = [f"{value}: {100 * share:.2f} %" for value, share in zip(values, shares, strict=True)]
    axes.set_yticks([side * (row + 0.5) - 1 for row in range(len(values))], labels, fontsize=7)
    starts, titles = 0, []
    for title, column in columns:
        titles.append((side * (starts + column.shape[1] / 2) - 1, title))
        starts += column.shape[1] + 1
    axes.set_xticks([place for place, _ in titles], [title for _, title in titles], fontsize=7)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    write_atomically(path, lambda target: figure.savefig(target, dpi=150))
    return kept is not None


def _rows(conditional: pc.Circuit, circuit_V: Tensor, head_V: Tensor) -> tuple[Tensor, Tensor]:
    """The row of a batch in which each head stands, int64 (V,), and the head of every circuit in every row, (G, B)."""
    next_G = torch.zeros(conditional.num_circuits, dtype=torch.int64)
    place_V = torch.zeros_like(circuit_V)
    for number, g in enumerate(circuit_V.tolist()):
        place_V[number] = next_G[g]
        next_G[g] += 1
    heads_GB = torch.zeros(conditional.num_circuits, max(1, int(next_G.max())), dtype=torch.int64)
    heads_GB[circuit_V, place_V] = head_V
    return place_V, heads_GB.to(conditional.device)


def _filled(trained: Trained, patch_nD: Tensor, count: int) -> Tensor:
    """Patches as RGB, filled up with white to `count`."""
    rgb = _rgb(trained, patch_nD)
    return torch.cat([rgb, torch.full((count - len(rgb), *rgb.shape[1:]), _BLANK, dtype=torch.uint8)])


def _rgb(trained: Trained, patch_nD: Tensor) -> Tensor:
    """uint8 (n, 3, p, p) of codes, whole numbers or real-valued means of them, (n, D)."""
    codes = patch_nD.view(-1, *trained.parts.shape).cpu()
    whole = codes if codes.is_floating_point() else codes.to(torch.int16)
    return trained.codes.to_rgb(whole)

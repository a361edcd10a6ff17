"""The latent value of every patch: the cluster that stage "latents" found, or the head that "conditional" grew.

Shapes: N images, P patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from lvd_lightning.context import DONE_MARKER, StageContext
from lvd_lightning.latents import load_assignments, load_latents_info
from lvd_lightning.latents.clusters import INFO_FILE, assignments_path
from lvd_lightning.latents.files import save_array, write_json

__all__ = ["assignments_folder", "read_assignments", "read_clusters", "write_assignments"]


def read_assignments(context: StageContext) -> tuple[dict[str, Tensor], int]:
    """The latent value of every training and validation patch, int64 (N, P) by split, and how many values there are.

    Those of stage conditional if its circuits have several heads, else the clusters of stage latents.

    Raises:
        ValueError: the experiment has no such stage, or it saw other images or patches.
    """
    folder = context.previous("conditional")
    if folder is not None and (folder / INFO_FILE).is_file():
        return _read(context, folder, ("train", "val"))
    return read_clusters(context)


def read_clusters(context: StageContext, *splits: str) -> tuple[dict[str, Tensor], int]:
    """The cluster that stage latents gave every patch, int64 (N, P) by split, and how many clusters there are.

    splits: "train" and "val" by default.

    Raises:
        ValueError: the experiment has no such stage, or it saw other images or patches.
    """
    folder = context.previous("latents")
    if folder is None:
        raise ValueError(f"stage {context.stage} needs the assignments of a stage latents; the experiment has none")
    return _read(context, folder, splits or ("train", "val"))


def assignments_folder(run_dir: Path) -> Path | None:
    """The folder of the finished stage whose assignments the final circuits go by, for `load_assignments`; or None."""
    for stage in ("conditional", "latents"):
        folder = run_dir / stage
        if (folder / DONE_MARKER).is_file() and (folder / INFO_FILE).is_file():
            return folder
    return None


def write_assignments(folder: Path, z_NP: Mapping[str, Tensor], num_states: int) -> None:
    """Write latent values (N, P) of all splits, pooled over positions, as stage latents does its clusters.

    What says that they are complete is written last.
    """
    (folder / INFO_FILE).unlink(missing_ok=True)
    for split, found_NP in z_NP.items():
        save_array(assignments_path(folder, split), found_NP.cpu().numpy().astype(np.int32))
    info = {
        "num_clusters": num_states,
        "pooled": True,
        "num_patches": next(iter(z_NP.values())).shape[1],
        "num_examples": {split: len(found_NP) for split, found_NP in z_NP.items()},
    }
    write_json(folder / INFO_FILE, info)


def _read(context: StageContext, folder: Path, splits: tuple[str, ...]) -> tuple[dict[str, Tensor], int]:
    z_NP = {split: load_assignments(folder, split) for split in splits}
    _, height, width = context.data.image_shape
    side = int(context.shared["patch_size"])
    if side < 1 or height % side or width % side:
        raise ValueError(f"patch_size: {side} does not tile images of {height} x {width}; choose a divisor of both")
    for split, found in z_NP.items():
        expected = (context.data.num_examples(split), (height // side) * (width // side))
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{folder}: holds latents of {tuple(found.shape)} images and patches for {split}, the data have "
                f"{expected} with patch_size {side}: run stage {folder.name} again"
            )
    return z_NP, int(load_latents_info(folder)["num_clusters"])

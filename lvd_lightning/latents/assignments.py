"""The latent value of every patch: the cluster that was found for it, or the head that its cluster's circuit grew.

Shapes: N images, P patches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.checks import check_choice
from lvd_lightning.context import Artefacts, StageContext
from lvd_lightning.files import read_array, read_json, write_array, write_json
from lvd_lightning.latents.clusters import INFO_FILE, assignments_path
from lvd_lightning.latents.settings import SPLITS

__all__ = [
    "assignments_folder",
    "load_assignments",
    "load_latents_info",
    "read_assignments",
    "read_clusters",
    "write_assignments",
]


def read_assignments(context: StageContext) -> tuple[dict[str, Tensor], int]:
    """The latent value of every training and validation patch, int64 (N, P) by split, and how many values there are.

    Heads if the conditionals have several, else clusters.

    Raises:
        ValueError: no stage before this one leaves latents, or it saw other images or patches.
    """
    folder = assignments_folder(context)
    return read_clusters(context) if folder is None else _read(context, folder, ("train", "val"))


def read_clusters(context: StageContext, *splits: str) -> tuple[dict[str, Tensor], int]:
    """The cluster that was found for every patch, int64 (N, P) by split, and how many clusters there are.

    splits: "train" and "val" by default.

    Raises:
        ValueError: no stage before this one leaves latents, or it saw other images or patches.
    """
    return _read(context, context.required("latents"), splits or ("train", "val"))


def assignments_folder(artefacts: Artefacts) -> Path | None:
    """The folder with the assignments that circuits over whole examples go by, for `load_assignments`; or None."""
    for kind in ("conditionals", "latents"):
        folder = artefacts.artefact(kind)
        if folder is not None and (folder / INFO_FILE).is_file():
            return folder
    return None


def load_latents_info(stage_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What latents.json says: num_clusters, pooled, num_patches, source, parents of the context tree, figures, ..."""
    path = Path(stage_dir) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run stage {path.parent.name} first")
    info: dict[str, Any] = read_json(path)
    return info


def load_assignments(stage_dir: str | os.PathLike[str], split: str) -> Tensor:
    """The cluster of every patch of a split, int64 with shape (N, P).

    Raises:
        FileNotFoundError: if the stage has not been run.
        ValueError: if the file does not hold clusters of that stage.
    """
    check_choice(SPLITS, split=split)
    info, path = load_latents_info(stage_dir), assignments_path(Path(stage_dir), split)
    stage = path.parent.name
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run stage {stage} again")
    label_NP = read_array(path)
    expected = (info["num_examples"][split], info["num_patches"])
    if label_NP.shape != expected or label_NP.dtype != np.int32:
        raise ValueError(f"{path} holds {label_NP.dtype} {label_NP.shape}, expected int32 {expected}")
    if label_NP.size and not (label_NP.min() >= 0 and label_NP.max() < info["num_clusters"]):
        raise ValueError(f"{path} holds {label_NP.min()}..{label_NP.max()}, expected 0..{info['num_clusters'] - 1}")
    return torch.from_numpy(label_NP.astype(np.int64))


def write_assignments(folder: Path, z_NP: Mapping[str, Tensor], num_states: int) -> None:
    """Write latent values (N, P) of all splits, pooled over positions, in the files that clusters are written to.

    What says that they are complete is written last.
    """
    (folder / INFO_FILE).unlink(missing_ok=True)
    for split, found_NP in z_NP.items():
        write_array(assignments_path(folder, split), found_NP.cpu().numpy().astype(np.int32))
    info = {
        "num_clusters": num_states,
        "pooled": True,
        "num_patches": next(iter(z_NP.values())).shape[1],
        "num_examples": {split: len(found_NP) for split, found_NP in z_NP.items()},
    }
    write_json(folder / INFO_FILE, info)


def _read(context: StageContext, folder: Path, splits: tuple[str, ...]) -> tuple[dict[str, Tensor], int]:
    z_NP = {split: load_assignments(folder, split) for split in splits}
    for split, found in z_NP.items():
        expected = (context.data.num_examples(split), context.data.parts.num_parts)
        if tuple(found.shape) != expected:
            raise ValueError(
                f"{folder}: holds latents of {tuple(found.shape)} examples and parts for {split}, the data have "
                f"{expected}: run stage {folder.name} again"
            )
    return z_NP, int(load_latents_info(folder)["num_clusters"])

"""The latents stage: features of all splits, clusters of the training features, a cluster for every patch."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.latents.clusters import INFO_FILE, assignments_path, write_clusters
from lvd_lightning.latents.encode import encode_splits, remove_features
from lvd_lightning.latents.processes import Processes
from lvd_lightning.latents.settings import SPLITS, LatentsContext, LatentsSettings

__all__ = ["load_assignments", "load_latents_info", "run_latents"]


def run_latents(context: LatentsContext, settings: Mapping[str, Any]) -> dict[str, float]:
    """Find a latent variable for every patch of every image and write them into the stage's folder.

    Features of the teacher, or of the pixels if there is no teacher, are clustered by K-means, or get the codes of the
    teacher itself. What an interrupted run left complete is used again if it was computed from the same teacher, data
    and settings. All ranks have to call: they share the encoding, and rank 0 clusters.

    Args:
        settings: see `LatentsSettings`.

    Returns:
        Figures for the report: the number of clusters, the perplexity of their use, the smallest one's share of the
        training patches, and the mean squared distance of training patches from their centroids.

    Raises:
        ValueError: if a setting is wrong, or if there are fewer distinct patches than clusters.
    """
    chosen = LatentsSettings.from_mapping(settings)
    processes = Processes()
    processes.on_first(partial(context.dir.mkdir, parents=True, exist_ok=True))
    encoding = encode_splits(context, chosen, processes)
    processes.on_first(partial(write_clusters, context, chosen, encoding))
    if not chosen.keep_features:
        processes.on_first(partial(remove_features, context.dir))
    return {name: float(value) for name, value in load_latents_info(context.dir)["figures"].items()}


def load_latents_info(stage_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """What latents.json says: num_clusters, pooled, num_patches, source, parents of the context tree, figures, ..."""
    path = Path(stage_dir) / INFO_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run stage latents first")
    info: dict[str, Any] = json.loads(path.read_text())
    return info


def load_assignments(stage_dir: str | os.PathLike[str], split: str) -> Tensor:
    """The cluster of every patch of a split, int64 with shape (N, P).

    Raises:
        FileNotFoundError: if the stage has not been run.
        ValueError: if the file does not hold clusters of that stage.
    """
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, expected one of {', '.join(SPLITS)}")
    info, path = load_latents_info(stage_dir), assignments_path(Path(stage_dir), split)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: run stage latents again")
    try:
        label_NP = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, and run stage latents again") from error
    expected = (info["num_examples"][split], info["num_patches"])
    if label_NP.shape != expected or label_NP.dtype != np.int32:
        raise ValueError(f"{path} holds {label_NP.dtype} {label_NP.shape}, expected int32 {expected}")
    if label_NP.size and not (label_NP.min() >= 0 and label_NP.max() < info["num_clusters"]):
        raise ValueError(f"{path} holds {label_NP.min()}..{label_NP.max()}, expected 0..{info['num_clusters'] - 1}")
    return torch.from_numpy(label_NP.astype(np.int64))

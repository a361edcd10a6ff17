"""Some training patches of every latent value, kept for people to look at once the training data are out of reach.

Shapes: N images, P patches, D variables of a patch, K latent values, n patches that are kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lvd_lightning.files import read_tensors, unreadable, write_tensors
from lvd_lightning.latents.settings import LatentsContext
from lvd_lightning.parts import ImagePatches

__all__ = ["PATCHES_FILE", "KeptPatches", "keep_patches", "load_kept_patches"]

PATCHES_FILE = "patches.safetensors"

_PER_VALUE, _IN_ALL = 16, 2**16
_IMAGES_AT_ONCE = 1024


class KeptPatches(NamedTuple):
    """patch_nD: the patches, integers as the data have them; value_n and position_n: of each, int64."""

    patch_nD: Tensor
    value_n: Tensor
    position_n: Tensor

    def of(self, value: int, position: int | None = None) -> Tensor:
        """The patches of a latent value, at one position or at all of them."""
        is_wanted_n = self.value_n == value
        return self.patch_nD[is_wanted_n if position is None else is_wanted_n & (self.position_n == position)]


def keep_patches(context: LatentsContext, z_NP: Tensor, num_values: int, *, pooled: bool = True) -> None:
    """Write random training patches of every latent value into the stage's folder, if examples are images.

    At most 16 of a value (of every position, unless values are pooled over positions), and 65,536 in all.

    Args:
        context: the stage that found the latent values, or found others.
        z_NP: int (N, P), the latent value of every training patch.
        num_values: K.
        pooled: whether a value means the same at every position.
    """
    parts = context.data.parts
    if not isinstance(parts, ImagePatches):
        return
    num_positions = z_NP.shape[1]
    offset_P = torch.zeros(num_positions, dtype=torch.int64) if pooled else num_values * torch.arange(num_positions)
    num_keys = num_values if pooled else num_values * num_positions
    most = max(1, min(_PER_VALUE, _IN_ALL // num_keys))
    flat_n = _some_of_each(z_NP, offset_P, num_keys, most, context.generator("kept patches"))[:_IN_ALL]
    images_n, position_n = flat_n // num_positions, flat_n % num_positions
    chunks = []
    for image_m, position_m in zip(images_n.split(_IMAGES_AT_ONCE), position_n.split(_IMAGES_AT_ONCE), strict=True):
        patches_mPD = parts.split(context.data.batch("train", image_m))
        chunks.append(patches_mPD[torch.arange(len(image_m)), position_m])
    tensors = {"patch": torch.cat(chunks), "value": z_NP[images_n, position_n].int(), "position": position_n.int()}
    write_tensors(context.dir / PATCHES_FILE, tensors)


def load_kept_patches(folder: Path) -> KeptPatches | None:
    """What a stage kept, or None: it saw no images, or is older than this file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / PATCHES_FILE
    if not path.is_file():
        return None
    tensors = read_tensors(path)
    try:
        found = KeptPatches(tensors["patch"], tensors["value"].long(), tensors["position"].long())
    except KeyError as error:
        raise unreadable(path, error) from error
    if found.patch_nD.ndim != 2 or not len(found.patch_nD) == len(found.value_n) == len(found.position_n):
        raise unreadable(path, ValueError("its tensors do not fit together"))
    return found


def _some_of_each(z_NP: Tensor, offset_P: Tensor, num_keys: int, most: int, generator: torch.Generator) -> Tensor:
    """Numbers image * P + position of the first patches of every key in images at random, in ascending order."""
    num_positions = z_NP.shape[1]
    found_K = torch.zeros(num_keys, dtype=torch.int64)
    chosen = []
    for image_m in torch.randperm(len(z_NP), generator=generator).split(_IMAGES_AT_ONCE):
        key_m = (z_NP[image_m].long() + offset_P).flatten()
        # Patches of an image lie next to each other: without this a row would show one image.
        mixed_m = torch.randperm(len(key_m), generator=generator)
        sorted_m, order_m = key_m[mixed_m].sort(stable=True)
        count_K = torch.bincount(key_m, minlength=num_keys)
        rank_m = torch.arange(len(key_m)) - (count_K.cumsum(0) - count_K)[sorted_m]
        at_m = mixed_m[order_m][rank_m < most - found_K[sorted_m]]
        chosen.append(image_m[at_m // num_positions] * num_positions + at_m % num_positions)
        found_K = (found_K + count_K).clamp_max(most)
        if bool((found_K == most).all()):
            break
    return torch.cat(chosen).sort().values

"""Training patches that are kept for people: of every latent value, from everywhere, a bounded number."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pictures import Pictures
from torch import Tensor

from lvd_lightning.context import StageContext
from lvd_lightning.latents import kept_patches
from lvd_lightning.latents.kept_patches import PATCHES_FILE, keep_patches, load_kept_patches
from lvd_lightning.parts import Tokens


class Random(Pictures):
    image_shape = (3, 4, 4)

    def __init__(self, count: int) -> None:
        self.images = torch.randint(256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(0)).byte()

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self.images[indices]


def kept(folder: Path, z_NP: Tensor, num_values: int, **settings: Any) -> tuple[Random, kept_patches.KeptPatches]:
    data = Random(len(z_NP))
    folder.mkdir()
    keep_patches(StageContext(folder.parent, folder.name, 0, data), z_NP, num_values, **settings)
    found = load_kept_patches(folder)
    assert found is not None
    return data, found


def test_patches_are_those_of_their_values(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    z_NP = torch.randint(3, (2000, 4), generator=generator)
    z_NP[7, 2] = 3  # a rare value
    data, found = kept(tmp_path / "some", z_NP, 5)
    every_NPD = data.parts.split(data.images)
    assert [len(found.of(value)) for value in range(5)] == [16, 16, 16, 1, 0]
    assert torch.equal(found.of(3)[0], every_NPD[7, 2])
    for patch_D, value, position in zip(*found, strict=True):
        image = (every_NPD[:, position] == patch_D).all(1).nonzero()[0, 0]
        assert z_NP[image, position] == value
    assert len(found.of(0, 2)) == int(((found.value_n == 0) & (found.position_n == 2)).sum())
    again = kept(tmp_path / "again", z_NP, 5)[1]
    assert (tmp_path / "some" / PATCHES_FILE).stat().st_size == (tmp_path / "again" / PATCHES_FILE).stat().st_size
    assert len(again.patch_nD) == len(found.patch_nD)


def test_positions_with_values_of_their_own(tmp_path: Path) -> None:
    z_NP = torch.randint(2, (300, 4), generator=torch.Generator().manual_seed(2))
    _, found = kept(tmp_path / "some", z_NP, 2, pooled=False)
    assert all(len(found.of(value, position)) == 16 for value in range(2) for position in range(4))


def test_no_more_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_patches, "_IN_ALL", 6)
    z_NP = torch.randint(3, (50, 4), generator=torch.Generator().manual_seed(3))
    found = kept(tmp_path / "some", z_NP, 3)[1]
    assert [len(found.of(value)) for value in range(3)] == [2, 2, 2]


def test_texts_have_no_pictures(tmp_path: Path) -> None:
    data = Random(2)
    data.__class__ = type("Text", (Random,), {"parts": Tokens(4, 9)})
    keep_patches(StageContext(tmp_path, "latents", 0, data), torch.zeros(2, 4).long(), 1)
    assert load_kept_patches(tmp_path / "latents") is None

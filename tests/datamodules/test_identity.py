"""The identity of data: another one for other images, names or orders; the same wherever the data lie."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Arrays, Folder, Photos
from datamodules import identity as identities
from datamodules.identity import identity_of_images
from datamodules.images import ImageRows
from datamodules.splits import SPLITS


def write_image(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(number).randint(256, size=(8, 8, 3)).astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "images"
    for number in range(60):
        write_image(root / f"{number}.png", number)
    return root


def identity(path: Path, **settings: int) -> dict[str, str]:
    data = Folder(str(path), image_size=8, **settings)
    data.setup()
    return data.identity


def replace_all(root: Path) -> None:
    for number in range(60):
        write_image(root / f"{number}.png", 1000 + number)


def replace_one(root: Path) -> None:
    write_image(root / "7.png", 1000)


def rename_all(root: Path) -> None:
    for file in sorted(root.iterdir()):
        file.rename(root / f"photo-{file.name}")


def rename_one(root: Path) -> None:
    (root / "7.png").rename(root / "seven.png")


def exchange_two(root: Path) -> None:
    for old, new in (("1.png", "kept"), ("2.png", "1.png"), ("kept", "2.png")):
        (root / old).rename(root / new)


@pytest.mark.parametrize("change", [replace_all, replace_one, rename_all, rename_one, exchange_two])
def test_a_changed_folder_has_another_identity(folder: Path, change: Callable[[Path], None]) -> None:
    before = identity(folder)
    change(folder)
    assert identity(folder) != before


def test_the_same_images_elsewhere_have_the_same_identity(folder: Path, tmp_path: Path) -> None:
    before = identity(folder)
    assert len(set(before.values())) == 3
    (tmp_path / "elsewhere").mkdir()
    moved = folder.rename(tmp_path / "elsewhere" / "photos")
    assert identity(moved) == before
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        for file in sorted(moved.iterdir(), reverse=True):
            archive.write(file, f"photos/{file.name}")
    assert identity(tmp_path / "packed.zip") == before
    assert identity(moved, max_examples=5) != before


def test_arrays_are_told_by_contents_and_order(tmp_path: Path) -> None:
    raw = np.random.RandomState(0).randint(256, size=(40, 8, 8, 3)).astype(np.uint8)

    def of(array: np.ndarray, name: str) -> dict[str, str]:
        (np.save if name.endswith(".npy") else np.savez)(tmp_path / name, array)
        data = Arrays(str(tmp_path / name), image_size=8)
        data.setup()
        return data.identity

    before = of(raw, "images.npy")
    assert of(raw, "other.npy") == of(raw, "images.npz") == of(raw.transpose(0, 3, 1, 2), "images.npy") == before
    exchanged = raw.copy()
    exchanged[[3, 5]] = raw[[5, 3]]
    changed = raw.copy()
    changed[11, 0, 0, 0] ^= 1
    for other in (exchanged, changed, raw[:-1]):
        assert of(other, "images.npy") != before


def test_made_images_keep_their_identity_over_starts_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for count in (1, 8):
        monkeypatch.setattr("os.cpu_count", lambda count=count: count)
        data = Photos(image_size=8, reduce=4, num_train=50, num_val=20, num_test=20)
        data.setup()
        found.append(data.identity)
    assert found[0] == found[1]
    assert [*found[0]] == list(SPLITS)


def test_of_many_images_some_stand_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "MAX_BYTES", 10 * 48)
    images = torch.randint(256, (100, 3, 4, 4), dtype=torch.uint8)
    rows = ImageRows([images[:30], images[30:]])
    before = identity_of_images(images)
    assert identity_of_images(rows) == before
    images[-1] += 1
    assert identity_of_images(images) != before
    assert identity_of_images(images[:99]) != identity_of_images(images)

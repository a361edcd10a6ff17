"""CIFAR-10 in its original files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import CIFAR10

TRAIN = [f"data_batch_{number}" for number in range(1, 6)]


def write_batch(path: Path, seed: int, count: int = 6) -> np.ndarray:
    data = np.random.RandomState(seed).randint(256, size=(count, 3072)).astype(np.uint8)
    batch = {b"batch_label": b"a batch", b"labels": [0] * count, b"data": data, b"filenames": [b"x.png"] * count}
    path.write_bytes(pickle.dumps(batch, 2))
    return data.reshape(-1, 3, 32, 32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "cifar-10-batches-py"
    root.mkdir()
    for seed, name in enumerate([*TRAIN, "test_batch"]):
        write_batch(root / name, seed)
    return root


def test_official_test_set_and_carved_validation_set(folder: Path) -> None:
    data = CIFAR10(str(folder), num_val=7, color="rgb")
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [23, 7, 6]
    assert np.array_equal(torch.as_tensor(data.images("test")).numpy(), write_batch(folder / "test_batch", 5))
    known = {image.tobytes() for seed, name in enumerate(TRAIN) for image in write_batch(folder / name, seed)}
    train = {image.numpy().tobytes() for image in data.images("train")}
    val = {image.numpy().tobytes() for image in data.images("val")}
    assert train | val == known
    assert not train & val


def test_the_folder_around_it_will_do(folder: Path) -> None:
    inner, outer = CIFAR10(str(folder), num_val=7), CIFAR10(str(folder.parent), num_val=7, seed=9)
    inner.setup()
    outer.setup()
    assert torch.equal(torch.as_tensor(inner.images("val")), torch.as_tensor(outer.images("val")))


def test_max_examples(folder: Path) -> None:
    data = CIFAR10(str(folder), num_val=7, max_examples=5)
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [5, 5, 5]


def test_missing_files_are_listed_with_the_layout(folder: Path, tmp_path: Path) -> None:
    (folder / "data_batch_3").unlink()
    with pytest.raises(FileNotFoundError, match=r"missing: \S*data_batch_3\n(.|\n)*cifar-10-batches-py(.|\n)*unpack"):
        CIFAR10(str(folder)).setup()
    with pytest.raises(FileNotFoundError, match="and 3 more"):
        CIFAR10(str(tmp_path / "nowhere")).setup()


def test_bad_settings_and_bad_files(folder: Path) -> None:
    with pytest.raises(ValueError, match="image_size: got 64"):
        CIFAR10(str(folder), image_size=64)
    with pytest.raises(ValueError, match="num_val: got 30"):
        CIFAR10(str(folder), num_val=30).setup()
    (folder / "data_batch_2").write_bytes((folder / "data_batch_1").read_bytes()[:5000])
    with pytest.raises(ValueError, match="data_batch_2: truncated"):
        CIFAR10(str(folder), num_val=5).setup()

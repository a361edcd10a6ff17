"""`flip`: mirror images are training examples of their own, with every data module."""

import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import (
    CIFAR10,
    EMNIST,
    MNIST,
    Arrays,
    Digits,
    DownsampledImageNet,
    FashionMNIST,
    Folder,
    ImageDataModule,
    Photos,
)
from datamodules.arrays import MappedImages
from datamodules.images import ImageRows
from datamodules.splits import SPLITS

Make = Callable[..., ImageDataModule]


def noise(*shape: int) -> np.ndarray:
    return np.random.RandomState(shape[0]).randint(256, size=shape).astype(np.uint8)


def folder(path: Path) -> Make:
    for number in range(40):
        Image.fromarray(noise(40 + number, 9, 3)[:9]).save(path / f"{number}.png")
    return lambda **settings: Folder(str(path), image_size=8, **settings)


def mapped_array(path: Path) -> Make:
    np.save(path / "images.npy", noise(40, 8, 8, 3))
    return lambda **settings: Arrays(str(path / "images.npy"), image_size=8, **settings)


def archive(path: Path) -> Make:
    np.savez(path / "images.npz", train=noise(30, 8, 8, 3), val=noise(5, 8, 8, 3), test=noise(6, 8, 8, 3))
    return lambda **settings: Arrays(str(path / "images.npz"), image_size=8, **settings)


def cifar10(path: Path) -> Make:
    for number, name in enumerate([*(f"data_batch_{batch}" for batch in range(1, 6)), "test_batch"]):
        (path / name).write_bytes(pickle.dumps({b"data": noise(8 + number, 3072)}, 2))
    return lambda **settings: CIFAR10(str(path), num_val=7, **settings)


def imagenet(path: Path) -> Make:
    for number, name in enumerate([*(f"train_data_batch_{batch}" for batch in range(1, 11)), "val_data"]):
        (path / name).write_bytes(pickle.dumps({"data": noise(4 + number, 3072)}))
    return lambda **settings: DownsampledImageNet(str(path), num_val=13, **settings)


def fashion_mnist(path: Path) -> Make:
    for name, count in (("train", 30), ("t10k", 6)):
        header = struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28)
        (path / f"{name}-images-idx3-ubyte").write_bytes(header + noise(count, 28, 28).tobytes())

    def make(region: str = "whole", color: str = "rgb", **settings: Any) -> ImageDataModule:
        return FashionMNIST(str(path), num_val=7, **settings)

    return make


def photos(path: Path) -> Make:
    return lambda **settings: Photos(image_size=8, num_train=20, num_val=10, num_test=10, **settings)


@pytest.fixture(params=[folder, mapped_array, archive, cifar10, imagenet, fashion_mnist, photos])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """Makes a small data module with further settings."""
    made: Make = request.param(tmp_path)
    return made


def set_up(make: Make, **settings: Any) -> ImageDataModule:
    data = make(**settings)
    data.setup()
    return data


@pytest.mark.parametrize("code", [{"color": "rgb"}, {"color": "ycocg_r", "region": "quadrant", "patch_size": 2}])
def test_mirror_images_follow_the_training_images_alone(make: Make, code: dict[str, Any]) -> None:
    plain, flipped = set_up(make, **code), set_up(make, flip=True, **code)
    count = plain.num_examples("train")
    assert flipped.num_examples("train") == 2 * count == len(flipped.images("train"))
    train = plain.batch("train", torch.arange(count))
    assert torch.equal(flipped.batch("train", torch.arange(2 * count)), torch.cat([train, train.flip(-1)]))
    assert torch.equal(flipped.batch("train", torch.tensor([count + 3, 3])), torch.stack([train[3].flip(-1), train[3]]))
    assert not torch.equal(train, train.flip(-1))
    for split in ("val", "test"):
        assert flipped.num_examples(split) == plain.num_examples(split)
        every = torch.arange(plain.num_examples(split))
        assert torch.equal(flipped.batch(split, every), plain.batch(split, every))


def test_loaders_give_mirror_images_once_an_epoch(make: Make) -> None:
    data = set_up(make, flip=True, batch_size=7)
    seen = []
    for x, index in data.train_dataloader():
        assert torch.equal(x, data.batch("train", index))
        seen += index.tolist()
    assert sorted(seen) == list(range(data.num_examples("train")))


def test_mirror_images_count_for_max_examples(make: Make) -> None:
    data, again = (set_up(make, flip=True, max_examples=6) for _ in range(2))
    plain = set_up(make, max_examples=6)
    assert [data.num_examples(split) for split in SPLITS] == [min(6, plain.num_examples(split)) for split in SPLITS]
    x = data.batch("train", torch.arange(6))
    assert torch.equal(again.batch("train", torch.arange(6)), x)
    known = plain.batch("train", torch.arange(6))
    straight = {image.numpy().tobytes() for image in known}
    mirrored = {image.numpy().tobytes() for image in known.flip(-1).contiguous()}
    found = [image.contiguous().numpy().tobytes() for image in x]
    assert set(found) <= straight | mirrored
    assert len(set(found)) == 6
    assert not set(found) <= straight


def test_the_identity_of_the_training_images_tells_of_mirrors(make: Make) -> None:
    plain, flipped = set_up(make).identity, set_up(make, flip=True).identity
    assert flipped["train"] != plain["train"]
    assert (flipped["val"], flipped["test"]) == (plain["val"], plain["test"])
    assert set_up(make, flip=True).identity == flipped
    assert set_up(make, flip=True, max_examples=6).identity["train"] != flipped["train"]


def test_mirror_images_of_a_file_on_disk_are_not_copied(tmp_path: Path) -> None:
    data = set_up(mapped_array(tmp_path), flip=True)
    train = data.images("train")
    assert isinstance(train, ImageRows)
    assert len(pickle.dumps(train)) < 5000  # what a worker process is sent: names and numbers
    np.save(tmp_path / "images.npy", 255 - noise(40, 8, 8, 3))  # read next are the new contents
    half = len(train) // 2
    assert torch.equal(train[half:], train[:half].flip(-1))
    assert isinstance(train._parts[0]._parts[0], MappedImages)


def test_worker_processes_read_mirror_images(tmp_path: Path) -> None:
    data = set_up(mapped_array(tmp_path), flip=True, batch_size=16, num_workers=1)
    for x, index in data.train_dataloader():
        assert torch.equal(x, data.batch("train", index))


@pytest.mark.parametrize(
    ("kind", "settings"), [(Digits, {}), (MNIST, {"path": "somewhere"}), (EMNIST, {"path": "somewhere"})]
)
def test_letters_and_digits_have_no_mirror_images(kind: type[ImageDataModule], settings: dict[str, Any]) -> None:
    assert not kind(**settings).flip
    with pytest.raises(ValueError, match=f"flip: got True, expected False: {kind.__name__} holds letters or digits"):
        kind(**settings, flip=True)

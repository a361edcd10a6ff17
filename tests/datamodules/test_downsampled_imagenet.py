"""ImageNet32 and ImageNet64 in their original files."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import DownsampledImageNet
from datamodules.images import ImageRows
from lvd_lightning.color import encode_color

FILES = [f"train_data_batch_{number}" for number in range(1, 11)]


def write_batch(path: Path, seed: int, size: int, count: int = 5) -> np.ndarray:
    data = np.random.RandomState(seed).randint(256, size=(count, 3 * size**2)).astype(np.uint8)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps({"data": data, "labels": [1] * count, "mean": data.mean(0)}))
    return data.reshape(-1, 3, size, size)


@pytest.mark.parametrize("size", [32, 64])
def test_every_file_gives_its_part(tmp_path: Path, size: int) -> None:
    known = np.concatenate([write_batch(tmp_path / name, seed, size) for seed, name in enumerate(FILES)])
    test = write_batch(tmp_path / "val_data", 10, size, 8)
    data = DownsampledImageNet(str(tmp_path), num_val=13, image_size=size)
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [37, 13, 8]
    assert torch.equal(torch.as_tensor(data.images("test")), encode_color(torch.from_numpy(test), "ycocg_r"))
    train = {image.numpy().tobytes() for image in data.batch("train", torch.arange(37))}
    val = {image.numpy().tobytes() for image in data.batch("val", torch.arange(13))}
    assert train | val == {image.numpy().tobytes() for image in encode_color(torch.from_numpy(known), "ycocg_r")}
    assert not train & val
    x, index = next(iter(data.train_dataloader()))
    assert torch.equal(x, data.batch("train", index))


def test_folders_as_the_archives_unpack_and_few_examples(tmp_path: Path) -> None:
    for seed, name in enumerate(FILES):
        write_batch(tmp_path / "Imagenet32_train" / name, seed, 32)
    write_batch(tmp_path / "Imagenet32_val" / "val_data", 10, 32)
    data = DownsampledImageNet(str(tmp_path), num_val=10, max_examples=4, region="quadrant")
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [4, 4, 4]
    assert data.image_shape == (3, 16, 16)
    assert not isinstance(data.images("train"), ImageRows)  # the files' memory is free again


def test_missing_files_are_listed_with_the_layout(tmp_path: Path) -> None:
    for seed, name in enumerate(FILES):
        write_batch(tmp_path / name, seed, 32)
    with pytest.raises(FileNotFoundError, match=r"missing: \S*val_data\n(.|\n)*Imagenet32_train.zip"):
        DownsampledImageNet(str(tmp_path)).setup()
    with pytest.raises(FileNotFoundError, match="Imagenet64_val.zip"):
        DownsampledImageNet(str(tmp_path / "nowhere"), image_size=64).setup()


def test_bad_files_are_named(tmp_path: Path) -> None:
    for seed, name in enumerate(FILES):
        write_batch(tmp_path / name, seed, 32)
    write_batch(tmp_path / "val_data", 10, 64)
    with pytest.raises(ValueError, match="val_data: an image has 12288 values, expected 3072"):
        DownsampledImageNet(str(tmp_path), num_val=10).setup()
    with pytest.raises(ValueError, match="train_data_batch_1: an image has 3072 values, expected 12288"):
        DownsampledImageNet(str(tmp_path), num_val=10, image_size=64).setup()
    with pytest.raises(ValueError, match="num_val: 5 of the 5 images"):
        DownsampledImageNet(str(tmp_path), num_val=50).setup()
    (tmp_path / FILES[4]).write_bytes(b"\x80\x04cposix\nsystem\n.")
    with pytest.raises(ValueError, match="train_data_batch_5: refused to load posix.system"):
        DownsampledImageNet(str(tmp_path), num_val=10).setup()

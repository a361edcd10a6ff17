"""MNIST and the sets in its file format, on small files of that format."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import EMNIST, MNIST, Digits, FashionMNIST


def write_idx(file: Path, images: np.ndarray) -> None:
    header = struct.pack(">4B", 0, 0, 8, images.ndim) + struct.pack(f">{images.ndim}I", *images.shape)
    content = header + images.astype(np.uint8).tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 28, 28), dtype=np.uint8)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("kind", [MNIST, FashionMNIST])
def test_files_are_read_compressed_or_not(tmp_path: Path, kind: type[MNIST], ending: str) -> None:
    known, test = images(20, 0), images(6, 1)
    write_idx(tmp_path / f"train-images-idx3-ubyte{ending}", known)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{ending}", test)
    data = kind(str(tmp_path), num_val=5)
    data.setup()
    assert [data.num_examples(split) for split in ("train", "val", "test")] == [15, 5, 6]
    assert torch.equal(data.batch("test", torch.arange(6))[:, 0], torch.from_numpy(test))
    rest = torch.cat([data.batch("train", torch.arange(15)), data.batch("val", torch.arange(5))])
    assert sorted(image.numpy().tobytes() for image in rest[:, 0]) == sorted(image.tobytes() for image in known)
    assert (data.image_shape, data.parts.num_parts, data.unit.uniform) == ((1, 28, 28), 49, 8.0)
    assert data.to_rgb(rest).shape == (20, 3, 28, 28)


def test_emnist_is_put_upright(tmp_path: Path) -> None:
    known, test = images(9, 0), images(4, 1)
    write_idx(tmp_path / "emnist-letters-train-images-idx3-ubyte", known)
    write_idx(tmp_path / "emnist-letters-test-images-idx3-ubyte.gz", test)
    data = EMNIST(str(tmp_path), num_val=2)
    data.setup()
    assert torch.equal(data.batch("test", torch.arange(4))[:, 0], torch.from_numpy(test).transpose(1, 2))
    with pytest.raises(ValueError, match="subset: got 'greek', expected one of byclass"):
        EMNIST(str(tmp_path), subset="greek")


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing: .*train-images-idx3-ubyte\nMNIST: expected train-images"):
        MNIST(str(tmp_path)).setup()
    write_idx(tmp_path / "train-images-idx3-ubyte", images(20, 0))
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(gzip.compress(b"\x00\x00\x08\x03 cut"))
    with pytest.raises(ValueError, match=f"{file}: damaged or no idx file"):
        MNIST(str(tmp_path), num_val=5).setup()
    file.write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=f"{file}: damaged or no idx file"):
        MNIST(str(tmp_path), num_val=5).setup()
    write_idx(file, np.zeros((3, 8, 8)))
    with pytest.raises(ValueError, match=r"holds images of 8 x 8, expected 28 x 28"):
        MNIST(str(tmp_path), num_val=5).setup()
    write_idx(file, images(3, 0))
    with pytest.raises(ValueError, match="num_val: got 20, expected 1 to 19"):
        MNIST(str(tmp_path), num_val=20).setup()
    with pytest.raises(ValueError, match="patch_size: 5 does not tile images of 28 x 28"):
        MNIST(str(tmp_path), num_val=5, patch_size=5).setup()


def test_digits_are_embedded() -> None:
    data = Digits(patch_size=4)
    data.setup()
    sizes = {split: data.num_examples(split) for split in ("train", "val", "test")}
    assert sizes == {"train": 1437, "val": 180, "test": 180}
    x = data.batch("train", torch.arange(1437))
    assert (x.dtype, x.shape[1:], int(x.max())) == (torch.uint8, (1, 8, 8), 16)
    assert int(data.to_rgb(x).max()) == 255

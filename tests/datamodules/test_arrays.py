"""Images in .npy and .npz files."""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from datamodules import Arrays
from datamodules.arrays import MappedImages
from datamodules.images import ImageRows
from datamodules.splits import SPLITS
from lvd_lightning.color import encode_color


def pixels(count: int = 40) -> np.ndarray:
    return np.random.RandomState(count).randint(256, size=(count, 3, 8, 8)).astype(np.uint8)


def encoded(raw: np.ndarray) -> torch.Tensor:
    return encode_color(torch.from_numpy(raw), "ycocg_r")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_one_file_is_divided(tmp_path: Path, suffix: str, channels_last: bool) -> None:
    path, raw = tmp_path / f"images{suffix}", pixels()
    stored = np.ascontiguousarray(raw.transpose(0, 2, 3, 1)) if channels_last else raw
    if suffix == ".npy":
        np.save(path, stored)
    else:
        np.savez_compressed(path, stored)
    data = Arrays(str(path), image_size=8, val_fraction=0.25, test_fraction=0.1)
    data.setup()
    assert [data.num_examples(split) for split in SPLITS] == [26, 10, 4]
    images = [data.batch(split, torch.arange(data.num_examples(split))) for split in SPLITS]
    found = [image.numpy().tobytes() for image in torch.cat(images)]
    assert sorted(found) == sorted(image.numpy().tobytes() for image in encoded(raw))
    x, index = next(iter(data.train_dataloader()))
    assert torch.equal(x, data.batch("train", index))


def test_npy_files_stay_on_disk(tmp_path: Path) -> None:
    path, raw = tmp_path / "images.npy", pixels()
    np.save(path, raw)
    data = Arrays(str(path), image_size=8, region="quadrant")
    data.setup()
    assert isinstance(data.images("train"), ImageRows)
    before = data.batch("train", torch.tensor([0]))
    assert before.shape == (1, 3, 4, 4)
    np.save(path, 255 - raw)  # written in place: what is read next is new
    assert not torch.equal(data.batch("train", torch.tensor([0])), before)


def test_a_mapped_file_travels_by_name(tmp_path: Path) -> None:
    path = tmp_path / "images.npy"
    np.save(path, pixels(500))
    images = MappedImages(path, 8, "ycocg_r", "whole")
    sent = pickle.dumps(images)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent)[torch.tensor([7, 3])], encoded(pixels(500)[[7, 3]]))


def test_three_files_or_three_arrays_are_taken_as_they_are(tmp_path: Path) -> None:
    parts = {"train": pixels(9), "val": pixels(5), "test": pixels(3)}
    np.save(tmp_path / "train.npy", parts["train"])
    np.savez(tmp_path / "val.npz", parts["val"])
    np.savez(tmp_path / "test.npz", images=parts["test"], labels=np.zeros(3))
    np.savez(tmp_path / "all.npz", **parts)
    files = {"train": "train.npy", "val": "val.npz", "test": "test.npz"}
    separate = Arrays(**{split: str(tmp_path / name) for split, name in files.items()}, image_size=8, key="images")
    with pytest.raises(ValueError, match="key: got 'images'"):
        separate.setup()
    np.savez(tmp_path / "val.npz", images=parts["val"])
    together = Arrays(str(tmp_path / "all.npz"), image_size=8)
    for data in (separate, together):
        data.setup()
        for split in SPLITS:
            assert torch.equal(data.batch(split, torch.arange(len(parts[split]))), encoded(parts[split]))


def test_max_examples(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", pixels())
    data = Arrays(str(tmp_path / "images.npy"), image_size=8, max_examples=3)
    data.setup()
    assert [data.num_examples(split) for split in SPLITS] == [3, 3, 3]


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((9, 3, 8, 8)), "float64"),
        (np.zeros((9, 3, 16, 16), dtype=np.uint8), r"\(9, 3, 16, 16\).*image_size is 8"),
        (np.zeros((0, 3, 8, 8), dtype=np.uint8), r"\(0, 3, 8, 8\)"),
        (np.zeros((9, 192), dtype=np.uint8), r"\(9, 192\)"),
        (np.array([{}, None]), "[Oo]bjects? "),
    ],
)
def test_other_arrays_are_named(tmp_path: Path, suffix: str, array: np.ndarray, reason: str) -> None:
    path = tmp_path / f"bad{suffix}"
    if suffix == ".npy":
        np.save(path, array)
    else:
        np.savez(path, array)
    with pytest.raises(ValueError, match=rf"bad{suffix}.*({reason})"):
        Arrays(str(path), image_size=8).setup()


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    if suffix == ".npy":
        np.save(path, pixels())
    else:
        np.savez_compressed(path, pixels())
    contents = path.read_bytes()
    for damaged in (b"", contents[:60], contents[:-900], b"neither one nor the other", bytes(200)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"bad{suffix}"):
            Arrays(str(path), image_size=8).setup()
    if suffix == ".npz":
        path.write_bytes(contents[:3000] + bytes(500) + contents[3500:])
        with pytest.raises(ValueError, match=r"bad\.npz"):
            Arrays(str(path), image_size=8).setup()


@pytest.mark.parametrize(("offset", "value"), [(6, 1), (8, 9), (8, 98)], ids=["encrypted", "Deflate64", "PPMd"])
def test_archives_that_cannot_be_read_are_named(tmp_path: Path, offset: int, value: int) -> None:
    """The flags of the members, or the way in which they are packed, as another archiver may have written them."""
    path = tmp_path / "bad.npz"
    np.savez(path, train=pixels(), val=pixels(), test=pixels())
    contents = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        headers = [info.header_offset + offset for info in archive.infolist()]
        entry = archive.start_dir
    for header in headers:
        contents[header] = value
        contents[entry + offset + 2] = value
        entry = contents.find(b"PK\x01\x02", entry + 1)
    path.write_bytes(contents)
    for key in (None, "train"):
        with pytest.raises(ValueError, match=rf"^{path}: the array 'train' cannot be read \(.*\): give an intact"):
            Arrays(str(path), image_size=8, key=key).setup()


def test_headers_that_ask_for_the_impossible_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npy"
    for text in ("(99999999999999999999,)", "(1 << 62,)", "(9,", "'a'"):
        header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {text}}}".ljust(117).encode() + b"\n"
        path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        with pytest.raises(ValueError, match=rf"^{path}: "):
            Arrays(str(path), image_size=8).setup()


def test_missing_files_and_contradictory_settings(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"missing: \S*nowhere\.npy\nArrays: expected \.npy files"):
        Arrays(str(tmp_path / "nowhere.npy")).setup()
    (tmp_path / "images.txt").write_text("no array")
    with pytest.raises(ValueError, match=r"images\.txt: expected a name that ends in \.npy or \.npz"):
        Arrays(str(tmp_path / "images.txt")).setup()
    for settings in ({}, {"path": "a.npy", "train": "b.npy"}, {"train": "a.npy", "test": "b.npy"}):
        with pytest.raises(ValueError, match="path alone or the other three"):
            Arrays(**settings)


def test_too_few_images_say_how_many_it_takes(tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.zeros((4, 8, 8, 3), dtype=np.uint8))
    message = (
        r"Arrays: there are 4 images, and the split 'val' has none of them \(train, val and test: 3, 0, 1\); each "
        "needs at least 1: give more images, 10 or more for val_fraction 0.1, or choose a larger val_fraction"
    )
    with pytest.raises(ValueError, match=message):
        Arrays(str(tmp_path / "few.npy"), image_size=8, test_fraction=0.25).setup()

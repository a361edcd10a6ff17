"""Features on disk: complete or not there, whatever interrupts their writing; pixels as features."""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers.pictures import Pictures
from torch import Tensor

from lvd_lightning.color import patchify
from lvd_lightning.latents import features as writing
from lvd_lightning.latents.features import ComputedFeatures, FeatureStore, PartValues, write_features

SHAPE = (11, 4, 3)


def _truth() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).half().float()


def _compute(start: int, stop: int) -> Tensor:
    return _truth()[start:stop]


def _write(path: Path, key: str = "k") -> FeatureStore:
    return write_features(path, SHAPE, _compute, key=key, chunk_size=4)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    store = _write(tmp_path / "new folder" / "features.npy")
    assert store.shape == SHAPE
    assert torch.equal(store.read(0, 11), _truth())
    assert torch.equal(store.read(9, 99), _truth()[9:])
    images, positions = torch.tensor([10, 0, 10]), torch.tensor([3, 1, 3])
    assert torch.equal(store.gather(images, positions), _truth()[images, positions])
    assert np.load(store.path).dtype == np.float16
    assert sorted(os.listdir(store.path.parent)) == ["features.json", "features.npy"]


def test_an_interrupted_extraction_is_not_complete(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"

    def dies(start: int, stop: int) -> Tensor:
        if start >= 8:
            raise KeyboardInterrupt
        return _compute(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write_features(path, SHAPE, dies, key="k", chunk_size=4)
    assert not FeatureStore.is_complete(path, "k")
    with pytest.raises(FileNotFoundError, match="no complete features"):
        FeatureStore(path)
    # Nor is it when it dies between the features and the statement that they are complete.
    _write(path)
    (tmp_path / "features.json").unlink()
    assert not FeatureStore.is_complete(path, "k")
    assert torch.equal(_write(path).read(0, 11), _truth())


def test_an_interrupted_extraction_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SECONDS_BETWEEN_MARKS", 0.0)
    path = tmp_path / "features.npy"
    asked: list[int] = []

    def dies(start: int, stop: int) -> Tensor:
        if start >= 8 and len(asked) < 3:
            raise KeyboardInterrupt
        asked.append(start)
        return _compute(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write_features(path, SHAPE, dies, key="k", chunk_size=4)
    asked.append(-1)
    store = write_features(path, SHAPE, dies, key="k", chunk_size=4)
    assert asked == [0, 4, -1, 8]
    assert torch.equal(store.read(0, 11), _truth())
    assert sorted(os.listdir(tmp_path)) == ["features.json", "features.npy"]


def test_what_was_written_of_something_else_is_written_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "_SECONDS_BETWEEN_MARKS", 0.0)
    path = tmp_path / "features.npy"

    def dies(start: int, stop: int) -> Tensor:
        if start >= 8:
            raise KeyboardInterrupt
        return -_compute(start, stop)

    with pytest.raises(KeyboardInterrupt):
        write_features(path, SHAPE, dies, key="other", chunk_size=4)
    assert torch.equal(_write(path).read(0, 11), _truth())
    with pytest.raises(KeyboardInterrupt):
        write_features(path, (11, 3, 4), lambda a, b: dies(a, b).view(-1, 3, 4), key="k", chunk_size=4)
    assert torch.equal(_write(path).read(0, 11), _truth())


@pytest.mark.parametrize("alone", [False, True])
def test_features_without_room_on_disk_are_computed(alone: bool) -> None:
    asked: list[int] = []

    def compute(images: Tensor) -> Tensor:
        asked.append(len(images))
        return _truth()[images]

    def compute_at(images: Tensor, positions: Tensor) -> Tensor:
        return _truth()[images, positions]

    vectors = ComputedFeatures(SHAPE, compute, compute_at if alone else None, chunk_size=4)
    assert torch.equal(vectors.read(1, 99), _truth()[1:])
    assert asked == [4, 4, 2]
    assert vectors.read(11, 99).shape == (0, 4, 3)
    images, positions = torch.tensor([10, 0, 10, 3, 4]), torch.tensor([3, 1, 3, 0, 2])
    assert torch.equal(vectors.gather(images, positions), _truth()[images, positions])
    assert len(asked) == (3 if alone else 5)


@pytest.mark.parametrize(
    "read",
    [
        lambda vectors: vectors.read(0, 11),
        lambda vectors: vectors.gather(torch.tensor([5, 2, 2]), torch.tensor([0, 0, 1])),
    ],
)
def test_the_first_value_that_is_not_finite_is_named(read: Callable[[ComputedFeatures], Tensor]) -> None:
    def explode(images: Tensor) -> Tensor:
        found = _truth()[images]
        found[images == 2, 1] = 1e6
        return found

    with pytest.raises(ValueError, match="NaN or values beyond float16, first those of example 2, part 1:"):
        read(ComputedFeatures(SHAPE, explode, chunk_size=4))


def test_an_interrupted_replacement_leaves_nothing_that_passes_for_new_or_old(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    _write(path, key="old")

    def dies(start: int, stop: int) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_features(path, SHAPE, dies, key="new")
    assert not FeatureStore.is_complete(path, "new")
    assert not FeatureStore.is_complete(path, "old")


def test_features_of_something_else_are_not_taken(tmp_path: Path) -> None:
    _write(tmp_path / "features.npy", key="teacher 1")
    assert FeatureStore.is_complete(tmp_path / "features.npy", "teacher 1")
    assert not FeatureStore.is_complete(tmp_path / "features.npy", "teacher 2")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "features.npy"
    _write(path)
    whole = path.read_bytes()
    for damaged in (whole[:-2], whole + b"\0\0", whole[:100], b"nonsense" + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="delete it"):
            FeatureStore(path)
    np.save(path, np.zeros(SHAPE, dtype=np.float32))
    with pytest.raises(ValueError, match="float32"):
        FeatureStore(path)
    np.save(path, np.zeros((11, 3, 4), dtype=np.float16))
    with pytest.raises(ValueError, match=r"\(11, 3, 4\)"):
        FeatureStore(path)
    path.write_bytes(whole)
    for text in ("{", json.dumps({"key": "k"}), json.dumps({"key": "k", "shape": [11, 4]})):
        (tmp_path / "features.json").write_text(text)
        with pytest.raises(ValueError, match="does not describe features"):
            FeatureStore(path)


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_features_that_float16_cannot_hold_are_refused(tmp_path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="beyond float16"):
        write_features(tmp_path / "f.npy", (2, 1, 1), lambda a, b: torch.full((2, 1, 1), value), key="")


def test_features_of_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"shape \(2, 5, 3\)"):
        write_features(tmp_path / "f.npy", (2, 4, 3), lambda a, b: torch.zeros(2, 5, 3), key="")


def test_an_empty_split_has_empty_features(tmp_path: Path) -> None:
    store = write_features(tmp_path / "f.npy", (0, 4, 3), _compute, key="")
    assert store.read(0, 5).shape == (0, 4, 3)


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    write_features(
        tmp_path / "f.npy",
        SHAPE,
        _compute,
        key="",
        chunk_size=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(4, 11), (8, 11), (11, 11)]


def _write_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )
    asked: list[int] = []

    def compute(start: int, stop: int) -> Tensor:
        asked.extend(range(start, stop))
        return _compute(start, stop)

    store = write_features(f"{folder}/features.npy", SHAPE, compute, key="k", chunk_size=2)
    torch.save((asked, store.read(0, 11)), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


def test_ranks_write_one_file_together(tmp_path: Path) -> None:
    mp.start_processes(_write_on_rank, args=(str(tmp_path),), nprocs=3, start_method="fork")
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(3)]
    assert sorted(image for asked, _ in results for image in asked) == list(range(11))
    assert all(torch.equal(read, _truth()) for _, read in results)


class Bytes(Pictures):
    """A datamodule's bulk access to one split."""

    image_shape = (3, 8, 12)

    def __init__(self, images: Tensor, patch_size: int) -> None:
        self._images, self.patch_size = images, patch_size

    def num_examples(self, split: str) -> int:
        return len(self._images)

    def batch(self, split: str, indices: Tensor) -> Tensor:
        return self._images[indices]


def test_values_of_parts() -> None:
    images = torch.randint(256, (5, 3, 8, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = PartValues(Bytes(images, 4), "train")
    expected = patchify(images, 4).float()
    assert pixels.shape == (5, 6, 48)
    assert torch.equal(pixels.read(1, 9), expected[1:])
    rows, positions = torch.tensor([4, 0, 0, 4]), torch.tensor([5, 2, 3, 0])
    assert torch.equal(pixels.gather(rows, positions), expected[rows, positions])
    with pytest.raises(ValueError, match="patch_size: 5"):
        PartValues(Bytes(images, 5), "train")

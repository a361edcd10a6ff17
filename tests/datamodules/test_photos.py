"""Crops of the sample photographs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import Photos, photos
from datamodules.splits import SPLITS


def show(monkeypatch: pytest.MonkeyPatch, *pictures: np.ndarray) -> None:
    """Put other photographs in the place of the real ones."""
    monkeypatch.setattr("sklearn.datasets.load_sample_images", lambda: SimpleNamespace(images=list(pictures)))


def test_the_photographs_give_all_three_splits() -> None:
    data = Photos(num_train=50, num_val=20, num_test=10)
    data.setup()
    assert {split: tuple(data.images(split).shape) for split in SPLITS} == {
        "train": (50, 3, 32, 32),
        "val": (20, 3, 32, 32),
        "test": (10, 3, 32, 32),
    }
    assert float(data.images("train")[:, 0].float().std()) > 20  # pictures, not something constant


def test_splits_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every pixel of the two photographs has a colour of its own.
    number = np.arange(2 * 60 * 160)
    unique = np.stack([number >> 16, (number >> 8) & 255, number & 255], -1).astype(np.uint8).reshape(2, 60, 160, 3)
    show(monkeypatch, *unique)
    data = Photos(image_size=16, reduce=1, color="rgb", num_train=1000, num_val=500, num_test=500)
    data.setup()
    seen = {}
    for split in SPLITS:
        red, green, blue = torch.as_tensor(data.images(split)).int().unbind(1)
        seen[split] = set(((red << 16) | (green << 8) | blue).flatten().tolist())
        # Both photographs are in every split.
        assert min(seen[split]) < 60 * 160 <= max(seen[split])
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


@pytest.mark.parametrize("reduce", [2, 3])
def test_the_filter_of_the_reduction_does_not_look_into_another_split(
    monkeypatch: pytest.MonkeyPatch, reduce: int
) -> None:
    sizes = {"image_size": 16, "reduce": reduce, "color": "rgb", "num_train": 400, "num_val": 100, "num_test": 100}
    shape = (60 * reduce, 160 * reduce, 3)
    probe = Photos(**sizes)
    bands = probe._cut(np.arange(np.prod(shape)).reshape(shape))
    for split in SPLITS:
        # This split is white in a black photograph: no crop of it may be darkened, no crop of the others lit up.
        picture = np.zeros(shape, dtype=np.uint8)
        for name, band in zip(photos.BANDS, bands, strict=True):
            if name == split:
                picture.reshape(-1)[band.reshape(-1)] = 255
        show(monkeypatch, picture)
        data = Photos(**sizes)
        data.setup()
        for other in SPLITS:
            assert torch.as_tensor(data.images(other)).unique().tolist() == [255 if other == split else 0]


def test_crops_are_the_same_in_every_run_and_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Photos(num_train=30, seed=0), Photos(num_train=30, seed=1)
    one.setup()
    two.setup()
    for split in SPLITS:
        assert torch.equal(torch.as_tensor(one.images(split)), torch.as_tensor(two.images(split)))
    show(monkeypatch, np.random.RandomState(0).randint(256, size=(40, 160, 3)).astype(np.uint8))
    data = Photos(image_size=16, reduce=1, num_train=100, num_val=50, num_test=50)
    data.setup()
    assert len(torch.as_tensor(data.images("train")).unique(dim=0)) == 100


def test_errors() -> None:
    with pytest.raises(ValueError, match="reduce: got 0"):
        Photos(reduce=0)
    with pytest.raises(ValueError, match="num_val: got 0"):
        Photos(num_val=0)
    with pytest.raises(ValueError, match="too small"):
        Photos(image_size=64, reduce=4).setup()
    with pytest.raises(ValueError, match="num_test: got 100000"):
        Photos(num_test=100_000).setup()

"""Crops of the sample photographs."""

import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import Photos, photos
from datamodules.photos import number_blocks, photographs
from datamodules.splits import SPLITS, Split


def show(monkeypatch: pytest.MonkeyPatch, *pictures: np.ndarray) -> None:
    """Put other photographs in the place of the real ones."""
    monkeypatch.setattr(photos, "photographs", lambda: list(pictures))


def split_of(numbered: np.ndarray) -> np.ndarray:
    """The place in SPLITS of every pixel's split."""
    return np.where(numbered == 0, 0, 2 - numbered % 2)


def test_the_photographs_give_all_three_splits() -> None:
    data = Photos(num_train=50, num_val=20, num_test=10)
    data.setup()
    assert {split: tuple(data.images(split).shape) for split in SPLITS} == {
        "train": (50, 3, 32, 32),
        "val": (20, 3, 32, 32),
        "test": (10, 3, 32, 32),
    }
    assert float(data.images("train")[:, 0].float().std()) > 20  # pictures, not something constant


def test_the_photographs_are_in_colour_and_all_different() -> None:
    found = photographs()
    assert len(found) == 7
    assert len({photo[:200, :200].tobytes() for photo in found}) == 7
    for photo in found:
        assert (photo.dtype, photo.shape[2]) == (np.uint8, 3)
        assert np.abs(photo[..., 0].astype(int) - photo[..., 2]).mean() > 3


def test_splits_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    # Every pixel of the two photographs has a colour of its own.
    number = np.arange(2 * 60 * 160)
    unique = np.stack([number >> 16, (number >> 8) & 255, number & 255], -1).astype(np.uint8).reshape(2, 60, 160, 3)
    show(monkeypatch, *unique)
    data = Photos(image_size=16, reduce=1, color="rgb", num_train=1000, num_val=60, num_test=60)
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
def test_the_reduction_does_not_look_into_another_split(monkeypatch: pytest.MonkeyPatch, reduce: int) -> None:
    # Blocks of one colour are equally lively, whatever the colour: they are dealt in the same way.
    numbered = number_blocks(np.zeros((60, 160, 3), dtype=np.uint8), 18)
    pixel_splits = split_of(numbered).repeat(reduce, 0).repeat(reduce, 1)
    for place, split in enumerate(SPLITS):
        # This split is white in a black photograph: no crop of it may be darkened, no crop of the others lit up.
        show(monkeypatch, np.where(pixel_splits == place, 255, 0).astype(np.uint8)[..., None].repeat(3, 2))
        data = Photos(image_size=16, reduce=reduce, color="rgb", num_train=400, num_val=30, num_test=30)
        data.setup()
        for other in SPLITS:
            assert torch.as_tensor(data.images(other)).unique().tolist() == [255 if other == split else 0]


def test_of_six_blocks_that_are_alike_one_is_for_validation_and_one_for_the_test() -> None:
    # Twelve blocks in a row with stripes of different contrast, in an order that is no order in space.
    contrast = np.random.RandomState(0).permutation(12)
    stripes = np.arange(10)[:, None, None] % 2 * np.ones((10, 10, 3), dtype=np.uint8)
    numbered = number_blocks(np.concatenate([stripes * (20 * rank) for rank in contrast], 1).astype(np.uint8), 10)
    by_contrast = [SPLITS[place] for place in split_of(numbered)[5, 5::10][np.argsort(contrast)]]
    dealt: list[Split] = ["train", "train", "val", "test", "train", "train"]
    assert by_contrast == [*dealt, "train", "train", "test", "val", "train", "train"]


def test_splits_are_alike_in_every_photograph() -> None:
    found = []
    for photo in photographs():
        reduced = np.asarray(Image.fromarray(photo).reduce(2))
        pixel_splits = split_of(number_blocks(reduced, 36))
        step = np.log2(1 + np.abs(np.diff(reduced[..., 1].astype(int), axis=1)))
        found.append([step[pixel_splits[:, 1:] == place].mean() for place in range(3)])
        assert min(np.mean(pixel_splits == place) for place in range(3)) > 0.1
    train, val, test = np.array(found).T  # 1.0 to 2.7 in the photographs
    assert np.abs(val - test).max() < 0.4
    assert np.abs(train - (val + test) / 2).max() < 0.4
    assert np.ptp(np.array(found).mean(0)) < 0.1


def test_crops_are_the_same_in_every_run_and_all_different(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Photos(num_train=30, seed=0), Photos(num_train=30, seed=1)
    one.setup()
    two.setup()
    for split in SPLITS:
        assert torch.equal(torch.as_tensor(one.images(split)), torch.as_tensor(two.images(split)))
    show(monkeypatch, np.random.RandomState(0).randint(256, size=(40, 160, 3)).astype(np.uint8))
    data = Photos(image_size=16, reduce=1, num_train=100, num_val=15, num_test=15)
    data.setup()
    assert len(torch.as_tensor(data.images("train")).unique(dim=0)) == 100


def test_photographs_of_too_few_blocks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = np.full((36, 45, 3), 10, dtype=np.uint8), np.full((36, 54, 3), 20, dtype=np.uint8)  # 4 and 6 blocks
    settings = {"image_size": 16, "reduce": 1, "color": "rgb", "num_train": 9, "num_val": 9, "num_test": 9}
    show(monkeypatch, small, large)
    data = Photos(**settings)
    data.setup()
    assert [torch.as_tensor(data.images(split)).unique().tolist() for split in SPLITS] == [[20]] * 3
    show(monkeypatch, small)
    with pytest.raises(ValueError, match="reduce, image_size: got 1 and 16; a photograph of 36 x 45 .* is too small"):
        Photos(**settings).setup()


def test_errors() -> None:
    with pytest.raises(ValueError, match="reduce: got 0"):
        Photos(reduce=0)
    with pytest.raises(ValueError, match="num_val: got 0"):
        Photos(num_val=0)
    with pytest.raises(ValueError, match="too small"):
        Photos(image_size=64, reduce=4).setup()
    with pytest.raises(ValueError, match="num_test: got 100000"):
        Photos(num_test=100_000).setup()

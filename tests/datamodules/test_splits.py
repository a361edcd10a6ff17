"""Splits that are stable over machines, seeds and neighbouring settings."""

import numpy as np
import pytest

from datamodules.splits import carve, check_fractions, divide, split_of_name, subset


def test_names_are_divided_about_as_asked() -> None:
    names = [f"class/{number:05d}.png" for number in range(5000)]
    splits = [split_of_name(name, 0.1, 0.2) for name in names]
    assert abs(splits.count("val") / 5000 - 0.1) < 0.02
    assert abs(splits.count("test") / 5000 - 0.2) < 0.02
    # The test set stays what it is when the validation set grows.
    assert [split == "test" for split in splits] == [split_of_name(name, 0.3, 0.2) == "test" for name in names]


def test_the_split_of_a_name_never_changes() -> None:
    expected = {"cat/0.png": "val", "cat/1.png": "train", "cat/8.png": "test", "Straße/ä.png": "train"}
    assert {name: split_of_name(name, 0.1, 0.1) for name in expected} == expected
    # File systems differ in how they write an accent.
    for number in range(30):
        composed, decomposed = f"\u00e4{number}", f"a\u0308{number}"
        assert split_of_name(composed, 0.3, 0.3) == split_of_name(decomposed, 0.3, 0.3)


def test_rows_are_divided_completely() -> None:
    parts = divide(1000, 0.1, 0.2)
    assert {split: len(rows) for split, rows in parts.items()} == {"train": 700, "val": 100, "test": 200}
    assert np.array_equal(np.sort(np.concatenate(list(parts.values()))), np.arange(1000))
    assert np.array_equal(parts["test"], divide(1000, 0.3, 0.2)["test"])
    rest, carved = carve(50, 7)
    assert (len(rest), len(carved)) == (43, 7)
    assert np.array_equal(np.sort(np.concatenate([rest, carved])), np.arange(50))


def test_small_subsets_lie_within_larger_ones() -> None:
    assert np.array_equal(subset(20, None), np.arange(20))
    assert np.array_equal(subset(20, 30), np.arange(20))
    assert np.array_equal(subset(20, 4), subset(20, 9)[:4])
    assert len(np.unique(subset(20, 9))) == 9


@pytest.mark.parametrize("fractions", [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2)])
def test_every_split_gets_a_part(fractions: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="val_fraction, test_fraction"):
        check_fractions(*fractions)

"""Tables: splits, noise, standardisation, the files of the five sets, patches made as those of BSDS300."""

import gzip
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import GreyPatches, SklearnTable, TableDataModule, UCITable
from datamodules.grey_patches import grey_patches
from datamodules.tables import standardized, with_rounding_noise

SPLITS = ("train", "val", "test")


def counts(data: TableDataModule) -> list[int]:
    data.setup()
    return [data.num_examples(split) for split in SPLITS]


@pytest.mark.parametrize("name", ["breast_cancer", "diabetes", "digits", "iris", "wine"])
def test_sets_of_scikit_learn_are_standardised_and_have_no_repeated_values(name: str) -> None:
    data = SklearnTable(name)
    assert min(counts(data)) > 10
    rows = data.batch("train", torch.arange(data.num_examples("train")))
    assert rows.dtype == torch.float32
    assert rows.mean(0).abs().max() < 1e-5
    assert (rows.std(0, correction=0) - 1).abs().max() < 1e-3
    assert all(len(column.unique()) > 0.9 * len(rows) for column in rows.T)


def test_loaders_give_rows_with_their_numbers() -> None:
    data = SklearnTable("iris", batch_size=7, seed=3)
    data.setup()
    x, index = next(iter(data.train_dataloader()))
    assert x.shape == (7, 4)
    assert torch.equal(x, data.batch("train", index))
    assert data.unit.name == "nats"
    assert data.unit.label == "nats (density)"
    other = SklearnTable("wine")
    other.setup()
    assert data.identity != other.identity


def test_noise_is_as_wide_as_the_smallest_step_of_its_column() -> None:
    table = np.stack([np.arange(1000) % 7 * 0.5, np.zeros(1000)], 1)
    noise = with_rounding_noise(table) - table
    assert 0.45 < noise[:, 0].max() < 0.5
    assert noise[:, 0].min() >= 0
    assert 0.9 < noise[:, 1].max() < 1


def test_a_value_that_is_no_number_and_a_wrong_number_of_columns_are_refused() -> None:
    class Broken(TableDataModule):
        num_columns = 2
        table: Any = np.array([[0.0, 1.0], [2.0, np.nan]])

        def load(self) -> dict[Any, Any]:
            return dict.fromkeys(SPLITS, self.table)

    with pytest.raises(ValueError, match="Broken: row 1 of the split 'train' has a value that is no finite number"):
        Broken().setup()
    Broken.table = np.zeros((3, 3))
    with pytest.raises(ValueError, match=r"the split 'train' has shape \(3, 3\), expected one row or more of 2"):
        Broken().setup()


def test_miniboone_and_power_are_split_by_tenths_and_standardised_on_what_is_no_test(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    for name, columns in (("miniboone", 43), ("power", 8)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "data.npy", 100 * random.rand(200, columns))
        data = UCITable(name, str(tmp_path))
        assert counts(data) == [162, 18, 20]
        assert data.num_dims == {"miniboone": 43, "power": 6}[name]
        rows = torch.cat([data.batch(split, torch.arange(data.num_examples(split))) for split in ("train", "val")])
        assert rows.mean(0).abs().max() < 1e-4
        assert (rows.std(0, correction=0) - 1).abs().max() < 1e-4


@pytest.mark.parametrize("file", ["data.npy", "ethylene_CO.txt"])
def test_gas_loses_its_targets_and_sensors_that_tell_the_same(file: str, tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    sensors = random.randn(400, 8)
    table = np.concatenate([random.rand(400, 3), sensors, sensors + 1e-3 * random.randn(400, 8)], 1)
    (tmp_path / "gas").mkdir()
    if file.endswith(".npy"):
        np.save(tmp_path / "gas" / file, table)
    else:
        np.savetxt(tmp_path / "gas" / file, table, header="Time (seconds), CO conc (ppm), and so on")
    data = UCITable("gas", str(tmp_path))
    assert counts(data) == ([324, 36, 40] if file.endswith(".npy") else [81, 9, 10])


def test_hepmass_keeps_signal_and_columns_that_are_no_categories(tmp_path: Path) -> None:
    random = np.random.RandomState(0)
    (tmp_path / "hepmass").mkdir()
    for name, opener in (("1000_train.csv", open), ("1000_test.csv.gz", gzip.open)):
        values = random.randn(100, 27)
        values[:, :6] = np.sign(values[:, :6])
        table = np.concatenate([np.arange(100)[:, None] % 2, values, np.full((100, 1), 1000.0)], 1)
        with opener(tmp_path / "hepmass" / name, "wt") as file:
            np.savetxt(file, table, delimiter=",", header="label,f0", comments="")
    data = UCITable("hepmass", str(tmp_path))
    assert counts(data) == [45, 5, 50]


def test_bsds300_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "BSDS300").mkdir()
    tables = {name: np.random.RandomState(0).rand(30, 63) for name in ("train", "validation", "test")}
    with h5py.File(tmp_path / "BSDS300" / "BSDS300.hdf5", "w") as file:
        for name, table in tables.items():
            file[name] = table
    data = UCITable("bsds300", str(tmp_path))
    assert counts(data) == [30, 30, 30]
    assert np.allclose(data.batch("val", torch.arange(30)).numpy(), tables["validation"], atol=1e-6)
    (tmp_path / "BSDS300" / "BSDS300.hdf5").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"BSDS300.hdf5: expected BSDS300/BSDS300.hdf5 with the arrays train"):
        UCITable("bsds300", str(tmp_path)).setup()


def test_a_missing_or_wrong_file_is_answered_with_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no gas/data.npy; expected .*a pickle is not read.*zenodo"):
        UCITable("gas", str(tmp_path)).setup()
    (tmp_path / "power").mkdir()
    np.save(tmp_path / "power" / "data.npy", np.zeros((30, 5)))
    with pytest.raises(ValueError, match=r"holds float64 of shape \(30, 5\), expected 20 rows or more of 8 columns"):
        UCITable("power", str(tmp_path)).setup()
    with pytest.raises(ValueError, match="table: got 'mnist', expected one of power"):
        UCITable("mnist")


def test_patches_have_no_mean_and_no_last_pixel(tmp_path: Path) -> None:
    ramp = np.tile(np.arange(16, dtype=np.uint8)[:, None, None] * 10, (1, 16, 3))
    rows = grey_patches(ramp.transpose(2, 0, 1)[None].astype(np.float64), 5, np.random.RandomState(0))
    assert rows.shape == (5, 63)
    steps = np.concatenate([rows, -rows.sum(1, keepdims=True)], 1).reshape(
        5, 8, 8
    )  # the last pixel is told by the rest
    assert np.abs(np.diff(steps, axis=1) * 256 - 10).max() < 1
    for number in range(40):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(tmp_path / f"{number}.png")
    data, again = (GreyPatches(str(tmp_path), image_size=16, num_patches=3) for _ in range(2))
    assert sum(counts(data)) == sum(counts(again)) == 3 * 40
    assert data.identity == again.identity


def test_a_constant_column_is_only_shifted() -> None:
    found = standardized({"train": np.ones((3, 2)), "val": np.zeros((3, 2)), "test": np.ones((1, 2))})
    assert found["train"].tolist() == [[0.0, 0.0]] * 3
    assert found["val"].tolist() == [[-1.0, -1.0]] * 3

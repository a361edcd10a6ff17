"""The five tables that densities are compared on: POWER, GAS, HEPMASS, MINIBOONE and the patches of BSDS300.

Columns are chosen, split and standardised as in the experiments of Papamakarios, Pavlakou and Murray, Masked
Autoregressive Flow for Density Estimation, 2017 (arXiv 1705.07057), appendix D, so that nats compare with published
ones. Nothing here unpickles: a pickle can run any code.

Shapes: N rows, D columns.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from typing_extensions import override

from datamodules.files import resolve
from datamodules.splits import Split
from datamodules.tables import Table, TableDataModule, standardized
from lvd_lightning.checks import check_choice
from lvd_lightning.files import ARRAY_ERRORS, load_npy

__all__ = ["UCITable"]

Splits = dict[Split, Table]
NAMES = ("power", "gas", "hepmass", "miniboone", "bsds300")
COLUMNS = {"power": 6, "gas": 8, "hepmass": 21, "miniboone": 43, "bsds300": 63}
LAYOUT = {
    "power": "power/data.npy (2,049,280 rows of 8 numbers)",
    "gas": "gas/ethylene_CO.txt of the UCI repository, or its numbers as gas/data.npy",
    "hepmass": "hepmass/1000_train.csv and hepmass/1000_test.csv, which may end in .gz",
    "miniboone": "miniboone/data.npy (36,488 rows of 43 numbers)",
    "bsds300": "BSDS300/BSDS300.hdf5 with the arrays train, validation and test, (rows, 63)",
}
SOURCE = "the archive of the five sets is at https://zenodo.org/records/1161203 (data.tar.gz)"


class UCITable(TableDataModule):
    """One of the five tables, read from the files of the archive that most papers use.

    Args:
        table: "power" (6 columns), "gas" (8), "hepmass" (21), "miniboone" (43) or "bsds300" (63).
        path: the folder of the archive, with a folder for each table.
        **common: the settings of every `TableDataModule`.

    Raises:
        ValueError: another name; at `setup`, a file that holds something else.
        FileNotFoundError: at `setup`, there is no such file; the message says what belongs there.

    Example:
        >>> UCITable("gas", path="data").num_columns
        8
    """

    def __init__(self, table: str, path: str = "data", **common: Any) -> None:
        super().__init__(**common)
        check_choice(NAMES, table=table)
        self.table = table
        self.path = path
        self.num_columns = COLUMNS[table]

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"table": self.table, **super().facts}

    @override
    def load(self) -> Mapping[Split, Table]:
        return _READERS[self.table](resolve(self.path))


def _power(folder: Path) -> Splits:
    """Without reactive power and intensity; noise of the width of a measurement's last digit."""
    table = _array(_one_of(folder, "power", "power/data.npy"), 8)
    random = np.random.RandomState(42)
    random.shuffle(table)
    rows = len(table)
    # In the order in which the published code draws them.
    voltage, power, meters = 0.01 * random.rand(rows, 1), 0.001 * random.rand(rows, 1), random.rand(rows, 3)
    return _last_tenths(np.delete(table, [1, 3], axis=1) + np.hstack([power, voltage, meters, np.zeros((rows, 1))]))


def _gas(folder: Path) -> Splits:
    """The sensors alone, without those that tell what others tell (a correlation above 0.98).

    The array of the archive is a quarter of the measurements in random order. Of the text file another such quarter is
    taken.
    """
    path = _one_of(folder, "gas", "gas/data.npy", "gas/ethylene_CO.txt")
    if path.suffix == ".npy":
        table = _array(path, 19)
    else:
        table = _text(path, 19, skip=1)
        table = table[np.random.RandomState(0).permutation(len(table))[: len(table) // 4]]
    table = table[:, 3:]  # the first three are the time and two concentrations
    while len(correlated := np.flatnonzero((np.corrcoef(table.T) > 0.98).sum(1) > 1)):
        table = np.delete(table, correlated[0], axis=1)
    return _last_tenths((table - table.mean(0)) / table.std(0), standardize=False)


def _hepmass(folder: Path) -> Splits:
    """Signal alone, without columns whose smallest value is repeated, as of categories."""
    train, test = (
        _text(_one_of(folder, "hepmass", f"hepmass/1000_{name}.csv", f"hepmass/1000_{name}.csv.gz"), None, 1, ",")
        for name in ("train", "test")
    )
    train, test = (table[table[:, 0] == 1][:, 1:28] for table in (train, test))
    if not len(train) or not len(test):
        raise ValueError(f"{folder}: hepmass: no row is signal, expected 1 in the first column of those that are")
    found = standardized({"train": train, "val": train, "test": test})
    repeats = (found["train"] == found["train"].min(0)).sum(0)
    kept = {split: table[:, repeats <= 5] for split, table in found.items()}
    num_val = len(train) // 10
    return {"train": kept["train"][:-num_val], "val": kept["train"][-num_val:], "test": kept["test"]}


def _miniboone(folder: Path) -> Splits:
    return _last_tenths(_array(_one_of(folder, "miniboone", "miniboone/data.npy"), None))


def _bsds300(folder: Path) -> Splits:
    """Patches as they were made, which have no scale to mend."""
    path = _one_of(folder, "bsds300", "BSDS300/BSDS300.hdf5")
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path}: to read it takes the package h5py: pip install 'lvd-lightning[flows]', or pip install h5py"
        ) from error
    try:
        with h5py.File(path, "r") as file:
            named: tuple[tuple[Split, str], ...] = (("train", "train"), ("val", "validation"), ("test", "test"))
            return {split: np.asarray(file[name], dtype=np.float64) for split, name in named}
    except (OSError, KeyError) as error:
        raise ValueError(f"{path}: expected {LAYOUT['bsds300']} ({error})") from error


_READERS: dict[str, Callable[[Path], Splits]] = {
    "power": _power,
    "gas": _gas,
    "hepmass": _hepmass,
    "miniboone": _miniboone,
    "bsds300": _bsds300,
}


def _last_tenths(table: Table, standardize: bool = True) -> Splits:
    """The last tenth for the test, the last tenth of the rest for validation; standardised over both other splits."""
    num_test = len(table) // 10
    rest, test = table[: len(table) - num_test], table[len(table) - num_test :]
    num_val = len(rest) // 10
    found: Splits = {"train": rest[: len(rest) - num_val], "val": rest[len(rest) - num_val :], "test": test}
    return standardized(found, by=("train", "val")) if standardize else found


def _one_of(folder: Path, table: str, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    other = " (a pickle is not read: it can run any code; save its numbers as gas/data.npy)" if table == "gas" else ""
    raise FileNotFoundError(f"{folder}: there is no {names[0]}; expected {LAYOUT[table]}{other}; {SOURCE}")


def _array(path: Path, columns: int | None) -> Table:
    try:
        found = load_npy(path)
    except (OSError, *ARRAY_ERRORS) as error:
        raise ValueError(f"{path}: cannot be read as a .npy file ({error})") from error
    return _checked(found, path, columns)


def _text(path: Path, columns: int | None, skip: int, delimiter: str | None = None) -> Table:
    try:
        found = np.loadtxt(path, delimiter=delimiter, skiprows=skip, ndmin=2)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a table of numbers ({error})") from error
    return _checked(found, path, columns)


def _checked(found: Any, path: Path, columns: int | None) -> Table:
    fits = found.ndim == 2 and len(found) >= 20 and found.dtype.kind in "fiu"
    if not fits or (columns is not None and found.shape[1] != columns):
        wanted = "" if columns is None else f" of {columns} columns"
        raise ValueError(f"{path}: holds {found.dtype} of shape {found.shape}, expected 20 rows or more{wanted}")
    table: Table = found.astype(np.float64)
    return table

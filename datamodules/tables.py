"""The frame of every data module of tables: rows of real numbers in memory, nats, loaders of global batches.

Shapes: N rows, D columns.
"""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from datamodules.identity import digest
from datamodules.loaders import GlobalLoaders
from datamodules.splits import SPLITS, Split, subset
from lvd_lightning.checks import check_at_least, check_choice, check_counts
from lvd_lightning.parts import Columns
from lvd_lightning.units import Nats, Unit

__all__ = ["Rows", "Table", "TableDataModule", "standardized", "with_rounding_noise"]

Table = npt.NDArray[np.float64]


class Rows(Dataset[tuple[Tensor, Tensor]]):
    """The rows of a split, which are read as whole batches (x [n, D], index int64 [n])."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        return self.rows[number], torch.tensor(number)

    def __getitems__(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        index = torch.tensor(numbers, dtype=torch.int64)
        return self.rows[index], index


class TableDataModule(GlobalLoaders):
    """Rows of real numbers in the splits train, val and test.

    Loaders yield (x, index): rows float32 (b, D), and their int64 numbers (b,) in the split. Which rows a split holds
    never depends on `seed`; the order of training is a function of (seed, epoch) alone. Likelihoods are densities, told
    in nats per row.

    A subclass reads the splits in `load`, and says in `num_columns` how many columns they have.

    Args:
        batch_size: rows per training step, all ranks together.
        num_workers: processes that read batches; 0 reads in the main process.
        seed: the seed of the training order.
        val_batch_size: rows per validation or test step, all ranks together; `batch_size` by default.
        max_examples: at most so many rows per split, for small runs.

    Raises:
        ValueError: a setting is out of range.

    Example:
        >>> import numpy as np
        >>> from datamodules import TableDataModule
        >>> class Noise(TableDataModule):
        ...     num_columns = 3
        ...     def load(self):
        ...         return {split: np.random.rand(10, 3) for split in ("train", "val", "test")}
        >>> data = Noise()
        >>> data.setup()
        >>> data.batch("val", torch.arange(2)).shape, data.parts.num_parts, data.unit.name
        (torch.Size([2, 3]), 3, 'nats')
    """

    num_columns: int

    def __init__(
        self,
        *,
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        val_batch_size: int | None = None,
        max_examples: int | None = None,
    ) -> None:
        super().__init__()
        check_counts(batch_size=batch_size, val_batch_size=val_batch_size, max_examples=max_examples)
        check_at_least(0, num_workers=num_workers, seed=seed)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.val_batch_size = val_batch_size or batch_size
        self.max_examples = max_examples
        self._rows: dict[Split, Tensor] = {}
        self._identity: dict[Split, str] = {}

    @abstractmethod
    def load(self) -> Mapping[Split, Table]:
        """Read every split, (N, D)."""

    @override
    def setup(self, stage: str | None = None) -> None:
        """Load all splits, once.

        Raises:
            FileNotFoundError: the data are not where the settings say; the message tells what belongs there.
            ValueError: a file is not what it should be, a split has no rows, or a value is not finite.
        """
        if self._rows:
            return
        rows = {}
        for split, table in self.load().items():
            if table.shape[1:] != (self.num_columns,) or not len(table):
                raise ValueError(
                    f"{type(self).__name__}: the split {split!r} has shape {table.shape}, expected one row or more of "
                    f"{self.num_columns} columns"
                )
            if not np.isfinite(table).all():
                number = int(np.argwhere(~np.isfinite(table))[0, 0])
                raise ValueError(
                    f"{type(self).__name__}: row {number} of the split {split!r} has a value that is no finite number: "
                    "remove or fill in such rows"
                )
            kept = table[subset(len(table), self.max_examples)]
            rows[split] = torch.from_numpy(np.ascontiguousarray(kept, dtype=np.float32))
        self._rows = rows

    @property
    def parts(self) -> Columns:
        """The columns."""
        return Columns(self.num_columns)

    @property
    def num_dims(self) -> int:
        """Columns of a row, D."""
        return self.num_columns

    @property
    def unit(self) -> Unit:
        """Nats per row, of a density."""
        return Nats(is_density=True)

    @property
    def protocol(self) -> str:
        """What stands in brackets beside every figure: nothing."""
        return ""

    @property
    def facts(self) -> dict[str, Any]:
        """The protocol for scripts."""
        return {"columns": self.num_columns}

    @property
    def identity(self) -> dict[str, str]:
        """A digest of every split: another one says that its rows are others."""
        for split in SPLITS:
            if split not in self._identity:
                rows = self.dataset(split).rows
                self._identity[split] = digest(str(tuple(rows.shape)).encode(), rows.numpy().tobytes())
        return {split: self._identity[split] for split in SPLITS}

    def num_examples(self, split: Split) -> int:
        """The number of rows in a split."""
        return len(self.dataset(split))

    def batch(self, split: Split, indices: Tensor) -> Tensor:
        """Read rows by their int64 numbers (n,), as float32 (n, D) on the CPU."""
        return self.dataset(split).rows[indices.cpu()]

    @override
    def dataset(self, split: Split) -> Rows:
        check_choice(SPLITS, split=split)
        if not self._rows:
            raise RuntimeError(f"{type(self).__name__} holds no rows yet: call setup() first")
        return Rows(self._rows[split])


def standardized(splits: Mapping[Split, Table], by: tuple[Split, ...] = ("train",)) -> dict[Split, Table]:
    """Columns with mean 0 and variance 1 over some of the splits together; a constant column is only shifted."""
    seen = np.concatenate([splits[split] for split in by])
    mean, std = seen.mean(0), seen.std(0)
    return {split: (table - mean) / np.where(std > 0, std, 1.0) for split, table in splits.items()}


def with_rounding_noise(table: Table, seed: int = 0) -> Table:
    """Values with uniform noise as wide as the smallest step between two values of their column; 1 if there is but one.

    Rounded numbers have no density: one that grows without bound on the values that occur is rewarded for it.

    Example:
        >>> table = np.array([[0.0], [0.5], [2.0]])
        >>> noise = with_rounding_noise(table) - table
        >>> bool((noise >= 0).all() and (noise < 0.5).all() and (noise > 0).any())
        True
    """
    steps = [np.diff(np.unique(column)) for column in table.T]
    width = np.array([step.min() if len(step) else 1.0 for step in steps])
    return table + width * np.random.RandomState(seed).rand(*table.shape)

"""Tables that come with scikit-learn: real data without a download."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from typing_extensions import override

from datamodules.splits import Split, check_fractions, divide
from datamodules.tables import Table, TableDataModule, standardized, with_rounding_noise
from lvd_lightning.checks import check_choice

__all__ = ["SklearnTable"]

#: The sets, and how many columns they have.
COLUMNS = {"breast_cancer": 30, "diabetes": 10, "digits": 64, "iris": 4, "wine": 13}


class SklearnTable(TableDataModule):
    """The columns of one of scikit-learn's sets, standardised on the training rows, without the class or target.

    The sets are small (150 to 1,797 rows) and their values rounded. Noise fills the gaps, as is done for POWER (see
    `with_rounding_noise`).

    Args:
        table: "breast_cancer" (569 rows of 30 columns), "diabetes" (442 of 10), "digits" (1,797 of 64), "iris" (150 of
            4) or "wine" (178 of 13).
        val_fraction: how much of the rows is for validation.
        test_fraction: how much of the rows is for the test.
        **common: the settings of every `TableDataModule`.

    Example:
        >>> data = SklearnTable("wine")
        >>> data.setup()
        >>> data.num_examples("train"), data.num_dims
        (142, 13)
    """

    def __init__(
        self, table: str = "breast_cancer", val_fraction: float = 0.1, test_fraction: float = 0.1, **common: Any
    ) -> None:
        super().__init__(**common)
        check_choice(COLUMNS, table=table)
        check_fractions(val_fraction, test_fraction)
        self.table = table
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.num_columns = COLUMNS[table]

    @property
    @override
    def facts(self) -> dict[str, Any]:
        return {"table": self.table, **super().facts}

    @override
    def load(self) -> Mapping[Split, Table]:
        from sklearn import datasets

        found = getattr(datasets, f"load_{self.table}")()
        values = with_rounding_noise(np.asarray(found.data, dtype=np.float64))
        rows = divide(len(values), self.val_fraction, self.test_fraction)
        return standardized({split: values[chosen] for split, chosen in rows.items()})

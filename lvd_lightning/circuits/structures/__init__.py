"""Circuit structures: functions that return graphs."""

from lvd_lightning.circuits.structures.chow_liu import chow_liu_tree, chow_liu_trees
from lvd_lightning.circuits.structures.data_driven import hclt_from_data
from lvd_lightning.circuits.structures.hclt import hclt

__all__ = ["chow_liu_tree", "chow_liu_trees", "hclt", "hclt_from_data"]

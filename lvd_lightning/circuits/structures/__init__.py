"""Circuit structures: functions that return graphs."""

from lvd_lightning.circuits.structures.chow_liu import chow_liu_tree, chow_liu_trees
from lvd_lightning.circuits.structures.data_driven import hclt_from_data
from lvd_lightning.circuits.structures.hclt import hclt
from lvd_lightning.circuits.structures.hmm import hmm
from lvd_lightning.circuits.structures.mixture import mixture
from lvd_lightning.circuits.structures.poon_domingos import poon_domingos
from lvd_lightning.circuits.structures.rat_spn import rat_spn
from lvd_lightning.circuits.structures.region_data import regions_from_data

__all__ = [
    "chow_liu_tree",
    "chow_liu_trees",
    "hclt",
    "hclt_from_data",
    "hmm",
    "mixture",
    "poon_domingos",
    "rat_spn",
    "regions_from_data",
]

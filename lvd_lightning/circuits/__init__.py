"""Probabilistic circuits in plain PyTorch: graphs, folded layers, EM, exact queries, files."""

from lvd_lightning.circuits import kernel_check  # noqa: F401 (the engine calls it before the first use of a GPU)
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import (
    Bernoulli,
    Binomial,
    Categorical,
    DiscretizedGaussian,
    DiscretizedLogistic,
    Distribution,
    Gaussian,
    Indicator,
    OrderedCategorical,
    SoftEvidence,
    register_distribution,
)
from lvd_lightning.circuits.em import Anemone, CircuitEM
from lvd_lightning.circuits.expectation import expectation
from lvd_lightning.circuits.expected import expected
from lvd_lightning.circuits.flows import Flows
from lvd_lightning.circuits.graph import CircuitGraph, Node
from lvd_lightning.circuits.grow import grow
from lvd_lightning.circuits.information import entropy, kl
from lvd_lightning.circuits.io import load, save
from lvd_lightning.circuits.materialization import materialize
from lvd_lightning.circuits.prune import prune
from lvd_lightning.circuits.pyjuice import from_pyjuice, to_pyjuice
from lvd_lightning.circuits.structures import (
    chow_liu_tree,
    hclt,
    hclt_from_data,
    hmm,
    mixture,
    poon_domingos,
    rat_spn,
    regions_from_data,
)
from lvd_lightning.circuits.temperature import TemperatureSchedule

__all__ = [
    "Anemone",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "Circuit",
    "CircuitEM",
    "CircuitGraph",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "Distribution",
    "Flows",
    "Gaussian",
    "Indicator",
    "Node",
    "OrderedCategorical",
    "SoftEvidence",
    "TemperatureSchedule",
    "chow_liu_tree",
    "entropy",
    "expectation",
    "expected",
    "from_pyjuice",
    "grow",
    "hclt",
    "hclt_from_data",
    "hmm",
    "kl",
    "load",
    "materialize",
    "mixture",
    "poon_domingos",
    "prune",
    "rat_spn",
    "regions_from_data",
    "register_distribution",
    "save",
    "to_pyjuice",
]

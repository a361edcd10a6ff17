"""Input distributions: log-likelihoods, closed-form gradients, statistics, sampling and modes of univariate units."""

from lvd_lightning.circuits.distributions.base import Distribution
from lvd_lightning.circuits.distributions.binomial import Binomial
from lvd_lightning.circuits.distributions.discretized_gaussian import DiscretizedGaussian
from lvd_lightning.circuits.distributions.evidence import SoftEvidence
from lvd_lightning.circuits.distributions.gaussian import Gaussian
from lvd_lightning.circuits.distributions.indicator import Indicator
from lvd_lightning.circuits.distributions.logistic import DiscretizedLogistic
from lvd_lightning.circuits.distributions.ordered import OrderedCategorical
from lvd_lightning.circuits.distributions.registry import (
    check_registered,
    find_distribution,
    register_distribution,
)
from lvd_lightning.circuits.distributions.tables import SMALLEST, Bernoulli, Categorical

__all__ = [
    "SMALLEST",
    "Bernoulli",
    "Binomial",
    "Categorical",
    "DiscretizedGaussian",
    "DiscretizedLogistic",
    "Distribution",
    "Gaussian",
    "Indicator",
    "OrderedCategorical",
    "SoftEvidence",
    "check_registered",
    "find_distribution",
    "register_distribution",
]

"""Tables over ordered values, which EM keeps smooth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lvd_lightning.checks import expect
from lvd_lightning.circuits.distributions.base import is_number
from lvd_lightning.circuits.distributions.smooth_prior import SmoothPrior
from lvd_lightning.circuits.distributions.tables import Categorical

__all__ = ["OrderedCategorical"]


@dataclass(frozen=True)
class OrderedCategorical(Categorical):
    r"""A `Categorical` over ordered values (levels of a pixel, say), whose M-step has a smooth prior.

    With F the flows of the data at the values of a unit, F_n their sum and g a Gaussian of `width` levels, EM adds

    .. math:: a (F * g)_v / F_n, \quad a = \text{share} \cdot F_n + \text{constant}

    to F. Flows alone are smoothed, never parameters, so that a unit does not get wider from step to step: steps on the
    same flows end at (F + share F * g) / (1 + share) where `constant` is 0. Near the ends of the range what g would
    send beyond it stays within: each value hands on as much as it has. A unit without flow keeps its parameters. With
    share and constant 0 this is a `Categorical`, to the last bit.

    EM and what counts values (`hclt_from_data` and its like) know the prior; all else is as for a `Categorical`.
    Gradient optimizers learn without it, and `to_pyjuice` writes a plain categorical.

    Args:
        num_categories: how many values there are, at least 1.
        share: how much the neighbours count beside the data, 0 or more. 0.25 gives a fifth of the mass to them.
        width: standard deviation of g in levels, positive.
        constant: pseudocount that does not grow with the flow, in examples per unit and step, 0 or more.

    Raises:
        ValueError: a number out of its range.

    References:
        Wang and van Ryzin, A class of smooth estimators for discrete distributions, Biometrika 1981: kernels over
        ordered values. Dempster, Laird and Rubin, Maximum likelihood from incomplete data via the EM algorithm, 1977:
        EM with a prior.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> leaf = pc.OrderedCategorical(5, share=0.25, width=1.0)
        >>> circuit = pc.Circuit(pc.hclt([-1], num_latents=1, leaf=leaf))
        >>> loss = -circuit.log_prob(torch.tensor([[2], [2], [2]])).sum()
        >>> loss.backward()
        >>> pc.CircuitEM(circuit, lr=1.0, pseudocount=0.0).step()
        >>> circuit.log_prob(torch.arange(5)[:, None]).detach().exp().flatten()
        tensor([0.0109, 0.0488, 0.8805, 0.0488, 0.0109])
    """

    share: float = 0.25
    width: float = 1.0
    constant: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("share", "constant"):
            value = getattr(self, name)
            fits = is_number(value) and 0 <= value < math.inf
            expect(fits, f"OrderedCategorical: {name}", value, "a number of at least 0")
        fits = is_number(self.width) and 0 < self.width < math.inf
        expect(fits, "OrderedCategorical: width", self.width, "a number above 0, in levels")

    @property
    def prior(self) -> SmoothPrior | None:
        return SmoothPrior(self.share, self.width, self.constant) if self.share > 0 or self.constant > 0 else None

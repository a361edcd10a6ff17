"""What is logged of a vector-quantised autoencoder: its likelihood, and the use of its codes.

Shapes: B images, K codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from lvd_lightning.metrics import MeanLikelihood
from lvd_lightning.units import Unit

if TYPE_CHECKING:
    from lvd_lightning.teachers import VQVAEOutput

__all__ = ["VQVAEScores"]


class VQVAEScores(nn.Module):
    """Means over images and ranks of what a VQVAE makes of them.

    elbo_<unit>: the evidence lower bound in a unit such as bpd, the sum of the next two.
    reconstruction_<unit>: of log p(x | z).
    prior_<unit>: of log p(z).
    loss: bits per dimension of the bound + commitment |h - code|^2 / E, what is minimised.
    code_perplexity: exp of the entropy of the codes' frequencies.
    codes_used: the share of the codes that occur.

    Args:
        unit: in which likelihoods are told.
        num_dims: of an image.
        num_codes: K.
        commitment: the weight in the loss.
        **metric_arguments: of every metric.
    """

    def __init__(self, unit: Unit, num_dims: int, num_codes: int, commitment: float, **metric_arguments: Any) -> None:
        super().__init__()
        self.bits = num_dims * math.log(2.0)
        self.commitment = commitment
        self.unit = unit
        for term in ("elbo", "reconstruction", "prior"):
            self.add_module(f"{term}_{unit.name}", MeanLikelihood(unit, num_dims, **metric_arguments))
        self.loss = MeanMetric(**metric_arguments)
        self.code_perplexity = _CodePerplexity(num_codes, **metric_arguments)
        self.codes_used = _CodesUsed(num_codes, **metric_arguments)

    def losses(self, output: VQVAEOutput) -> Tensor:
        """What is minimised, of every image, with shape (B,)."""
        return -output.elbo / self.bits + self.commitment * output.commitment

    def update(self, output: VQVAEOutput) -> Tensor:
        """Add a batch; its losses, with shape (B,)."""
        loss_B = self.losses(output)
        terms = {"elbo": output.elbo, "reconstruction": output.log_likelihood, "prior": output.log_prior}
        for term, log_B in terms.items():
            metric = self.get_submodule(f"{term}_{self.unit.name}")
            assert isinstance(metric, MeanLikelihood)
            metric.update(log_B)
        self.loss.update(loss_B.detach())
        self.code_perplexity.update(output.codes)
        self.codes_used.update(output.codes)
        return loss_B

    def named(self) -> Iterator[tuple[str, Metric]]:
        """The metrics, each with its name."""
        for name, metric in self.named_children():
            assert isinstance(metric, Metric)
            yield name, metric


class _CodeUse(Metric):
    """Counts codes, summed over ranks."""

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, num_codes: int, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.add_state("counts", torch.zeros(num_codes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, codes: Tensor) -> None:
        """Count int64 codes of any shape."""
        self.counts += codes.flatten().bincount(minlength=len(self.counts))


class _CodePerplexity(_CodeUse):
    def compute(self) -> Tensor:
        return torch.special.entr(self.counts / self.counts.sum()).sum().exp()


class _CodesUsed(_CodeUse):
    def compute(self) -> Tensor:
        return (self.counts > 0).float().mean()

"""How unexpected every part of an example is, and every pixel of a picture, given all the rest: exact conditionals.

Shapes: B examples, P parts (positions), K latent values, H x W pixels, p the side of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.checks import expect
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import ImagePatches

__all__ = ["latents_given_rest", "part_surprise", "pixel_surprise"]


def latents_given_rest(circuit: AssembledCircuit, evidence: Tensor) -> Tensor:
    """log p(z_i = k | all parts but the i-th) in nats, (B, P, K): two passes of the prior for every part.

    evidence: (B, P, K), from `AssembledCircuit.evidence`.
    """
    out_BPK = torch.empty_like(evidence)
    for position in range(circuit.num_positions):
        rest_BPK = evidence.clone()
        rest_BPK[:, position] = 0
        rest_BPK.requires_grad_()
        with torch.enable_grad():
            total = circuit.prior.log_prob(rest_BPK).sum()
        (posterior_BPK,) = torch.autograd.grad(total, rest_BPK)
        out_BPK[:, position] = posterior_BPK[:, position].log()
    return out_BPK


@torch.no_grad()
def part_surprise(circuit: AssembledCircuit, x: Tensor) -> Tensor:
    """-log p(x_i | all parts but the i-th) in nats, (B, P); x: examples (B, ...)."""
    evidence_BPK = circuit.evidence(x)
    return -(latents_given_rest(circuit, evidence_BPK) + evidence_BPK).logsumexp(2)


@torch.no_grad()
def pixel_surprise(circuit: AssembledCircuit, x: Tensor) -> Tensor:
    """-log p(pixel | all other pixels) in nats, (B, H, W), all channels of a pixel together.

    One pass over all conditional circuits for every pixel of a patch, beside those of `part_surprise`.

    x: images (B, C, H, W), as the datamodule gives them.

    Raises:
        ValueError: a circuit whose parts are no patches of images.
    """
    parts = circuit.parts
    expect(isinstance(parts, ImagePatches), "circuit", parts, "one over patches of images")
    assert isinstance(parts, ImagePatches)
    size, (_, height, width) = parts.patch_size, parts.example_shape
    evidence_BPK = circuit.evidence(x)
    given_BPK = latents_given_rest(circuit, evidence_BPK)
    whole_BP = (given_BPK + evidence_BPK).logsumexp(2)
    rows, columns = parts.grid
    out_BHW = torch.empty(len(x), height, width, dtype=whole_BP.dtype, device=whole_BP.device)
    for down in range(size):
        for right in range(size):
            observed = torch.ones(height, width, dtype=torch.bool, device=x.device)
            observed[down::size, right::size] = False  # one pixel of every patch: patches do not see each other here
            without_BP = (given_BPK + circuit.evidence(x, observed)).logsumexp(2)
            out_BHW[:, down::size, right::size] = (without_BP - whole_BP).view(-1, rows, columns)
    return out_BHW

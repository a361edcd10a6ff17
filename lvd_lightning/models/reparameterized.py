"""The same assembled circuit with other coordinates for its parameters, and a circuit over whole examples as one."""

from __future__ import annotations

from typing import Literal

from lvd_lightning import circuits as pc
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.parts import Parts, WholeExample, describe_parts

__all__ = ["as_assembled", "reparameterized"]


def reparameterized(
    circuit: AssembledCircuit, parameterization: Literal["probabilities", "logits"]
) -> AssembledCircuit:
    """A copy on the circuit's device: "logits" for gradient optimizers, "probabilities" for EM and everything else."""
    prior, conditional = (
        pc.Circuit(part.to_graph(), parameterization=parameterization).to(part.device)
        for part in (circuit.prior, circuit.conditional)
    )
    return AssembledCircuit(prior, conditional, circuit.parts)


def as_assembled(graph: pc.CircuitGraph, parts: Parts) -> AssembledCircuit:
    """A circuit over whole examples as an assembled one: a single part with a single latent value.

    Args:
        graph: over all variables of an example, flattened, with one head.
        parts: how the examples fall into smaller parts, which the circuit does not know of.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> from lvd_lightning.parts import ImagePatches
        >>> parts = ImagePatches((1, 2, 4), patch_size=2, num_categories=17)
        >>> graph = pc.hclt([-1, *range(7)], num_latents=2, leaf=parts.leaf)
        >>> as_assembled(graph, parts).sample(3).shape
        torch.Size([3, 1, 2, 4])
    """
    prior = pc.CircuitGraph()
    prior.add_sum([prior.add_input(0, pc.SoftEvidence(1), 1)], 1)
    return AssembledCircuit(pc.Circuit(prior), pc.Circuit([graph]), WholeExample(describe_parts(parts)))

"""What conditionals learn of an example, given posteriors of its latent values: the chain rule, a few heads at a time.

Shapes: B examples, P parts, D variables of a part, K latent values, G circuits, S slots, H heads, U pairs of a part
and a circuit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.models.assembled import MARGIN, AssembledCircuit
from lvd_lightning.models.shared_routing import route_batch
from lvd_lightning.shares import part_order

__all__ = ["conditional_loss", "training_evidence"]


def training_evidence(circuit: AssembledCircuit, x: Tensor) -> Tensor:
    """log p(x_i | z_i = k), (B, P, K), without gradients: exact where it counts, cheaper where it does not.

    Through it the prior's backward pass gives the posteriors p(z_i = k | x), for `conditional_loss`.
    """
    evidence_BPK = circuit.evidence(x, margin=MARGIN)
    with torch.no_grad():
        impossible_N = (circuit.prior.log_prob(evidence_BPK)[:, 0] == -torch.inf).nonzero()[:, 0]
    if len(impossible_N):  # the prior excludes all that is within the margin
        evidence_BPK[impossible_N] = circuit.evidence(x[impossible_N])
    return evidence_BPK


def conditional_loss(
    circuit: AssembledCircuit,
    x: Tensor,
    posterior: Tensor,
    *,
    floor: float,
    slots: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Minus the log-likelihoods of the conditionals, weighted by posteriors: a sum over examples, in nats.

    Args:
        x: examples (B, ...): of a batch that ranks share this one's, which may be none. All ranks have to call.
        posterior: (B, P, K); those that do not exceed `floor` count as zero.
        slots: slots per circuit, as a multiple of the mean number of its parts; of more parts a random sample counts.
        generator: for that sample, in one state on all ranks.
    """
    image, position, state = (posterior > floor).nonzero(as_tuple=True)
    circuit_N, head_N = circuit.head_index.locate(state, position)
    conditional = circuit.conditional
    # An example is a part in a circuit: the heads that it may have share everything below them.
    item = image * circuit.num_positions + position
    pair, place = (item * conditional.num_circuits + circuit_N).unique(return_inverse=True)
    item, circuit_U = pair // conditional.num_circuits, pair % conditional.num_circuits
    weight_UH = posterior.new_zeros(len(pair), conditional.num_heads)
    weight_UH[place, head_N] = posterior[image, position, state]
    weight_U = weight_UH.sum(1)
    order_N = part_order(len(x), circuit.num_positions, posterior.device)
    routed = route_batch(
        circuit_U,
        conditional.num_circuits,
        slots=slots,
        order=order_N[item] * conditional.num_circuits + circuit_U,
        weight=weight_U,
        generator=generator,
    )
    if not len(pair):
        return posterior.new_zeros(())
    rows_ND = circuit.split(x).flatten(0, 1)
    share_GSH = weight_UH[routed.index] / weight_U[routed.index][..., None]
    weight_GSH = routed.weight[..., None] * share_GSH
    log_GSH = conditional.log_prob(rows_ND[item[routed.index]], wanted=weight_GSH > 0)
    return -(weight_GSH * log_GSH).sum()

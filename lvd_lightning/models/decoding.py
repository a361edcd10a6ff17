"""The most likely completion of an example: variables, latent values and hidden states maximised together.

Shapes: B examples, P parts (positions), D variables of a part, K latent values, N = B P parts, G circuits, S slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.routing import route_in_passes

__all__ = ["max_product"]


@torch.no_grad()
def max_product(circuit: AssembledCircuit, x: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Max-product decoding of what is not observed.

    Exact: the joint maximum over unobserved variables, latent values and all hidden states, which need not be the most
    likely picture (that one is hard to find).

    Args:
        circuit: the model.
        x: examples (B, ...).
        observed: bool, broadcast to x; False: the value is looked for.

    Returns:
        Examples of the shape and type of x, and the logarithms (B,) of the maxima, in nats.
    """
    mask_BPD = circuit.parts.split(observed.expand(x.shape))
    x_BPD = circuit.split(x)
    x_ND, mask_ND = x_BPD.flatten(0, 1), mask_BPD.flatten(0, 1)
    values = x_ND if x_ND.is_floating_point() else x_ND.long()
    best_BPK = _best_values(circuit, values.view(x_BPD.shape), mask_BPD)
    z_BP, log_B = circuit.prior.mpe(best_BPK)
    circuit_N, head_N = (found_BP.flatten() for found_BP in circuit.head_index.locate(z_BP))
    out_ND = x_ND.clone()
    slots = max(1, circuit.conditional.batch_limit // 4)
    for index_GS, filled_GS in route_in_passes(circuit_N, circuit.conditional.num_circuits, slots):
        head_GS = torch.where(filled_GS, head_N[index_GS], 0)
        found_GSD, _ = circuit.conditional.mpe(values[index_GS], mask_ND[index_GS], head=head_GS)
        out_ND[index_GS[filled_GS]] = found_GSD[filled_GS].to(out_ND.dtype)
    return circuit.parts.join(out_ND.view(x_BPD.shape)), log_B


def _best_values(circuit: AssembledCircuit, values_BPD: Tensor, mask_BPD: Tensor) -> Tensor:
    """The largest value of log p(x_i, hidden states | z_i = k) over what is not observed, in nats, (B, P, K)."""
    conditional, index = circuit.conditional, circuit.head_index
    heads_G = torch.tensor([structure.num_heads for structure in conditional.structures], device=values_BPD.device)
    circuit_G = torch.arange(len(heads_G), device=values_BPD.device)
    out_BPK = torch.empty(*values_BPD.shape[:2], circuit.num_states, dtype=circuit.prior.dtype, device=mask_BPD.device)
    step = max(1, conditional.batch_limit // 4 // (values_BPD.shape[1] if index.tied else 1))
    for low in range(0, len(values_BPD), step):
        at = slice(low, low + step)
        if index.tied:  # every circuit looks at all parts, else at those of its position
            x, mask = values_BPD[at].flatten(0, 1), mask_BPD[at].flatten(0, 1)
        else:
            x, mask = (found[at].transpose(0, 1)[index.position(circuit_G)] for found in (values_BPD, mask_BPD))
        for number in range(int(heads_G.max())):
            head_G = torch.minimum(torch.full_like(heads_G, number), heads_G - 1)
            _, log_GN = conditional.mpe(x, mask, head=head_G[:, None].expand(-1, x.shape[-2]))
            for g in (heads_G > number).nonzero()[:, 0].tolist():
                state = int(index.value(circuit_G[g], head_G[g]))
                if index.tied:
                    out_BPK[at, :, state] = log_GN[g].view(-1, values_BPD.shape[1]).to(out_BPK.dtype)
                else:
                    out_BPK[at, int(index.position(circuit_G[g])), state] = log_GN[g].to(out_BPK.dtype)
    return out_BPK

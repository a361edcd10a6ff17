"""The likelihood of a long text under a homogeneous hidden Markov model, its state carried from the first word on.

Shapes: N tokens of the text, K states, V words.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.models.hmm_graph import HMMTables

__all__ = ["carried_log_prob"]


@torch.no_grad()
def carried_log_prob(tables: HMMTables, tokens: Tensor) -> float:
    """log p of a whole text in nats, by the exact forward recursion, in double precision.

    Perplexities of hidden Markov models in other papers are mostly of this kind. They are not to be compared with those
    of windows, whose first words have no context.

    Args:
        tables: of a homogeneous model: one table of transitions, one of emissions.
        tokens: int (N,), from the first to the last.

    Raises:
        ValueError: tables of their own for every position, or a token that there is none of.

    Example:
        >>> initial, swap = torch.tensor([1.0, 0.0]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
        >>> tables = HMMTables(initial, swap, torch.tensor([[[0.5, 0.5], [0.0, 1.0]]]))
        >>> round(carried_log_prob(tables, torch.tensor([0, 1, 1, 1])), 6)  # a half, twice
        -1.386294
    """
    if not tables.homogeneous:
        raise ValueError("tables: got one for every position, expected those of a homogeneous model")
    vocabulary = tables.emission_SKV.shape[-1]
    if tokens.ndim != 1 or (len(tokens) and not (int(tokens.min()) >= 0 and int(tokens.max()) < vocabulary)):
        raise ValueError(f"tokens: got {tuple(tokens.shape)}, expected a row of whole numbers 0..{vocabulary - 1}")
    transition_KK = tables.transition_SKK[0].double().T.contiguous()  # z_t-1 along columns
    emission_VK = tables.emission_SKV[0].T.contiguous()
    state_K = tables.initial_K.double()
    scales = torch.empty(len(tokens), dtype=torch.float64, device=state_K.device)
    for number, token in enumerate(tokens.long()):
        joint_K = state_K * emission_VK[token]
        scales[number] = joint_K.sum()
        state_K = transition_KK @ (joint_K / scales[number])
    return float(scales.log().sum())

"""A hidden Markov model in closed form: maximum likelihood from counts of states and tokens.

Shapes: N windows, T positions, K states, V tokens; S is T - 1 transitions or T emissions, or 1 where positions share a
table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lvd_lightning.checks import check_at_least, check_counts
from lvd_lightning.models.hmm_graph import HMMTables
from lvd_lightning.ranks import sum_in_place

__all__ = ["HMMCounts"]


class HMMCounts:
    r"""Counts of first states, of transitions and of emissions, from windows whose states are known.

    With n(k, v) the times that token v came in state k, and n(k) their sum over tokens, the likelihood of tokens and
    states together is greatest at p(v | k) = n(k, v) / n(k), and likewise for transitions and first states. A
    pseudocount a makes of it (n(k, v) + a / V) / (n(k) + a). A state that never came has a uniform row.

    Counts are sums over windows: each process counts its share, and `all_reduce` adds them up.

    Args:
        length: T.
        num_states: K.
        num_tokens: V.
        homogeneous: whether all positions share one table of transitions and one of emissions.

    Raises:
        ValueError: a size that is no whole number of at least 1.

    References:
        Liu, Zhang and Van den Broeck, Scaling Up Probabilistic Circuits by Latent Variable Distillation, 2023
        (arXiv 2210.04398), section 2.

    Example:
        >>> counts = HMMCounts(length=2, num_states=2, num_tokens=3, homogeneous=False)
        >>> counts.add(torch.tensor([[0, 1], [0, 0]]), torch.tensor([[2, 0], [2, 1]]))
        >>> tables = counts.tables(pseudocount=0.0)
        >>> tables.initial_K.tolist(), tables.transition_SKK[0, 0].tolist(), tables.emission_SKV[0, 0].tolist()
        ([1.0, 0.0], [0.5, 0.5], [0.0, 0.0, 1.0])
    """

    def __init__(self, length: int, num_states: int, num_tokens: int, homogeneous: bool) -> None:
        check_counts(length=length, num_states=num_states, num_tokens=num_tokens)
        self.length, self.num_states, self.num_tokens, self.homogeneous = length, num_states, num_tokens, homogeneous
        transitions, emissions = (1, 1) if homogeneous else (length - 1, length)
        self.initial_K = torch.zeros(num_states, dtype=torch.int64)
        self.transition_SKK = torch.zeros(transitions, num_states, num_states, dtype=torch.int64)
        # Half the memory of int64, and as many bytes as the float32 table that is made of it.
        self.emission_SKV = torch.zeros(emissions, num_states, num_tokens, dtype=torch.int32)

    def add(self, z_NT: Tensor, x_NT: Tensor) -> None:
        """Count windows: states int64 (N, T), tokens int64 (N, T).

        Raises:
            ValueError: other shapes, or a state or token that there is none of.
        """
        if x_NT.ndim != 2 or x_NT.shape[1] != self.length or z_NT.shape != x_NT.shape:
            raise ValueError(
                f"z, x: got shapes {tuple(z_NT.shape)} and {tuple(x_NT.shape)}, expected (windows, {self.length}) both"
            )
        for name, found, limit in (("z", z_NT, self.num_states), ("x", x_NT, self.num_tokens)):
            if found.numel() and not (int(found.min()) >= 0 and int(found.max()) < limit):
                raise ValueError(f"{name}: got {int(found.min())}..{int(found.max())}, expected 0..{limit - 1}")
        z_NT, x_NT = z_NT.cpu().long(), x_NT.cpu().long()
        self.initial_K += torch.bincount(z_NT[:, 0], minlength=self.num_states)
        place_T = torch.zeros(self.length, dtype=torch.int64) if self.homogeneous else torch.arange(self.length)
        before_NT = place_T[: self.length - 1] * self.num_states + z_NT[:, :-1]
        _count(self.transition_SKK, before_NT * self.num_states + z_NT[:, 1:])
        _count(self.emission_SKV, (place_T * self.num_states + z_NT) * self.num_tokens + x_NT)

    def all_reduce(self) -> None:
        """Sum the counts of all processes, which all have to call."""
        sum_in_place([self.initial_K, self.transition_SKK, self.emission_SKV])

    def tables(self, pseudocount: float, dtype: torch.dtype = torch.float32) -> HMMTables:
        """The maximum likelihood tables, smoothed; in float32 the counts of emissions are used up.

        pseudocount: a, in examples per row, spread over its entries.

        Raises:
            ValueError: a negative pseudocount.
        """
        check_at_least(0, pseudocount=pseudocount)
        found = (self.initial_K.to(dtype), self.transition_SKK.to(dtype), _as_numbers(self.emission_SKV, dtype))
        for table in found:
            if table.numel():
                _normalise(table, pseudocount)
        return HMMTables(*found)


def _count(table: Tensor, cells: Tensor) -> None:
    ones = torch.ones(1, dtype=table.dtype).expand(cells.numel())
    table.view(-1).index_add_(0, cells.reshape(-1), ones)


def _as_numbers(counts_SKV: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as floating point numbers; as float32 in the memory that they have, row by row."""
    if dtype != torch.float32:
        return counts_SKV.to(dtype)
    found_SKV = counts_SKV.view(torch.float32)
    for count_KV, out_KV in zip(counts_SKV, found_SKV):
        for count_V, out_V in zip(count_KV, out_KV):
            out_V.copy_(count_V.clone())
    return found_SKV


def _normalise(table: Tensor, pseudocount: float) -> None:
    total = table.sum(-1, keepdim=True)
    table.add_(pseudocount / table.shape[-1]).div_((total + pseudocount).clamp_min_(1e-30))
    if pseudocount == 0:
        table.masked_fill_(total == 0, 1 / table.shape[-1])

"""A codebook that follows the vectors it quantises by moving averages, identical on all ranks.

Shapes: N vectors, K codes, E features, M dead codes.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lvd_lightning.checks import check_counts, check_share
from lvd_lightning.ranks import gathered, sum_in_place
from lvd_lightning.shares import drawn_for_batch

__all__ = ["Codebook"]

_CHUNK_ENTRIES = 2**24  # distances held at once: 64 MiB


class Codebook(nn.Module):
    """K vectors; the code of a vector is the nearest of them.

    The codes are no parameters: `update` moves each to the mean of the vectors that have chosen it, both sums being
    moving averages,

        n_k <- d n_k + (1 - d) |{i: z_i = k}|,   s_k <- d s_k + (1 - d) sum_{i: z_i = k} h_i,   code_k = s_k / n_k

    with d = (1 + t) / (10 + t) after t updates, at most `decay`: at first features move fast, and codes have to follow.
    A code with n_k at most `dead_below` times the average is dead, and is put on a vector of the batch, drawn with
    probability proportional to its squared distance from its code, without replacement. All codes begin dead, so the
    first batch places them. Sums and candidates are those of all ranks, so every rank takes the same decisions.

    It is written out here, because of three things that the vector-quantize-pytorch package (1.32, which brings five
    more) does otherwise: it draws new places from the global random numbers, so a run depends on whatever else draws
    them; it sums by products with one-hot matrices (a step of 4096 vectors, 1024 codes and 128 features: 62 ms on a
    CPU, here 22); and with several ranks, where dead codes outnumber vectors, it puts two of them on one vector.

    Args:
        num_codes: K.
        num_features: E.
        decay: the moving averages' longest memory; 0 <= decay < 1.
        dead_below: the share of an average code's use at which a code is dead; 0 <= dead_below < 1.

    References:
        van den Oord et al., Neural Discrete Representation Learning, 2017, arXiv:1711.00937, appendix A.1.
        Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007, for the draw.
    """

    codes: Tensor
    count: Tensor
    total: Tensor
    num_updates: Tensor

    def __init__(self, num_codes: int, num_features: int, *, decay: float = 0.99, dead_below: float = 0.1) -> None:
        super().__init__()
        check_counts(num_codes=num_codes, num_features=num_features)
        check_share(decay=decay, dead_below=dead_below)
        self.decay, self.dead_below = decay, dead_below
        self.register_buffer("codes", torch.randn(num_codes, num_features))
        self.register_buffer("count", torch.zeros(num_codes))
        self.register_buffer("total", torch.zeros(num_codes, num_features))
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Moves as every module does, but stays in float32 at least: averages over many steps need the digits."""
        super()._apply(fn, recurse)
        for name in ("codes", "count", "total"):
            found: Tensor = getattr(self, name)
            if found.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, found.float())
        return self

    @torch.no_grad()
    def nearest(self, vectors: Tensor) -> Tensor:
        """The nearest code of every vector (..., E), int64 with shape (...); of equally near ones the first."""
        h_NE = vectors.reshape(-1, vectors.shape[-1]).to(self.codes.dtype)
        z_N = torch.empty(len(h_NE), dtype=torch.int64, device=h_NE.device)
        with torch.autocast(h_NE.device.type, enabled=False):  # half a byte of mantissa cannot tell codes apart
            offset_K = 0.5 * self.codes.square().sum(1)
            step = max(1, _CHUNK_ENTRIES // len(self.codes))
            for start in range(0, len(h_NE), step):
                # Half the squared distances without the term that all codes share.
                score_nK = torch.addmm(offset_K, h_NE[start : start + step], self.codes.T, alpha=-1.0)
                z_N[start : start + step] = score_nK.argmin(1)
        return z_N.view(vectors.shape[:-1])

    @torch.no_grad()
    def update(self, vectors: Tensor, codes: Tensor, generator: torch.Generator) -> None:
        """One step of the moving averages, and new places for dead codes; all ranks call, each with its own vectors.

        Args:
            vectors: with shape (B, ..., E), of the examples of a batch that this rank has.
            codes: their codes before the update, int64 with shape (B, ...).
            generator: on the CPU, in one state on all ranks, for the draw of places.
        """
        h_NE = vectors.detach().reshape(-1, vectors.shape[-1]).to(self.codes.dtype)
        z_N = codes.reshape(-1)
        distance_N = (h_NE - self.codes[z_N]).square().sum(1)
        sums_KE1 = h_NE.new_zeros(len(self.codes), h_NE.shape[1] + 1)
        sums_KE1.index_add_(0, z_N, torch.cat([h_NE, h_NE.new_ones(len(h_NE), 1)], dim=1))
        sum_in_place([sums_KE1])
        forget = (9.0 / (10.0 + self.num_updates)).clamp_min(1.0 - self.decay)
        self.num_updates += 1
        self.total.lerp_(sums_KE1[:, :-1], forget)
        self.count.lerp_(sums_KE1[:, -1], forget)
        mean_KE = self.total / self.count[:, None]
        self.codes.copy_(torch.where(self.count[:, None] > 0, mean_KE, self.codes))
        dead = (self.count <= self.dead_below * self.count.mean()).nonzero()[:, 0]
        if len(dead) > 0:
            noise_N = drawn_for_batch(partial(_noise, math.prod(codes.shape[1:]), generator), len(codes)).flatten()
            self._revive(dead, _draw(h_NE, distance_N, len(dead), noise_N), sums_KE1[:, -1].mean())

    def _revive(self, dead: Tensor, places_mE: Tensor, count: Tensor) -> None:
        """Put the first of the dead codes on new places, with the average use of a code."""
        dead = dead[: len(places_mE)]
        self.codes[dead] = places_mE
        self.count[dead] = count
        self.total[dead] = places_mE * count


def _noise(vectors_each: int, generator: torch.Generator, count: int) -> Tensor:
    """Exponential variables for the vectors of `count` examples."""
    return torch.empty(count, vectors_each, dtype=torch.float64).exponential_(generator=generator)


def _draw(h_NE: Tensor, weight_N: Tensor, number: int, noise_N: Tensor) -> Tensor:
    """At most `number` of all ranks' vectors, without replacement and in proportion to their weights; (m, E).

    Each weight is divided by its exponential variable, and the largest quotients win: every rank offers its own
    winners. Vectors of weight zero are never drawn.
    """
    quotient_N = weight_N / noise_N.to(h_NE).clamp_min(1e-30)
    best = quotient_N.topk(min(number, len(h_NE))).indices
    offer_ME1 = h_NE.new_zeros(number, h_NE.shape[1] + 1)
    offer_ME1[: len(best)] = torch.cat([h_NE[best], quotient_N[best, None]], dim=1)
    offer_ME1 = gathered(offer_ME1)
    winners_ME1 = offer_ME1[offer_ME1[:, -1].topk(number).indices]
    return winners_ME1[winners_ME1[:, -1] > 0, :-1]

"""Arithmetic in float64 whose results do not depend on where it is done.

Additions, products, divisions and roundings of two numbers are what IEEE 754 says on every machine. Sums of many are
not: their order is the library's. So the terms of a sum are rounded to whole multiples of a power of two, few enough of
them that all partial sums are below 2^53 such units. Then no addition rounds, and matrix products are exact, by
whichever kernel, in whichever order.

Shapes: N outputs, K inputs, B columns (pictures); leading dimensions "..." may be any.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LEAST", "Weights", "exp_of_negative", "flushed", "power_of_two", "products", "rounded_down"]

#: Bits of a float64's mantissa: whole numbers up to 2^53 are exact.
MANTISSA = 53
#: What is smaller counts as zero. Products of two numbers above it are normal numbers, so that it does not matter how a
#: machine treats subnormal ones.
LEAST = 2.0**-500
#: ln 2 in two parts; multiples of the first one up to 2^10 are exact.
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent, exactly; exponent: int64 of -1022..1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def exponent_of(values: Tensor) -> Tensor:
    """The int64 e of 2^(e - 1) <= value < 2^e; values: float64, positive normal numbers (0 gives -1022)."""
    return ((values.contiguous().view(torch.int64) >> 52) & 0x7FF) - 1022


def flushed(values: Tensor) -> Tensor:
    """Non-negative numbers, those below `LEAST` as zero."""
    return torch.where(values < LEAST, 0.0, values)


def rounded_down(values: Tensor, bits: int, dim: int = -2) -> tuple[Tensor, Tensor]:
    """Non-negative numbers as whole ones below 2^bits, and the power of two (with `dim` kept) that makes them large
    again; the largest along `dim` keeps all its bits."""
    exponent = exponent_of(values.amax(dim, keepdim=True)).clamp_min(-600)
    whole = (values * power_of_two(bits - exponent)).floor_()
    return whole, power_of_two(exponent - bits)


class Weights:
    """Tables of non-negative weights for exact products, of one shape (F, N, K), every row rounded on its own.

    Positive weights stay positive.

    Args:
        table: float64 (F, N, K).
        bits: of the largest weight of a row.
    """

    def __init__(self, table: Tensor, bits: int = 22) -> None:
        exponent_FN1 = exponent_of(table.amax(-1, keepdim=True)).clamp_min(-600)
        whole_FNK = (table * power_of_two(bits - exponent_FN1)).round_()
        self.whole_FNK = torch.where(table > 0, whole_FNK.clamp_min(1), 0.0)
        self.scale_FN1 = power_of_two(exponent_FN1 - bits)
        self.bits = bits

    def to(self, device: torch.device) -> Weights:
        """Themselves, on another device."""
        self.whole_FNK, self.scale_FN1 = self.whole_FNK.to(device), self.scale_FN1.to(device)
        return self

    def up(self, index: Tensor, x_FKB: Tensor) -> Tensor:
        """The products of tables `index` with x, (F, N, B)."""
        return products(self.whole_FNK[index], x_FKB, self.bits) * self.scale_FN1[index]

    def down(self, index: Tensor, x_FNB: Tensor) -> Tensor:
        """The products of the transposed tables with x, (F, K, B)."""
        return products(self.whole_FNK[index].transpose(1, 2), x_FNB * self.scale_FN1[index], self.bits)


def products(whole_FNK: Tensor, x_FKB: Tensor, bits: int) -> Tensor:
    """Matrix products of whole numbers of at most 2^bits with non-negative x, rounded so that they are exact."""
    num_terms = whole_FNK.shape[-1]
    left = MANTISSA - bits - math.ceil(math.log2(max(num_terms, 2)))
    whole_FKB, scale_F1B = rounded_down(x_FKB, left)
    return flushed(torch.matmul(whole_FNK, whole_FKB) * scale_F1B)


def exp_of_negative(values: Tensor) -> Tensor:
    """exp(-values) for values of at least 0, within a few units of the last place; 0 beyond 300.

    Libraries have exponentials of their own, which differ in the last place. This one is a Taylor polynomial on
    [-ln 2 / 2, ln 2 / 2].
    """
    x = -values.clamp_max(301.0)
    number = (x * (1.0 / math.log(2.0))).round()
    rest = (x - number * _LN2_HIGH) - number * _LN2_LOW
    found = torch.full_like(rest, 1.0 / math.factorial(14))
    for degree in range(13, -1, -1):
        found = found * rest
        found = found + 1.0 / math.factorial(degree)
    return torch.where(values > 300.0, 0.0, found * power_of_two(number.long()))

"""Buffers of forward and backward passes, bound to the layers once and used again.

Shapes: F folded nodes, H outer units, K inner units, B batch, V and E the row spaces of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lvd_lightning.circuits.engine.gather import BoundGather
from lvd_lightning.circuits.engine.plan import LOG_ONE, LOG_ZERO

if TYPE_CHECKING:
    from lvd_lightning.circuits.engine.layers import Layer

__all__ = [
    "BoundBackward",
    "BoundForward",
    "GradientSpace",
    "LinearWorkspace",
    "Pool",
    "Underflow",
    "Workspace",
    "few_sizes",
    "initialise_constants",
]


@dataclass
class Underflow:
    """Entries of one layer's output that were computed in log space; `index_FHB` has shape (3, entries)."""

    layer: int
    index_FHB: Tensor


class Pool:
    """Workspaces that are free again: fresh memory costs as much as the arithmetic on it. Copies start with none.

    A training step uses three to six (two forward passes may be alive, a backward pass, a top-down pass, and both for
    what is computed again); the least recently used beyond `limit` go.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self.free: list[tuple[object, object]] = []

    def take(self, key: object) -> object | None:
        """A workspace that was made for `key`, if one is free."""
        for position, (found, space) in enumerate(self.free):
            if found == key:
                del self.free[position]
                return space
        return None

    def give(self, key: object, space: object) -> None:
        """Return a workspace."""
        self.free.append((key, space))
        del self.free[: -self.limit]

    def __deepcopy__(self, memo: dict[int, object]) -> Pool:
        return Pool(self.limit)

    def __reduce__(self) -> tuple[type[Pool], tuple[int]]:
        return Pool, (self.limit,)


@dataclass
class BoundForward:
    """One chunk of folds low..high of a layer with the buffers of its forward pass."""

    low: int
    high: int
    gather: BoundGather | None  # None: `value` is a slice of the values
    value: Tensor  # (F, K, B), of the inner units: logarithms to base 2, or linear
    inner: Tensor  # (F, K, B)
    inner_transposed: Tensor  # (F, B, K)
    scale: Tensor  # (F, 1, B)
    sums: Tensor  # (F, H, B)
    out: Tensor  # (F, H, B)


@dataclass
class BoundBackward:
    """One chunk of folds of a layer with the buffers of its backward pass."""

    gather: BoundGather | None  # None: `pulled` is a slice of the gradient
    pulled: Tensor  # (F, H, B)
    scaled: Tensor  # (F, H, B)
    grad: Tensor  # (F, K, B)


class Workspace:
    """Buffers of one forward pass over `size` examples, and the layers bound to them.

    values (V rows, B): log-likelihoods to base 2. With `keep`, for a backward pass: inner (E rows, B), linear inner
    values, and sums, linear outer values of all sum layers; else one chunk of each. underflow: see `Underflow`.
    """

    def __init__(
        self, layers: Sequence[Layer], num_values: int, num_edges: int, size: int, keep: bool, like: Tensor
    ) -> None:
        self.keep = keep
        self.values = like.new_empty(num_values, size)
        self.values[LOG_ONE] = 0.0
        self.values[LOG_ZERO] = -torch.inf
        chunks = {layer.number: list(layer.chunks(layer.width * size, like.device)) for layer in layers}
        sums = [layer for layer in layers if layer.is_sum]
        if keep:
            self.inner = like.new_empty(num_edges, size)
            self.sums = like.new_empty(sum(layer.num_folds * layer.outer_units for layer in sums), size)
        else:
            folds = [(layer, b - a) for layer in sums for a, b in chunks[layer.number][:1]]
            self.inner = like.new_empty(max((n * layer.edge_units for layer, n in folds), default=0), size)
            self.sums = like.new_empty(max((n * layer.outer_units for layer, n in folds), default=0), size)
        scale = max((b - a for layer in sums for a, b in chunks[layer.number]), default=0)
        self.scale = like.new_empty(scale * size)
        scratch = max((layer.scratch_size(size, like.device, backward=False) for layer in layers), default=0)
        self.scratch = like.new_empty(scratch)
        self.underflow: list[Underflow] = []
        self.bound: dict[int, list[BoundForward]] = {}
        start = 0
        for layer in layers:
            self.bound[layer.number] = [layer.bind_forward(self, a, b, start) for a, b in chunks[layer.number]]
            start += layer.num_folds * layer.outer_units if layer.is_sum and keep else 0

    @property
    def nbytes(self) -> int:
        """Memory of all buffers."""
        buffers = (self.values, self.inner, self.sums, self.scale, self.scratch)
        return sum(buffer.nbytes for buffer in buffers)


class LinearWorkspace:
    """Buffers of one forward pass with linear values; to the backward pass it looks like a `Workspace`.

    values (V rows, B): likelihoods, those of sum nodes divided by the largest inner units (`peaks`, a row per sum node
    in the order of the layers) of all sum nodes below and of their own. Inner units, divided by their peaks, overwrite
    the inputs that they are products of, or are in `inner` where their first factors are not rows of inputs in order.
    """

    def __init__(
        self, layers: Sequence[Layer], num_values: int, num_edges: int, size: int, keep: bool, like: Tensor
    ) -> None:
        self.keep = keep
        self.values = like.new_empty(num_values, size)
        self.values[LOG_ONE] = 1.0
        self.values[LOG_ZERO] = 0.0
        self.first_sum = min(layer.outer_start for layer in layers)
        self.sums = self.values[self.first_sum :]
        self.peaks = like.new_empty(sum(layer.num_folds for layer in layers), size)
        chunks = {layer.number: list(layer.chunks(layer.width * size, like.device)) for layer in layers}
        apart = [layer for layer in layers if layer.in_place_start(self.first_sum) is None]
        if not keep:
            num_edges = max(
                ((b - a) * layer.inner_units for layer in apart for a, b in chunks[layer.number]), default=0
            )
        self.inner = like.new_empty(num_edges if apart else 0, size)
        self.scratch = like.new_empty(max((layer.inputs.largest_part() for layer in layers), default=0) * size)
        self.underflow: list[Underflow] = []
        self.bound: dict[int, list[BoundForward]] = {}
        start = 0
        for layer in layers:
            self.bound[layer.number] = [layer.bind_linear(self, a, b, start) for a, b in chunks[layer.number]]
            start += layer.num_folds

    def is_large(self, tiny: float) -> bool:
        """Whether no number got so small that it, or what was lost below it, could matter."""
        return float(self.peaks.amin()) * float(self.sums.amin()) >= tiny

    def heads(self, roots: Tensor) -> Tensor:
        """Values of the heads, (G, H, B)."""
        return self.values[roots]

    def largest(self) -> Tensor:
        """The largest unit of every sum node, (N, B); units of 0 become positive, so that gradients can be divided."""
        self.sums.clamp_min_(torch.finfo(self.sums.dtype).tiny)
        out_NB = torch.empty_like(self.peaks)
        low = 0
        for chunks in self.bound.values():
            for bound in chunks:
                torch.amax(bound.sums, 1, out=out_NB[low : low + bound.high - bound.low])
                low += bound.high - bound.low
        return out_NB

    def make_finite(self) -> None:
        """Let examples without support have inner units of 0, so that a gradient of 0 stays 0."""
        for buffer in (self.values, self.inner):
            buffer.nan_to_num_(nan=0.0, posinf=0.0)
        self.sums.clamp_min_(torch.finfo(self.sums.dtype).tiny)


class GradientSpace:
    """Buffers of one backward pass: `inner` (E rows, B), and the layers bound to it."""

    def __init__(self, layers: Sequence[Layer], num_edges: int, size: int, like: Tensor) -> None:
        self.inner = like.new_empty(num_edges, size)
        self.inner[0] = 0.0
        chunks = {layer.number: list(layer.chunks(layer.width * size, like.device)) for layer in layers}
        rows = max(((b - a) * layer.outer_units for layer in layers for a, b in chunks[layer.number]), default=0)
        self.scaled = like.new_empty(rows * size)
        scratch = max((layer.scratch_size(size, like.device, backward=True) for layer in layers), default=0)
        self.scratch = like.new_empty(scratch)
        self.bound = {
            layer.number: [layer.bind_backward(self, a, b) for a, b in chunks[layer.number]] for layer in layers
        }


def few_sizes(size: int) -> int:
    """`size` or at most a quarter more, one of few numbers: circuits reuse their buffers for batches of equal size."""
    step = 1 << max(0, size.bit_length() - 3)
    return max(1, -(-size // step) * step)


def initialise_constants(values: Tensor) -> None:
    """Set the two constant rows of a V matrix."""
    values[LOG_ONE] = 0.0
    values[LOG_ZERO] = -torch.inf

"""All training patches, each with the circuit and the head that model it.

Shapes: N images, P patches, D variables of a patch, n patches of a chunk, G circuits, H heads, S slots.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.context import Data
from lvd_lightning.models.evidence import CircuitGroups
from lvd_lightning.models.members import Members
from lvd_lightning.shares import own_chunks
from lvd_lightning.stopping import stop_if_requested

__all__ = ["CHUNK_IMAGES", "Chunk", "Examples"]

#: Images that are read at once.
CHUNK_IMAGES = 1024


@dataclass(frozen=True)
class Chunk:
    """Some patches: `flat` int64 (n,), their numbers image * P + position; `x` (n, D); `circuit`, `head` (n,)."""

    flat: Tensor
    x: Tensor
    circuit: Tensor
    head: Tensor


@dataclass(frozen=True)
class Examples:
    """The patches of one split.

    data: where images are read from; split: which ones.
    circuit_NP, head_NP: integers (N, P), on the CPU.
    members: where ranks have circuits of their own, which is whose. A rank then takes the patches of its circuits in
        all images, and numbers circuits as it holds them.
    """

    data: Data
    circuit_NP: Tensor
    head_NP: Tensor
    split: str = "train"
    members: Members | None = None

    def shape(self, conditional: pc.Circuit) -> tuple[int, int]:
        """(G, H) of all circuits; conditional: those that this process holds."""
        known = conditional if self.members is None else self.members
        return known.num_circuits, known.num_heads

    def own(self, values: Tensor) -> Tensor:
        """Of numbers for every circuit, (G, ...), those for the circuits that this process holds."""
        return values if self.members is None else values[self.members.own]

    def counts(self, num_circuits: int, num_heads: int) -> Tensor:
        """How many patches every head has, int64 (G, H); the same on every process."""
        total = torch.zeros(num_circuits * num_heads, dtype=torch.int64)
        for circuit_nP, head_nP in zip(self.circuit_NP.split(CHUNK_IMAGES), self.head_NP.split(CHUNK_IMAGES)):
            key = circuit_nP.long() * num_heads + head_nP.long()
            total += torch.bincount(key.reshape(-1), minlength=len(total))
        return total.view(num_circuits, num_heads)

    def images(self) -> range:
        """The images of this process; every image is one process's."""
        return own_chunks(len(self.circuit_NP), CHUNK_IMAGES)

    def chunks(self, device: torch.device, heads: Tensor | None = None, every_image: bool = False) -> Iterator[Chunk]:
        """The patches of this process, some images at a time.

        heads: bool (G, H) of all circuits; only patches of these heads.
        every_image: this process takes all images.
        """
        alone = every_image or self.members is not None
        images = range(len(self.circuit_NP)) if alone else self.images()
        place_G = None if self.members is None else self.members.places()
        positions = self.circuit_NP.shape[1]
        for low in range(images.start, images.stop, CHUNK_IMAGES):
            stop_if_requested()
            high = min(low + CHUNK_IMAGES, images.stop)
            circuit, head = (found[low:high].reshape(-1).long() for found in (self.circuit_NP, self.head_NP))
            wanted = torch.ones_like(circuit, dtype=torch.bool) if heads is None else heads.cpu()[circuit, head]
            if place_G is not None:
                wanted, circuit = wanted & (place_G[circuit] >= 0), place_G[circuit]
            at = wanted.nonzero()[:, 0]
            if not len(at):
                continue
            rows, place = (at // positions).unique(return_inverse=True)
            patches_BPD = self.data.parts.split(self.data.batch(self.split, low + rows))
            x = patches_BPD[place, at % positions]
            yield Chunk(low * positions + at, x.to(device), circuit[at].to(device), head[at].to(device))

    def groups(self, conditional: pc.Circuit) -> CircuitGroups:
        """The circuits in groups with about equally many of these patches, so that little is padded."""
        return CircuitGroups(conditional, self.own(self.counts(*self.shape(conditional)).sum(1)))

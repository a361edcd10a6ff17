"""The whole-image circuit: a prior over the latents of patches, and a conditional circuit for every latent value.

Shapes: B images, P patches (positions), D variables of a patch, K latent values, G circuits of the conditional.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from lvd_lightning import circuits as pc
from lvd_lightning.bookkeeping import write_atomically
from lvd_lightning.color import patchify, unpatchify
from lvd_lightning.modules.routing import route

__all__ = ["AssembledCircuit"]

#: Numbers that the values of one pass through the conditional may take: what bounds the memory of evaluation.
MAX_NUMBERS = {"cpu": 1 << 25, "cuda": 1 << 30}


class AssembledCircuit(nn.Module):
    r"""p(x) = sum_z p(z) prod_i p(x_i | z_i) over the patches x_i of an image.

    Args:
        prior: circuit over P variables with soft evidence of K states.
        conditional: K heads over the D variables of a patch, tied over positions; or P x K of them, position by
            position. Heads of its circuits are counted through: circuit 0 first.
        patch_size: side of a patch, in pixels.
        image_shape: (3, height, width).
    """

    def __init__(
        self, prior: pc.Circuit, conditional: pc.Circuit, patch_size: int, image_shape: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.prior = prior
        self.conditional = conditional
        self.patch_size = patch_size
        self.image_shape = image_shape
        self.num_positions = prior.num_variables
        self.num_states = prior.plan.inputs[0].distribution.num_states  # type: ignore[attr-defined]
        circuit, head = [], []
        for g, structure in enumerate(conditional.structures):
            circuit += [g] * structure.num_heads
            head += [*range(structure.num_heads)]
        if len(circuit) not in (self.num_states, self.num_states * self.num_positions):
            raise ValueError(
                f"conditional: has {len(circuit)} heads, expected {self.num_states} (tied over positions) or "
                f"{self.num_states * self.num_positions} (one set per position)"
            )
        self.tied = len(circuit) == self.num_states
        self.register_buffer("circuit_of", torch.tensor(circuit), persistent=False)
        self.register_buffer("head_of", torch.tensor(head), persistent=False)

    @property
    def num_parameters(self) -> int:
        """Free parameters of prior and conditionals together."""
        return self.prior.num_parameters + self.conditional.num_parameters

    @property
    def num_dims(self) -> int:
        """Dimensions of an image: what bits per dimension divide by."""
        return math.prod(self.image_shape)

    def forward(self, images: Tensor) -> Tensor:
        """Same as `log_prob`."""
        return self.log_prob(images)

    def log_prob(self, images: Tensor) -> Tensor:
        """log p(x) in nats, shape (B,); images: uint8 (B, 3, H, W), colour-encoded as in training."""
        return self.prior.log_prob(self.evidence(images))[:, 0]

    def lvd_objective(self, images: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) = log p(z) + sum_i log p(x_i | z_i) in nats, shape (B,); z: int64 (B, P)."""
        given = self.evidence(images).gather(2, z[..., None]).sum((1, 2))
        return self.prior_log_prob(z) + given

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, shape (B,); z: int64 (B, P)."""
        certain = torch.full((*z.shape, self.num_states), -torch.inf, dtype=self.prior.dtype, device=z.device)
        return self.prior.log_prob(certain.scatter_(2, z[..., None], 0.0))[:, 0]

    def patches(self, images: Tensor) -> Tensor:
        """(B, P, D), the variables of the conditional circuits."""
        if images.ndim != 4 or tuple(images.shape[1:]) != self.image_shape or images.dtype != torch.uint8:
            raise ValueError(f"images: expected uint8 (batch, {self.image_shape}), got {images.dtype} {images.shape}")
        return patchify(images, self.patch_size)

    def evidence(self, images: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p(x_i | z_i = k) in nats, shape (B, P, K), in bounded memory (without gradients).

        observed: bool (B, 3, H, W); False marginalises a pixel's channel.
        """
        patches_BPD = self.patches(images)
        mask_BPD = None if observed is None else patchify(observed, self.patch_size)
        out_BPK = torch.empty(
            *patches_BPD.shape[:2], self.num_states, dtype=self.conditional.dtype, device=patches_BPD.device
        )
        with torch.no_grad():
            for at in self._chunks(patches_BPD):
                mask = None if mask_BPD is None else mask_BPD.view(at.flat)[at.range]
                self._evidence_chunk(patches_BPD.reshape(at.flat)[at.range], mask, out_BPK, at)
        return out_BPK

    def circuit_index(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Which circuit of the conditional, and which of its heads, models each patch: z (B, P) to two of (B P,)."""
        if not self.tied:
            z = z + self.num_states * torch.arange(self.num_positions, device=z.device)
        flat = z.reshape(-1)
        return self.circuit_of[flat], self.head_of[flat]  # type: ignore[index]

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact samples, uint8 (n, 3, H, W), colour-encoded."""
        z = self.prior.sample(n, generator=generator)
        shape = (n, *self.image_shape)
        blank = torch.zeros(shape, dtype=torch.uint8, device=z.device)
        return self._complete(blank, torch.zeros(shape, dtype=torch.bool, device=z.device), z, generator)

    @torch.no_grad()
    def inpaint(self, images: Tensor, observed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of what is not `observed` (bool, broadcast to the images) given what is; uint8 (B, 3, H, W)."""
        observed = observed.expand(images.shape)
        z = self.prior.sample(x=self.evidence(images, observed), generator=generator)
        return self._complete(images, observed, z, generator)

    def save(self, folder: Path) -> None:
        """Write prior, conditional and geometry into `folder`; the geometry last, as the sign of completeness."""
        pc.save(self.prior, folder / "prior")
        pc.save(self.conditional, folder / "conditional")
        geometry = {"patch_size": self.patch_size, "image_shape": list(self.image_shape)}
        write_atomically(folder / "assembled.json", json.dumps(geometry))

    @classmethod
    def load(cls, folder: Path) -> AssembledCircuit:
        """Read what `save` wrote.

        Raises:
            ValueError: something is missing or damaged.
        """
        path = folder / "assembled.json"
        if not path.is_file():
            raise ValueError(f"{folder}: holds no assembled circuit ({path.name} is missing); run its stage first")
        geometry = json.loads(path.read_text())
        prior, conditional = pc.load(folder / "prior"), pc.load(folder / "conditional")
        return cls(prior, conditional, int(geometry["patch_size"]), tuple(geometry["image_shape"]))

    def _complete(self, images: Tensor, observed: Tensor, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw unobserved pixels of every patch from the conditional of its latent value."""
        patches_ND = self.patches(images).flatten(0, 1)
        mask_ND = patchify(observed, self.patch_size).flatten(0, 1)
        circuit_N, head_N = self.circuit_index(z)
        out_ND = patches_ND.clone()
        step = max(1, self._chunk_size() * self.conditional.num_circuits // 4)
        for at in torch.arange(len(patches_ND), device=z.device).split(step):
            routed = route(circuit_N[at], self.conditional.num_circuits, generator=generator)
            index_GS = at[routed.index]
            drawn_GSD = self.conditional.sample(
                x=patches_ND[index_GS].long(),
                observed=mask_ND[index_GS],
                head=torch.where(routed.weight > 0, head_N[index_GS], 0),
                generator=generator,
            )
            filled = routed.weight > 0
            out_ND[index_GS[filled]] = drawn_GSD[filled].to(torch.uint8)
        _, height, width = self.image_shape
        return unpatchify(out_ND.view(len(images), self.num_positions, -1), self.patch_size, height, width)

    def _chunk_size(self) -> int:
        limit = MAX_NUMBERS["cpu" if self.conditional.device.type == "cpu" else "cuda"]
        return max(1, limit // self.conditional.plan.num_value_rows)

    def _chunks(self, patches_BPD: Tensor) -> Iterator[_Chunk]:
        """Tied: ranges of patches of all images. Untied: ranges of images."""
        batch, positions, size = patches_BPD.shape
        flat = (batch * positions, size) if self.tied else (batch, positions, size)
        step = self._chunk_size()
        for low in range(0, flat[0], step):
            yield _Chunk(flat, slice(low, min(low + step, flat[0])))

    def _evidence_chunk(self, patches: Tensor, mask: Tensor | None, out_BPK: Tensor, at: _Chunk) -> None:
        if self.tied:
            log_GNH = self.conditional.log_prob(patches, observed=mask)
            out_BPK.view(-1, self.num_states)[at.range] = log_GNH[self.circuit_of, :, self.head_of].T  # type: ignore[index]
            return
        position_G = torch.zeros(self.conditional.num_circuits, dtype=torch.int64, device=patches.device)
        position_G[self.circuit_of] = (  # type: ignore[index]
            torch.arange(len(self.circuit_of), device=patches.device) // self.num_states  # type: ignore[arg-type]
        )
        chosen_GBD = patches.transpose(0, 1)[position_G]
        chosen_mask = None if mask is None else mask.transpose(0, 1)[position_G]
        log_GBH = self.conditional.log_prob(chosen_GBD, observed=chosen_mask)
        found_TB = log_GBH[self.circuit_of, :, self.head_of]  # type: ignore[index]
        out_BPK[at.range] = found_TB.view(self.num_positions, self.num_states, -1).permute(2, 0, 1)


class _Chunk:
    def __init__(self, flat: tuple[int, ...], found: slice) -> None:
        self.flat = flat
        self.range = found

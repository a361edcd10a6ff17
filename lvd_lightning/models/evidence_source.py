"""The evidence of training images: kept on disk for as many as a budget allows, computed again for the others.

Shapes: B images, P patches, K latent values, M candidates per patch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.files import read_array, write_array
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.evidence import Candidates, EvidenceCache

__all__ = ["EvidenceSource", "images_within", "load_candidate_table", "save_candidate_table"]

_TABLE = "candidates.npy"


@dataclass(frozen=True)
class EvidenceSource:
    """log p(x_i | z_i) of training images under the circuits of `assembled`.

    cache: of the first images, or None; candidates: of the others, None for all latent values; z_NP: int64 (N, P), the
    latent values that training patches have.
    """

    assembled: AssembledCircuit
    cache: EvidenceCache | None
    candidates: Candidates | None
    z_NP: Tensor

    @property
    def num_kept(self) -> int:
        """Images whose evidence is on disk."""
        return 0 if self.cache is None else len(self.cache)

    def evidence(self, images: Tensor, index: Tensor) -> Tensor:
        """(B, P, K) in nats of training images with these numbers; -inf for values that are no candidates.

        Of the prior's type, whatever that of the conditionals.
        """
        kept_B, dtype = index < self.num_kept, self.assembled.prior.dtype
        if self.cache is not None and bool(kept_B.all()):
            return self.cache.evidence(index, images.device).to(dtype)
        if not bool(kept_B.any()):
            return self.fresh(images, index).to(dtype)
        assert self.cache is not None
        shape = (len(images), self.assembled.num_positions, self.assembled.num_states)
        out_BPK = torch.empty(shape, dtype=dtype, device=images.device)
        out_BPK[kept_B] = self.cache.evidence(index[kept_B], images.device).to(dtype)
        out_BPK[~kept_B] = self.fresh(images[~kept_B], index[~kept_B]).to(dtype)
        return out_BPK

    @torch.no_grad()
    def fresh(self, images: Tensor, index: Tensor) -> Tensor:
        """The same, computed now, whatever is on disk; of the conditionals' type."""
        if self.candidates is None:
            return self.assembled.evidence(images)
        z_BP = self.z_NP[index.cpu()].to(images.device)
        states_BPM, log_BPM = self.candidates.evidence(self.assembled, images, z_BP)
        shape = (*log_BPM.shape[:2], self.assembled.num_states)
        return log_BPM.new_full(shape, -torch.inf).scatter_(2, states_BPM, log_BPM)


def images_within(gigabytes: float, shape: tuple[int, int, int], num_states: int) -> int:
    """How many of the (N, P, M) evidences fit into a budget: float16 and, of candidates, two bytes (or four) each."""
    num_images, positions, kept = shape
    bytes_of_state = 0 if kept == num_states else 2 if num_states <= 1 << 15 else 4
    per_image = positions * (kept * (2 + bytes_of_state) + 4)
    return min(num_images, int(gigabytes * 1e9 / per_image))


def save_candidate_table(folder: Path, table_KM: Tensor | None) -> None:
    """Keep a `candidate_table` beside the evidence; None: there is none, and what was there goes."""
    folder.mkdir(parents=True, exist_ok=True)
    if table_KM is None:
        (folder / _TABLE).unlink(missing_ok=True)
    else:
        write_array(folder / _TABLE, table_KM.cpu().numpy().astype(np.int32))


def load_candidate_table(folder: Path) -> Tensor | None:
    """What `save_candidate_table` wrote, int64 (K, M), or None."""
    path = folder / _TABLE
    return torch.from_numpy(read_array(path)).long() if path.is_file() else None

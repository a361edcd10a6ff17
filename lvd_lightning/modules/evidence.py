"""Log-likelihoods of patches under the conditionals, computed once and kept: of all latent values or the likely ones.

Shapes: N images, B batch, P patches, K latent values, M candidates per patch, G circuits, S slots.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.bookkeeping import write_atomically
from lvd_lightning.modules.assembled import AssembledCircuit
from lvd_lightning.modules.routing import route

__all__ = ["CircuitGroups", "EvidenceCache", "candidate_table"]

#: Images per step of filling a cache.
CHUNK_IMAGES = 256


class CircuitGroups:
    """The circuits of a batch in groups of about equal load, so that ragged work is not padded to the busiest one.

    Each group is a Circuit of its own whose parameters are copied from the whole before use. For evaluation only.

    Args:
        whole: the folded circuits.
        load: (G,), how many examples each circuit gets, roughly.
        ratio: largest load in a group over its smallest.
    """

    def __init__(self, whole: pc.Circuit, load: Tensor, ratio: float = 2.0) -> None:
        self.whole = whole
        order = load.argsort(descending=True)
        graphs = whole.to_graph()
        assert isinstance(graphs, list)
        self.members: list[Tensor] = []
        start = 0
        for position in range(1, len(order) + 1):
            if position == len(order) or float(load[order[start]]) > ratio * max(float(load[order[position]]), 1.0):
                self.members.append(order[start:position].sort().values)
                start = position
        self.circuits = [pc.Circuit([graphs[int(g)] for g in members]) for members in self.members]
        self.rows = [
            self._parameter_rows(members, part) for members, part in zip(self.members, self.circuits, strict=True)
        ]
        for part in self.circuits:
            part.requires_grad_(False).to(whole.device)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current parameters."""
        for part, rows in zip(self.circuits, self.rows, strict=True):
            for table, (source, index) in zip(part.tables, rows, strict=True):
                torch.index_select(self.whole.tables[source], 0, index.to(table.device), out=table.data)

    @torch.no_grad()
    def log_prob(self, x_ND: Tensor, item: Tensor, circuit: Tensor, head: Tensor) -> Tensor:
        """log p of x_ND[item[m]] under one circuit and head each, shape (M,)."""
        out_M = torch.empty(len(item), dtype=self.whole.dtype, device=x_ND.device)
        for members, part in zip(self.members, self.circuits, strict=True):
            members = members.to(x_ND.device)
            local = torch.full((self.whole.num_circuits,), -1, device=x_ND.device)
            local[members] = torch.arange(len(members), device=x_ND.device)
            mine = (local[circuit] >= 0).nonzero()[:, 0]
            for chosen in mine.split(max(1, self._limit(part))):
                routed = route(local[circuit[chosen]], len(members))
                filled = routed.weight > 0
                at_GS = chosen[routed.index]
                log_GS = part.log_prob(x_ND[item[at_GS]], head=torch.where(filled, head[at_GS], 0))
                out_M[at_GS[filled]] = log_GS[filled]
        return out_M

    def _limit(self, part: pc.Circuit) -> int:
        """Examples per pass: bounds its memory even if all of them go to one circuit."""
        per_example = part.plan.num_value_rows // part.num_circuits
        budget = 1 << (26 if part.device.type == "cpu" else 31)
        return budget // per_example

    def _parameter_rows(self, members: Tensor, part: pc.Circuit) -> list[tuple[int, Tensor]]:
        """For every parameter tensor of a group: that of the whole, and its rows."""
        place = {
            owner: (number, row)
            for number, group in enumerate(self.whole.plan.groups)
            for row, owner in enumerate(group.owners)
        }
        out = []
        for group in part.plan.groups:
            found = [place[int(members[g]), node] for g, node in group.owners]
            sources = {number for number, _ in found}
            if len(sources) != 1:
                raise ValueError("CircuitGroups: circuits of one group are stored with different padding")
            out.append((sources.pop(), torch.tensor([row for _, row in found])))
        return out


@torch.no_grad()
def candidate_table(assembled: AssembledCircuit, images: Tensor, z_BP: Tensor, num_candidates: int) -> Tensor:
    """For every latent value the values that its patches may also have, itself first; int64 (K, M).

    Ranked by the mean posterior, over a sample of patches assigned to the value, under the values' frequencies.
    Untied conditionals are pooled over positions.
    """
    num_states = assembled.num_states
    share_K = torch.bincount(z_BP.reshape(-1), minlength=num_states).double() + 1.0
    score_KK = torch.zeros(num_states, num_states, dtype=torch.float64, device=images.device)
    for at in torch.arange(len(images)).split(64):
        evidence_NK = assembled.evidence(images[at]).flatten(0, 1).double()
        posterior_NK = (evidence_NK + share_K.log()).softmax(1)
        score_KK.index_add_(0, z_BP[at].reshape(-1), posterior_NK)
    score_KK += 1e-9 * share_K  # never seen in the sample: frequent values first
    score_KK.fill_diagonal_(torch.inf)
    return score_KK.argsort(dim=1, descending=True, stable=True)[:, :num_candidates].contiguous()


@dataclass(frozen=True)
class EvidenceCache:
    """log p(x_i | z_i) of the candidates of every patch of a split, on disk (memory-mapped).

    states: int16 (N, P, M), the candidates; None if all K are kept. excess: float16 (N, P, M), log-likelihoods
    relative to the patch's best candidate, and best: float32 (N, P): near the best, where it matters, nothing is lost
    to rounding. num_states: K.
    """

    states: np.ndarray | None
    excess: np.ndarray
    best: np.ndarray
    num_states: int

    def evidence(self, index: Tensor, device: torch.device | str) -> Tensor:
        """float32 (B, P, K) in nats; -inf for values that are no candidates of a patch."""
        rows = index.cpu().numpy()
        excess = torch.from_numpy(self.excess[rows]).to(device).float()
        log_BPM = excess + torch.from_numpy(self.best[rows]).to(device)[..., None]
        if self.states is None:
            return log_BPM
        out_BPK = torch.full((*log_BPM.shape[:2], self.num_states), -torch.inf, device=log_BPM.device)
        return out_BPK.scatter_(2, self.candidates(index, device), log_BPM)

    def candidates(self, index: Tensor, device: torch.device | str) -> Tensor:
        """int64 (B, P, M)."""
        rows = index.cpu().numpy()
        if self.states is None:
            shape = (*self.best[rows].shape, self.num_states)
            return torch.arange(self.num_states, device=device).expand(shape)
        return torch.from_numpy(self.states[rows]).to(device).long()

    @classmethod
    def open(cls, folder: Path) -> EvidenceCache | None:
        """A complete cache, or None."""
        marker = folder / "evidence.json"
        if not marker.is_file():
            return None
        info = json.loads(marker.read_text())
        states = np.load(folder / "states.npy", mmap_mode="r") if info["sparse"] else None
        excess, best = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("excess", "best"))
        if excess.shape != (info["num_images"], info["num_positions"], info["num_kept"]):
            raise ValueError(f"{folder}: excess.npy has the shape {excess.shape}, not that of evidence.json")
        return cls(states, excess, best, int(info["num_states"]))

    @classmethod
    def fill(
        cls,
        folder: Path,
        assembled: AssembledCircuit,
        data: Any,
        split: str,
        z_NP: Tensor | None = None,
        table_KM: Tensor | None = None,
        groups: CircuitGroups | None = None,
        rows: range | None = None,
    ) -> None:
        """Compute the evidence of a split, of the candidates `table_KM[z]` or of all values.

        With `rows`, of these images only: several processes fill one cache. `begin` before, `complete` after.
        """
        device = assembled.conditional.device
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("excess", "best")}
        states = np.load(folder / "states.npy", mmap_mode="r+") if table_KM is not None else None
        rows = range(len(arrays["best"])) if rows is None else rows
        for low in range(rows.start, rows.stop, CHUNK_IMAGES):
            index = torch.arange(low, min(low + CHUNK_IMAGES, rows.stop))
            at = slice(low, low + len(index))
            images = data.batch(split, index).to(device)
            if table_KM is None:
                log_BPM = assembled.evidence(images)
            else:
                assert z_NP is not None
                assert groups is not None
                assert states is not None
                chosen_BPM = table_KM[z_NP[index].to(device)]
                log_BPM = pair_evidence(assembled, groups, images, chosen_BPM)
                states[at] = chosen_BPM.cpu().numpy().astype(np.int16)
            best_BP1 = log_BPM.amax(-1, keepdim=True)
            arrays["best"][at] = best_BP1[..., 0].cpu().numpy()
            arrays["excess"][at] = (log_BPM - best_BP1).clamp_min(-6e4).cpu().numpy()
        for array in [*arrays.values(), *([] if states is None else [states])]:
            array.flush()

    @staticmethod
    def begin(folder: Path, num_images: int, num_positions: int, num_kept: int, sparse: bool) -> None:
        """Make the files; what an interrupted run left goes."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evidence.json").unlink(missing_ok=True)
        shapes: dict[str, tuple[tuple[int, ...], type]] = {
            "excess": ((num_images, num_positions, num_kept), np.float16),
            "best": ((num_images, num_positions), np.float32),
        }
        if sparse:
            shapes["states"] = ((num_images, num_positions, num_kept), np.int16)
        for name, (shape, kind) in shapes.items():
            temporary = folder / f"{name}.tmp.npy"
            np.lib.format.open_memmap(temporary, mode="w+", dtype=kind, shape=shape).flush()
            os.replace(temporary, folder / f"{name}.npy")

    @staticmethod
    def complete(folder: Path, num_states: int) -> None:
        """Say that the cache is complete: written last."""
        num_images, num_positions, num_kept = np.load(folder / "excess.npy", mmap_mode="r").shape
        info = {
            "num_images": num_images,
            "num_positions": num_positions,
            "num_kept": num_kept,
            "num_states": num_states,
            "sparse": (folder / "states.npy").is_file(),
        }
        write_atomically(folder / "evidence.json", json.dumps(info))


def pair_evidence(assembled: AssembledCircuit, groups: CircuitGroups, images: Tensor, states_BPM: Tensor) -> Tensor:
    """log p(x_i | z_i = state) of the given states alone, shape (B, P, M)."""
    batch, positions, kept = states_BPM.shape
    patches_ND = assembled.patches(images).flatten(0, 1)
    item = torch.arange(batch * positions, device=images.device).repeat_interleave(kept)
    circuit, head = assembled.circuit_index(states_BPM.permute(0, 2, 1).reshape(batch * kept, positions))
    circuit, head = (found.view(batch, kept, positions).transpose(1, 2).reshape(-1) for found in (circuit, head))
    return groups.log_prob(patches_ND, item, circuit, head).view(batch, positions, kept)

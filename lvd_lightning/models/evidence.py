"""Log-likelihoods of patches under the conditionals, computed once and kept: of all latent values or the likely ones.

Shapes: N images, B batch, P patches, K latent values, M candidates per patch, G circuits, S slots, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lvd_lightning import circuits as pc
from lvd_lightning.files import read_array, read_json, write_atomically, write_json
from lvd_lightning.models.assembled import MARGIN, AssembledCircuit
from lvd_lightning.models.routing import route_in_passes
from lvd_lightning.stopping import stop_if_requested

__all__ = ["Candidates", "CircuitGroups", "EvidenceCache", "candidate_table", "split_by_load"]

#: Images per step of filling a cache.
CHUNK_IMAGES = 256
#: What float16 can hold, in nats below the best.
LOWEST_EXCESS = -6e4


class CircuitGroups:
    """The circuits of a batch in groups of about equal load, so that ragged work is not padded to the busiest one.

    Each group is a Circuit of its own whose parameters are copies of the whole's, as of the last `refresh`. For
    evaluation only.

    Args:
        whole: the folded circuits.
        load: (G,), how many examples each circuit gets, roughly.
        ratio: largest load in a group over its smallest; 1 or larger.
        members: the numbers of the circuits of every group, in place of a load.
    """

    def __init__(
        self, whole: pc.Circuit, load: Tensor | None = None, ratio: float = 2.0, members: list[Tensor] | None = None
    ) -> None:
        self.whole = whole
        if members is None:
            assert load is not None
            members = split_by_load(load.cpu(), ratio)
        self.members = members
        graphs = whole.to_graph()
        assert isinstance(graphs, list)
        self.circuits = [pc.Circuit([graphs[int(g)] for g in members]) for members in self.members]
        self.rows = [
            self._parameter_rows(members, part) for members, part in zip(self.members, self.circuits, strict=True)
        ]
        self.to(whole.device)

    def to(self, device: torch.device) -> None:
        """Move all groups, to the type of the whole as well."""
        for part in self.circuits:
            part.requires_grad_(False).to(device, self.whole.dtype)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the current parameters."""
        for part, copies in zip(self.circuits, self.rows, strict=True):
            dense = [part.engine.dense(number, table) for number, table in enumerate(part.tables)]
            for copy in copies:
                table, current = dense[copy.table], self.whole.engine.dense(copy.source, self.whole.tables[copy.source])
                # Either may be padded more than the other; what both have room for holds all parameters.
                units, inner = min(table.shape[1], current.shape[1]), min(table.shape[2], current.shape[2])
                rows = copy.source_rows.to(current.device)
                table[copy.rows.to(table.device), :units, :inner] = current[rows, :units, :inner].to(table.dtype)
            for number, table in enumerate(part.tables):
                edges = part.engine.edges(number)
                if edges is not None:
                    edges.write(table, dense[number], 0)

    def log_prob(self, x_ND: Tensor, item: Tensor, circuit: Tensor, head: Tensor) -> Tensor:
        """log p of x_ND[item[m]] under one circuit and head each, shape (M,), in bounded memory.

        Pairs of an item and a circuit that come with several heads are computed once.
        """
        if self.whole.num_heads == 1:
            return self.log_prob_of_heads(x_ND, item, circuit)[:, 0]
        pair, place = (item * self.whole.num_circuits + circuit).unique(return_inverse=True)
        log_UH = self.log_prob_of_heads(x_ND, pair // self.whole.num_circuits, pair % self.whole.num_circuits)
        return log_UH[place, head]

    @torch.no_grad()
    def log_prob_of_heads(self, x_ND: Tensor, item: Tensor, circuit: Tensor) -> Tensor:
        """log p of x_ND[item[m]] under all heads of one circuit each, shape (M, H); heads it has not are -inf."""
        out_MH = torch.full((len(item), self.whole.num_heads), -torch.inf, dtype=self.whole.dtype, device=x_ND.device)
        for number, index_GS, filled_GS in self.passes(circuit):
            part = self.circuits[number]
            wanted_GSH = filled_GS[..., None].expand(-1, -1, part.num_heads)
            log_GSH = part.log_prob(x_ND[item[index_GS]], wanted=wanted_GSH)
            out_MH[index_GS[filled_GS], : part.num_heads] = log_GSH[filled_GS].to(out_MH.dtype)
        return out_MH

    def passes(self, circuit: Tensor, memory: int = 1) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Every example once, group by group, each in as many passes as its memory allows.

        circuit: int64 (M,), the circuit of the whole that each example is for.
        memory: how many times as much as a likelihood alone a pass takes.

        Yields:
            The number of the group, the indices of examples in the slots of its circuits, int64 (G, S), and which
            slots are filled, bool (G, S).
        """
        for number, (members, part) in enumerate(zip(self.members, self.circuits, strict=True)):
            local_G = torch.full((self.whole.num_circuits,), -1, device=circuit.device)
            local_G[members.to(circuit.device)] = torch.arange(len(members), device=circuit.device)
            mine = (local_G[circuit] >= 0).nonzero()[:, 0]
            if not len(mine):
                continue
            slots = max(1, part.batch_limit // memory)
            for index_GS, filled_GS in route_in_passes(local_G[circuit[mine]], len(members), slots):
                yield number, mine[index_GS], filled_GS

    def _parameter_rows(self, members: Tensor, part: pc.Circuit) -> list[_Copy]:
        """Where the parameters of a group are in the whole, whose tables may divide its nodes otherwise."""
        place = {
            owner: (number, row)
            for number, group in enumerate(self.whole.plan.groups)
            for row, owner in enumerate(group.owners)
        }
        found: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for table, group in enumerate(part.plan.groups):
            for row, (g, node) in enumerate(group.owners):
                source, source_row = place[int(members[g]), node]
                found.setdefault((table, source), []).append((row, source_row))
        return [
            _Copy(table, torch.tensor([one for one, _ in rows]), source, torch.tensor([other for _, other in rows]))
            for (table, source), rows in found.items()
        ]


@dataclass(frozen=True)
class _Copy:
    """Rows of a table of a group, and the rows of a table of the whole that they are copies of."""

    table: int
    rows: Tensor
    source: int
    source_rows: Tensor


def split_by_load(load: Tensor, ratio: float = 2.0) -> list[Tensor]:
    """Circuits in groups whose loads differ by a factor of at most `ratio`, the busiest group first."""
    order = load.argsort(descending=True)
    groups, start = [], 0
    for position in range(1, len(order) + 1):
        if position == len(order) or float(load[order[start]]) > ratio * max(float(load[order[position]]), 1.0):
            groups.append(order[start:position].sort().values)
            start = position
    return groups


@torch.no_grad()
def candidate_table(assembled: AssembledCircuit, images: Tensor, z_BP: Tensor, num_candidates: int) -> Tensor:
    """For every latent value the values that its patches may also have, itself first; int64 (K, M).

    Ranked by the mean posterior, over a sample of patches assigned to the value, under the values' frequencies; values
    more than MARGIN nats below a patch's best count for nothing there.
    Untied conditionals are pooled over positions.
    """
    num_states = assembled.num_states
    share_K = torch.bincount(z_BP.reshape(-1), minlength=num_states).double() + 1.0
    score_KK = torch.zeros(num_states, num_states, dtype=torch.float64, device=images.device)
    for at in torch.arange(len(images)).split(64):
        evidence_NK = assembled.evidence(images[at], margin=MARGIN).flatten(0, 1).double()
        posterior_NK = (evidence_NK + share_K.log()).softmax(1).nan_to_num(0.0)  # a patch that no value explains
        score_KK.index_add_(0, z_BP[at].reshape(-1), posterior_NK)
    score_KK += 1e-9 * share_K  # never seen in the sample: frequent values first
    score_KK.fill_diagonal_(torch.inf)
    return score_KK.argsort(dim=1, descending=True, stable=True)[:, :num_candidates].contiguous()


@dataclass(frozen=True)
class Candidates:
    """Which latent values are considered for a patch: `table` int64 (K, M) says it by the value that it has."""

    table: Tensor
    groups: CircuitGroups

    def evidence(self, assembled: AssembledCircuit, images: Tensor, z_BP: Tensor) -> tuple[Tensor, Tensor]:
        """The candidates of patches, int64 (B, P, M), and log p(x_i | z_i) of these alone, (B, P, M)."""
        states_BPM = self.table[z_BP]
        batch, positions, kept = states_BPM.shape
        patches_ND = assembled.split(images).flatten(0, 1)
        item = torch.arange(batch * positions, device=images.device).repeat_interleave(kept)
        position_P1 = torch.arange(positions, device=images.device)[:, None]
        circuit, head = (found.flatten() for found in assembled.head_index.locate(states_BPM, position_P1))
        return states_BPM, self.groups.log_prob(patches_ND, item, circuit, head).view(batch, positions, kept)


@dataclass(frozen=True)
class EvidenceCache:
    """log p(x_i | z_i) of the candidates of every patch of a split, on disk (memory-mapped).

    states: integers (N, P, M), the candidates; None if all K are kept. excess: float16 (N, P, M), log-likelihoods
    relative to the patch's best candidate, not below -60,000, and best: float32 (N, P): near the best, where it
    matters, next to nothing is lost to rounding. num_states: K.
    """

    states: np.ndarray | None
    excess: np.ndarray
    best: np.ndarray
    num_states: int

    def __len__(self) -> int:
        return len(self.best)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, P, M)."""
        return self.excess.shape

    def evidence(self, index: Tensor, device: torch.device | str) -> Tensor:
        """float32 (B, P, K) in nats; -inf for values that are no candidates of a patch."""
        rows = index.cpu().numpy()
        excess_BPM = torch.from_numpy(self.excess[rows]).to(device).float()
        log_BPM = excess_BPM + torch.from_numpy(self.best[rows]).to(device)[..., None]
        if self.states is None:
            return log_BPM
        states_BPM = torch.from_numpy(self.states[rows]).to(device).long()
        out_BPK = log_BPM.new_full((*log_BPM.shape[:2], self.num_states), -torch.inf)
        return out_BPK.scatter_(2, states_BPM, log_BPM)

    @classmethod
    def open(cls, folder: Path) -> EvidenceCache | None:
        """A complete cache, or None.

        Raises:
            ValueError: the files are not what was completed.
        """
        marker = folder / "evidence.json"
        if not marker.is_file():
            return None
        info = read_json(marker)
        states = read_array(folder / "states.npy", mmap_mode="r") if info["sparse"] else None
        excess, best = (read_array(folder / f"{name}.npy", mmap_mode="r") for name in ("excess", "best"))
        if excess.shape != (info["num_images"], info["num_positions"], info["num_kept"]):
            raise ValueError(f"{folder}: excess.npy has the shape {excess.shape}, not that of evidence.json")
        return cls(states, excess, best, int(info["num_states"]))

    @staticmethod
    def begin(folder: Path, shape: tuple[int, int, int], num_states: int, sparse: bool) -> None:
        """Make files for the evidence of (N, P, M) candidates; what was there goes."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("evidence.json", "states.npy"):
            (folder / name).unlink(missing_ok=True)
        arrays: dict[str, tuple[tuple[int, ...], type]] = {
            "excess": (shape, np.float16),
            "best": (shape[:2], np.float32),
        }
        if sparse:
            arrays["states"] = (shape, np.int16 if num_states <= 1 << 15 else np.int32)
        for name, (size, kind) in arrays.items():
            begin = partial(np.lib.format.open_memmap, mode="w+", dtype=kind, shape=size)
            write_atomically(folder / f"{name}.npy", begin)

    @staticmethod
    def fill(
        folder: Path,
        assembled: AssembledCircuit,
        data: Any,
        split: str,
        *,
        rows: range,
        z_NP: Tensor,
        candidates: Candidates | None = None,
    ) -> None:
        """Compute the evidence of images `rows` of a split, of candidates or of all values.

        Of all values, those that lie certainly more than MARGIN nats below the best may come out lower than they are.

        Several processes may fill one cache. Call `begin` before, `complete` when all are done.
        """
        device = assembled.conditional.device
        excess, best = (np.load(folder / f"{name}.npy", mmap_mode="r+") for name in ("excess", "best"))
        states = None if candidates is None else np.load(folder / "states.npy", mmap_mode="r+")
        for low in range(rows.start, rows.stop, CHUNK_IMAGES):
            stop_if_requested()
            index = torch.arange(low, min(low + CHUNK_IMAGES, rows.stop))
            at = slice(low, low + len(index))
            images = data.batch(split, index).to(device)
            if candidates is None:
                log_BPM = assembled.evidence(images, margin=MARGIN)
            else:
                states_BPM, log_BPM = candidates.evidence(assembled, images, z_NP[index].to(device))
                states[at] = states_BPM.cpu().numpy()  # type: ignore[index]
            best_BP1 = log_BPM.amax(-1, keepdim=True)
            # Where no value explains a patch, the best is -inf: relative to it, all are equal.
            below_BPM = (log_BPM - best_BP1).nan_to_num(nan=0.0).clamp_min(LOWEST_EXCESS)
            best[at] = best_BP1[..., 0].cpu().numpy()
            excess[at] = below_BPM.cpu().numpy()
        for array in (excess, best, states):
            if array is not None:
                array.flush()

    @staticmethod
    def complete(folder: Path, num_states: int) -> None:
        """Say that the cache is complete: written last."""
        num_images, num_positions, num_kept = read_array(folder / "excess.npy", mmap_mode="r").shape
        info = {
            "num_images": num_images,
            "num_positions": num_positions,
            "num_kept": num_kept,
            "num_states": num_states,
            "sparse": (folder / "states.npy").is_file(),
        }
        write_json(folder / "evidence.json", info)

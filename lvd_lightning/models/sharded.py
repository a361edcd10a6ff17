"""The circuit over whole examples of which every rank holds some conditional circuits, for training and validation.

Shapes: B examples, P parts, D variables of a part, K latent values, G circuits of all ranks, N rows.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from typing_extensions import override

from lvd_lightning import circuits as pc
from lvd_lightning.models.assembled import AssembledCircuit
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.models.members import Members
from lvd_lightning.parts import Parts
from lvd_lightning.ranks import summed

__all__ = ["ShardedCircuit"]


class ShardedCircuit(AssembledCircuit):
    """As `AssembledCircuit`, but `conditional` has this rank's circuits alone, in the order of their numbers.

    Evidence of all latent values is gathered from all ranks: they call with the same examples. Samples, completions
    and files need the whole circuit, which nobody has here.

    Args:
        prior, parts: as there.
        conditional: the circuits `members.own`.
        head_index: of all circuits.
        members: which rank has which.
    """

    def __init__(
        self, prior: pc.Circuit, conditional: pc.Circuit, parts: Parts, head_index: HeadIndex, members: Members
    ) -> None:
        super().__init__(prior, conditional, parts, head_index)
        self.members = members
        self._place_G = members.places()

    @property
    def own_tensors(self) -> tuple[str, ...]:
        """Parameters and buffers that are this rank's alone; see `RankAgreement` and `EMStrategy`."""
        found = [*self.conditional.named_parameters(), *self.conditional.named_buffers()]
        return tuple(f"conditional.{name}" for name, _ in found)

    @override
    def evidence(self, x: Tensor, observed: Tensor | None = None, margin: float | None = None) -> Tensor:
        return summed(super().evidence(x, observed, margin))

    @override
    def _evidence_rows(self, x: Tensor, mask: Tensor | None, margin: float | None) -> Tensor:
        """That of this rank's circuits; 0 for the others'."""
        value_K, place_G = torch.arange(self.num_states, device=x.device), self._place_G.to(x.device)
        if self.head_index.tied:
            circuit_K, head_K = self.head_index.locate(value_K)
            is_own_K = place_G[circuit_K] >= 0
            log_GNH = self.conditional.log_prob(x, observed=mask, margin=margin)
            out_NK = log_GNH.new_zeros(len(x), self.num_states)
            out_NK[:, is_own_K] = log_GNH[place_G[circuit_K[is_own_K]], :, head_K[is_own_K]].T
            return out_NK
        position_G = self.head_index.position(self.members.own.to(x.device))
        chosen_GBD = x.transpose(0, 1)[position_G]
        mask_GBD = None if mask is None else mask.transpose(0, 1)[position_G]
        log_GBH = self.conditional.log_prob(chosen_GBD, observed=mask_GBD)
        position_P1 = torch.arange(self.num_positions, device=x.device)[:, None]
        circuit_PK, head_PK = self.head_index.locate(value_K, position_P1)
        out_PKB = log_GBH.new_zeros(*circuit_PK.shape, len(x))
        is_own_PK = place_G[circuit_PK] >= 0
        out_PKB[is_own_PK] = log_GBH[place_G[circuit_PK[is_own_PK]], :, head_PK[is_own_PK]]
        return out_PKB.permute(2, 0, 1)

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise ValueError(
            "sharding: circuits: a rank holds some circuits only, and nothing can be drawn or written from these: set "
            "sharding: data for this stage, or leave the callback that wants samples away (LogSamples)"
        )

    sample = inpaint = redraw = expected = save = evidence_with_gradients = _refuse

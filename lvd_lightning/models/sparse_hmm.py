"""A hidden Markov model in training: its circuit has the words of one batch, its emissions all words.

Shapes: B windows, T positions, S positions with a table of their own (or 1), K states, V words, U columns of the
circuit's emissions; n pairs of a position and a word that occurred.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lvd_lightning import circuits as pc
from lvd_lightning.checks import check_counts
from lvd_lightning.models.emission_rows import EmissionRows
from lvd_lightning.models.hmm_graph import HMMTables, hmm_from_tables, tables_of
from lvd_lightning.models.language import HiddenMarkovModel
from lvd_lightning.ranks import rank_and_size, sum_in_place

__all__ = ["SparseHMM", "sparse_optimizer"]


class SparseHMM(nn.Module):
    """The same function as `HiddenMarkovModel`, trained by EM without a table of gradients.

    A batch has few of the words of a large vocabulary. So the circuit that passes run through has columns for the words
    that a batch has, filled from the table of all words, and what EM needs of emissions are flows of these columns.
    `EmissionRows` takes them; first states and transitions belong to the circuit, whose optimizer moves them.

    Args:
        tables: first parameters.
        length: tokens of a window, T.
        batch_size: windows that a pass should take at once; larger batches are divided.
        rule: "em" or "anemone".

    Example:
        >>> from lvd_lightning.models.hmm_graph import random_tables
        >>> model = SparseHMM(random_tables(4, 3, 1000, homogeneous=False), length=4, batch_size=2, rule="anemone")
        >>> optimizer = sparse_optimizer(model, lr=0.4, momentum=0.9, pseudocount=0.001)
        >>> x = torch.tensor([[3, 1, 4, 1], [2, 7, 1, 8]])
        >>> before = model.add_flows(x)  # log p, and the flows of a step
        >>> optimizer.step()
        >>> bool((model.log_prob(x) > before).all())
        True
        >>> model.finished().log_prob(x).shape
        torch.Size([2])
    """

    def __init__(self, tables: HMMTables, length: int, batch_size: int, rule: str) -> None:
        super().__init__()
        check_counts(length=length, batch_size=batch_size)
        self.length, self.homogeneous = length, tables.homogeneous
        S, self.num_states, self.num_tokens = tables.emission_SKV.shape
        self.batch_size = batch_size
        columns = min(self.num_tokens, batch_size * (length if self.homogeneous else 1))
        few_SKU = tables.emission_SKV.new_full((S, self.num_states, max(2, columns)), 1 / max(2, columns))
        few = HMMTables(tables.initial_K, tables.transition_SKK, few_SKU)
        self.circuit = pc.Circuit(hmm_from_tables(few, length))
        self.emissions = EmissionRows(tables.emission_SKV, rule)
        self.number, rows = _emission_place(self.circuit)
        self.register_buffer("row_S", rows, persistent=False)  # of the circuit's table, by position
        self.register_buffer("place_T", torch.arange(length) * (not self.homogeneous), persistent=False)
        self._pending: list[tuple[Tensor, Tensor]] = []

    row_S: Tensor
    place_T: Tensor

    @property
    def rule(self) -> str:
        return self.emissions.rule

    @property
    def own_tensors(self) -> tuple[str, ...]:
        """Room for the emissions of a batch's words, which are others on every rank; see `RankAgreement`."""
        return (f"circuit.tables.{self.number}",)

    @property
    def num_parameters(self) -> int:
        """Free parameters, as `HiddenMarkovModel` counts them."""
        S, K, V = len(self.row_S), self.num_states, self.num_tokens
        transitions = 1 if self.homogeneous else self.length - 1
        return K - 1 + transitions * K * (K - 1) + S * K * (V - 1)

    @torch.no_grad()
    def log_prob(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """log p in nats, (B,), without gradients; x: int64 (B, T), observed: bool (B, T) or None."""
        found = [self._pass(part, mask)[0] for part, mask in self._parts(x, observed)]
        return torch.cat(found) if found else x.new_zeros(0, dtype=self.circuit.dtype)

    def add_flows(self, x: Tensor, observed: Tensor | None = None) -> Tensor:
        """Add the flows of windows for the next step; returns log p of them in nats, (B,), detached."""
        found = []
        for part, mask in self._parts(x, observed):
            log_B, keys_n, column_n = self._pass(part, mask)
            (-log_B.sum()).backward()
            self._collect(keys_n, column_n)
            found.append(log_B.detach())
        return torch.cat(found)

    def flows(self) -> tuple[Tensor, Tensor]:
        """Positions and words (n,), in order, with the sums of their flows (n, K) on all ranks; forgets them."""
        pending, self._pending = self._pending, []
        found = _added_up(pending, self.num_states, self.emissions.factor_SK)
        return found if rank_and_size()[1] == 1 else self._over_ranks(*found)

    def forget(self) -> None:
        """Forget flows that no step has taken."""
        self._pending = []

    @torch.no_grad()
    def tables(self) -> HMMTables:
        """All parameters, in tables of their own."""
        found = tables_of(self.circuit)
        return HMMTables(found.initial_K.clone(), found.transition_SKK.clone(), self.emissions.table_SKV())

    def finished(self, reserved: int | None = None) -> HiddenMarkovModel:
        """The model with the parameters as they are now."""
        return HiddenMarkovModel.from_tables(self.tables(), self.length, reserved)

    @torch.no_grad()
    def taken(self, reserved: int | None = None) -> HiddenMarkovModel:
        """The same as `finished`, in less memory; this model cannot be used any more."""
        found = tables_of(self.circuit)
        tables = HMMTables(found.initial_K.clone(), found.transition_SKK.clone(), self.emissions.taken_SKV())
        return HiddenMarkovModel.from_tables(tables, self.length, reserved)

    def _parts(self, x: Tensor, observed: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
        parts = x.split(self.batch_size)
        masks = [None] * len(parts) if observed is None else list(observed.split(self.batch_size))
        return list(zip(parts, masks, strict=True))

    def _pass(self, x_BT: Tensor, observed_BT: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """log p (B,), the positions and words that occur (n,), and the column of each."""
        keys_BT = self.emissions.keys(self.place_T, x_BT.long())
        if observed_BT is not None:  # what is missing holds anything
            keys_BT = torch.where(observed_BT, keys_BT, keys_BT[:1, :1])
        keys_n, place_BT = keys_BT.unique(return_inverse=True)
        place_n = keys_n // self.num_tokens
        first_S = torch.searchsorted(place_n, torch.arange(len(self.row_S), device=place_n.device))
        column_n = torch.arange(len(keys_n), device=keys_n.device) - first_S[place_n]
        column_BT = column_n[place_BT]
        table = self.circuit.stored()[self.number]
        with torch.no_grad():
            rows_SUK = table.new_full((len(table), table.shape[2], table.shape[1]), 1 / table.shape[2])
            rows_SUK[self.row_S[place_n], column_n] = self.emissions.gather(keys_n)
            table.copy_(rows_SUK.transpose(1, 2))
        self.circuit.trust_tables()
        return self.circuit.log_prob(column_BT, observed=observed_BT)[:, 0], keys_n, column_n

    @torch.no_grad()
    def _collect(self, keys_n: Tensor, column_n: Tensor) -> None:
        """Take the gradient of the emissions' columns, as flows."""
        table = self.circuit.stored()[self.number]
        assert table.grad is not None
        row_n = self.row_S[keys_n // self.num_tokens]
        flow_nK = (table * table.grad).neg_()[row_n, :, column_n]
        self.circuit.engine.gradient_pool[self.number], table.grad = table.grad, None
        self._pending.append((keys_n, flow_nK))
        if len(self._pending) > 1:  # at most one number for every parameter, however many batches are added up
            self._pending = [_added_up(self._pending, self.num_states, self.emissions.factor_SK)]

    def _over_ranks(self, keys_n: Tensor, flow_nK: Tensor) -> tuple[Tensor, Tensor]:
        came = torch.zeros(len(self.row_S) * self.num_tokens, dtype=torch.int32, device=keys_n.device)
        came[keys_n] = 1
        sum_in_place([came])
        every_m = came.nonzero()[:, 0]
        flow_mK = flow_nK.new_zeros(len(every_m), self.num_states)
        flow_mK[torch.searchsorted(every_m, keys_n)] = flow_nK
        sum_in_place([flow_mK])
        return every_m, flow_mK


def sparse_optimizer(model: SparseHMM, *, lr: float, momentum: float, pseudocount: float) -> Optimizer:
    """EM by the model's rule, of all its parameters.

    Args:
        model: whose `add_flows` gives it the flows of a step.
        lr, momentum, pseudocount: see `CircuitEM` and `Anemone`.
    """
    if model.rule == "anemone":
        return _SparseAnemone(model, lr=lr, momentum=momentum, pseudocount=pseudocount)
    return _SparseEM(model, lr=lr, pseudocount=pseudocount)


class _SparseEM(pc.CircuitEM):
    def __init__(self, model: SparseHMM, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._model = (model,)

    def _reduce(self) -> None:
        with _without_emissions(self._model[0]):
            super()._reduce()

    def _step_circuit(self, circuit: pc.Circuit, group: dict[str, Any]) -> None:
        super()._step_circuit(circuit, group)
        keys_n, flow_nK = self._model[0].flows()
        self._model[0].emissions.em_step(keys_n, flow_nK, lr=group["lr"], pseudocount=group["pseudocount"])

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._model[0].forget()


class _SparseAnemone(pc.Anemone):
    def __init__(self, model: SparseHMM, **settings: Any) -> None:
        super().__init__(model, **settings)
        self._model = (model,)

    def _reduce(self) -> None:
        with _without_emissions(self._model[0]):
            super()._reduce()

    def _step_circuit(self, circuit: pc.Circuit, group: dict[str, Any]) -> None:
        model = self._model[0]
        (number, _, row), *_ = circuit.engine.root_places()
        initial = circuit.stored()[number]
        assert initial.grad is not None
        num_examples = -float((initial[row] * initial.grad[row]).double().sum())
        share_GH = torch.ones(circuit.engine.roots.shape, dtype=circuit.dtype, device=circuit.device)
        top_down_SK = circuit.engine.top_down(circuit.probabilities(), share_GH)[model.number][model.row_S]
        super()._step_circuit(circuit, group)
        settings = {name: group[name] for name in ("lr", "momentum", "pseudocount")}
        model.emissions.anemone_step(*model.flows(), top_down_SK, num_examples, **settings)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        self._model[0].forget()


class _without_emissions:
    """While gradients are summed over ranks the columns of the emissions stay out: ranks have different words there."""

    def __init__(self, model: SparseHMM) -> None:
        self.table = model.circuit.stored()[model.number]

    def __enter__(self) -> None:
        self.table.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        self.table.requires_grad_(True)


def _emission_place(circuit: pc.Circuit) -> tuple[int, Tensor]:
    """The number of the circuit's table of emissions, and its row for every position."""
    nodes = circuit.structures[0].nodes
    for number, group in enumerate(circuit.plan.groups):
        if group.distribution is not None:
            place = {nodes[index].variable: row for row, (_, index) in enumerate(group.owners)}
            if len(place) == 1:
                return number, torch.zeros(1, dtype=torch.int64)
            return number, torch.tensor([place[t] for t in range(circuit.num_variables)])
    raise AssertionError("a hidden Markov model has inputs")


def _added_up(pending: list[tuple[Tensor, Tensor]], num_states: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Flows of several batches as those of one."""
    if not pending:
        return torch.zeros(0, dtype=torch.int64, device=like.device), like.new_zeros(0, num_states)
    if len(pending) == 1:
        return pending[0]
    keys_m, place = torch.cat([keys_n for keys_n, _ in pending]).unique(return_inverse=True)
    flow_mK = pending[0][1].new_zeros(len(keys_m), num_states)
    return keys_m, flow_mK.index_add_(0, place, torch.cat([flow_nK for _, flow_nK in pending]))

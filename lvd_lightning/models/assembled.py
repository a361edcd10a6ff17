"""The circuit over whole examples: a prior over the latents of parts, and a conditional circuit per latent value.

Shapes: B examples, P parts (positions), D variables of a part, K latent values, G circuits of the conditional.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lvd_lightning import circuits as pc
from lvd_lightning.files import parse_json, write_json
from lvd_lightning.models.head_index import HeadIndex
from lvd_lightning.models.routing import route_in_passes
from lvd_lightning.models.tree_lookup import TreeLookup
from lvd_lightning.parts import ImagePatches, Parts, describe_parts, parts_from, variable_type

__all__ = ["MARGIN", "AssembledCircuit"]

#: Nats below the best latent value of a part at which evidence stops to matter: it may come out lower than it is.
#: A likelihood is never overstated by that, and understated by a share of e^-60 as long as the prior allows the best.
MARGIN = 60.0
#: Posteriors of latent values that `expected` leaves out.
RARE = 1e-5


class AssembledCircuit(nn.Module):
    r"""p(x) = sum_z p(z) prod_i p(x_i | z_i) over the parts x_i of an example.

    Args:
        prior: circuit over P variables with soft evidence of K states.
        conditional: batch of circuits (`pc.Circuit([...])`) with K heads altogether over the D variables of a part,
            tied over positions; or with P x K heads, position by position.
        parts: how an example falls into parts.
        head_index: which head a latent value stands for, where the conditional does not have all of them.

    Attributes:
        head_index: which head of the conditional a latent value stands for.

    Raises:
        ValueError: prior, conditional and parts do not belong together.
    """

    def __init__(
        self, prior: pc.Circuit, conditional: pc.Circuit, parts: Parts, head_index: HeadIndex | None = None
    ) -> None:
        super().__init__()
        evidence = prior.plan.inputs[0].distribution
        if prior.batched or not isinstance(evidence, pc.SoftEvidence):
            raise ValueError(f"prior: expected a single circuit over SoftEvidence, got {prior} over {evidence}")
        self.prior = prior
        self.conditional = conditional
        self.parts = parts
        self.num_positions = prior.num_variables
        self.num_states = evidence.num_states
        self._check_parts()
        self._lookup: tuple[pc.Circuit, TreeLookup | None] | None = None
        self.head_index = head_index or HeadIndex.of(conditional, self.num_states, self.num_positions)

    @property
    def num_parameters(self) -> int:
        """Free parameters of prior and conditionals together."""
        return self.prior.num_parameters + self.conditional.num_parameters

    @property
    def num_dims(self) -> int:
        """Dimensions of an example: every variable of every part."""
        return self.num_positions * math.prod(self.parts.shape)

    def forward(self, x: Tensor) -> Tensor:
        """Same as `log_prob`."""
        return self.log_prob(x)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, shape (B,); x: examples (B, ...) as the datamodule gives them."""
        return self.log_prob_and_objective(x, None)[0]

    def lvd_objective(self, x: Tensor, z: Tensor) -> Tensor:
        """log p(x, z) = log p(z) + sum_i log p(x_i | z_i) in nats, shape (B,); z: int64 (B, P)."""
        return self.log_prob_and_objective(x, z)[1]

    def log_prob_and_objective(self, x: Tensor, z: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p(x) and log p(x, z) in nats, both (B,), at the cost of one; without z twice log p(x)."""
        evidence_BPK = self.evidence(x, margin=MARGIN)
        log_B = self.prior.log_prob(evidence_BPK)[:, 0]
        doubtful_B = log_B == -torch.inf
        if z is not None:
            given_BP = evidence_BPK.gather(2, z[..., None])[..., 0]
            doubtful_B |= (given_BP <= evidence_BPK.amax(2) - MARGIN).any(1)
        again = doubtful_B.nonzero()[:, 0]
        if len(again):
            evidence_BPK[again] = self.evidence(x[again])
            log_B = log_B.index_copy(0, again, self.prior.log_prob(evidence_BPK[again])[:, 0])
        if z is None:
            return log_B, log_B
        return log_B, self.prior_log_prob(z) + evidence_BPK.gather(2, z[..., None]).sum((1, 2))

    def prior_log_prob(self, z: Tensor) -> Tensor:
        """log p(z) in nats, shape (B,); z: int64 (B, P)."""
        lookup = None if torch.is_grad_enabled() else self.lookup()  # EM wants the circuit's own backward pass
        if lookup is not None:
            return lookup.log_prob(self.prior.probabilities(), z)
        certain = torch.full((*z.shape, self.num_states), -torch.inf, dtype=self.prior.dtype, device=z.device)
        return self.prior.log_prob(certain.scatter_(2, z[..., None], 0.0))[:, 0]

    def lookup(self) -> TreeLookup | None:
        """The tables of the prior, if it is a tree over z; looked for once for every prior."""
        found = self._lookup
        if found is None or found[0] is not self.prior:
            self._lookup = found = (self.prior, TreeLookup.of(self.prior))
        return found[1]

    def split(self, x: Tensor) -> Tensor:
        """Examples (B, ...) to (B, P, D), the variables of the conditional circuits.

        Raises:
            ValueError: examples of another shape.
        """
        return self.parts.split(x)

    @torch.no_grad()
    def evidence(self, x: Tensor, observed: Tensor | None = None, margin: float | None = None) -> Tensor:
        """log p(x_i | z_i = k) in nats, shape (B, P, K), in bounded memory (without gradients).

        observed: bool, broadcast to x; False marginalises a variable.
        margin: in nats. What is certainly as far below the part's best may come out lower than it is, never higher,
            which takes less time where heads are shared by all positions; None for exact numbers.
        """
        rows, masks = self.split(x), None if observed is None else self._split_mask(x, observed)
        if self.head_index.tied:
            rows, masks = rows.flatten(0, 1), None if masks is None else masks.flatten(0, 1)
        out = torch.empty(
            *rows.shape[:-1], self.num_states, dtype=self.conditional.dtype, device=self.conditional.device
        )
        step = self.conditional.batch_limit
        for low in range(0, len(rows), step):
            at = slice(low, low + step)
            out[at] = self._evidence_rows(rows[at], None if masks is None else masks[at], margin)
        return out.view(len(x), self.num_positions, self.num_states)

    def evidence_with_gradients(self, x: Tensor) -> Tensor:
        """log p(x_i | z_i = k) in nats, (B, P, K), through which gradients flow into the conditionals.

        In bounded memory: what a backward pass needs is computed again there, some rows at a time.
        """
        rows = self.split(x)
        rows = rows.flatten(0, 1) if self.head_index.tied else rows
        chunks = rows.split(max(1, self.conditional.batch_limit // 8))
        found = [checkpoint(self._evidence_rows, chunk, None, None, use_reentrant=False) for chunk in chunks]
        return torch.cat(found).view(len(x), self.num_positions, self.num_states)

    @torch.no_grad()
    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """`n` exact samples (n, ...), as the datamodule gives examples; generator: on the circuit's device."""
        z = self.prior.sample(n, generator=generator)
        blank = torch.zeros((n, *self.parts.example_shape), dtype=variable_type(self.parts), device=z.device)
        return self._complete(blank, torch.zeros_like(blank, dtype=torch.bool), z, generator)

    @torch.no_grad()
    def inpaint(self, x: Tensor, observed: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Exact samples of what is not `observed` (bool, broadcast to x) given what is; of the shape and type of x."""
        z = self.prior.sample(x=self.evidence(x, observed), generator=generator)
        return self._complete(x, observed, z, generator)

    @torch.no_grad()
    def redraw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Examples like x, with its shape and type: for each draws latent values given it, then all variables anew.

        What these have in common with x went through the latent values. Set beside `sample`, they tell what the prior
        costs from what the conditionals cost.
        """
        nothing = torch.zeros_like(x, dtype=torch.bool)
        return self._complete(x, nothing, self.prior.sample(x=self.evidence(x), generator=generator), generator)

    def expected(
        self, x: Tensor, observed: Tensor, function: Callable[[Tensor], Tensor] = lambda values: values
    ) -> Tensor:
        """E[x | what is `observed`] of every variable, (B, ...); exact but for latent values with posteriors below
        `RARE`.

        observed: bool, broadcast to x; what is observed stays as it is.
        function: of values, any shape to the same shape: its mean is taken in place of that of the value.
        """
        evidence_BPK = self.evidence(x, observed).requires_grad_()
        with torch.enable_grad():
            log_B = self.prior.log_prob(evidence_BPK)[:, 0]
        (posterior_BPK,) = torch.autograd.grad(log_B.sum(), evidence_BPK)
        image, position, state = (posterior_BPK > RARE).nonzero(as_tuple=True)
        weight_N = posterior_BPK[image, position, state]
        item_N = image * self.num_positions + position
        circuit_N, head_N = self.head_index.locate(state, position)
        x_ND = self.split(x).flatten(0, 1)
        mask_ND = self._split_mask(x, observed).flatten(0, 1)
        out_ND = torch.zeros(x_ND.shape, dtype=self.conditional.dtype, device=x_ND.device)
        total_N = torch.zeros(len(out_ND), dtype=weight_N.dtype, device=out_ND.device).index_add_(0, item_N, weight_N)
        slots = max(1, self.conditional.batch_limit // 8)
        for index_GS, filled_GS in route_in_passes(circuit_N, self.conditional.num_circuits, slots):
            item_GS = item_N[index_GS]
            mean_GSD = pc.expectation(
                self.conditional,
                lambda values, variables: function(values),
                x=_as_values(x_ND[item_GS]),
                observed=mask_ND[item_GS] & filled_GS[..., None],
                head=torch.where(filled_GS, head_N[index_GS], 0),
            )
            share_GS1 = torch.where(filled_GS, weight_N[index_GS] / total_N[item_GS], 0.0)[..., None]
            out_ND.index_add_(0, item_GS.flatten(), (share_GS1 * mean_GSD).flatten(0, 1))
        out_ND = torch.where(mask_ND, function(x_ND.to(out_ND.dtype)), out_ND)
        return self.parts.join(out_ND.view(len(x), self.num_positions, -1))

    def save(self, folder: Path) -> None:
        """Write prior, conditional and parts into `folder`; the parts last, as the sign of completeness."""
        pc.save(self.prior, folder / "prior")
        pc.save(self.conditional, folder / "conditional")
        write_json(folder / "assembled.json", {"parts": describe_parts(self.parts)})

    @classmethod
    def load(cls, folder: Path) -> AssembledCircuit:
        """Read what `save` wrote.

        Raises:
            ValueError: something is missing or damaged.
        """
        path = folder / "assembled.json"
        if not path.is_file():
            raise ValueError(f"{folder}: holds no assembled circuit ({path.name} is missing); run its stage first")
        try:
            prior, conditional = pc.load(folder / "prior"), pc.load(folder / "conditional")
            return cls(prior, conditional, _parts_in(parse_json(path.read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder}: holds no complete assembled circuit ({error}); run its stage again") from error

    def _check_parts(self) -> None:
        size = math.prod(self.parts.shape)
        if self.num_positions != self.parts.num_parts:
            raise ValueError(
                f"prior: has {self.num_positions} variables, expected one for each of the {self.parts.num_parts} parts "
                f"of shape {tuple(self.parts.shape)}"
            )
        if not self.conditional.batched or self.conditional.num_variables != size:
            kind = "a batch of circuits" if self.conditional.batched else "a single circuit"
            raise ValueError(
                f"conditional: is {kind} over {self.conditional.num_variables} variables, expected a batch of circuits "
                f"(`pc.Circuit([...])`) over the {size} of a part"
            )

    def _split_mask(self, x: Tensor, observed: Tensor) -> Tensor:
        """The mask of the parts, bool (B, P, D)."""
        fits = all(size in (1, wanted) for size, wanted in zip(observed.shape[::-1], x.shape[::-1]))
        if observed.dtype != torch.bool or observed.ndim > x.ndim or not fits:
            raise ValueError(
                f"observed: expected bool of a shape that broadcasts to {tuple(x.shape)}, got {observed.dtype} "
                f"{tuple(observed.shape)}"
            )
        return self.parts.split(observed.expand(x.shape))

    def _complete(self, x: Tensor, observed: Tensor, z: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw unobserved variables of every part from the conditional of its latent value."""
        x_ND = self.split(x).flatten(0, 1)
        mask_ND = self._split_mask(x, observed).flatten(0, 1)
        circuit_N, head_N = (found_BP.flatten() for found_BP in self.head_index.locate(z))
        out_ND = x_ND.clone()
        slots = max(1, self.conditional.batch_limit // 4)  # drawing takes more memory than a likelihood
        for index_GS, filled_GS in route_in_passes(circuit_N, self.conditional.num_circuits, slots):
            drawn_GSD = self.conditional.sample(
                x=_as_values(x_ND[index_GS]),
                observed=mask_ND[index_GS],
                head=torch.where(filled_GS, head_N[index_GS], 0),
                generator=generator,
            )
            out_ND[index_GS[filled_GS]] = drawn_GSD[filled_GS].to(out_ND.dtype)
        return self.parts.join(out_ND.view(len(x), self.num_positions, -1))

    def _evidence_rows(self, x: Tensor, mask: Tensor | None, margin: float | None) -> Tensor:
        """Evidence of parts (N, D), tied, shape (N, K); or of the parts of examples (B, P, D), shape (B, P, K)."""
        value_K = torch.arange(self.num_states, device=x.device)
        if self.head_index.tied:
            circuit_K, head_K = self.head_index.locate(value_K)
            return self.conditional.log_prob(x, observed=mask, margin=margin)[circuit_K, :, head_K].T
        position_G = self.head_index.position(torch.arange(self.conditional.num_circuits, device=x.device))
        chosen_GBD = x.transpose(0, 1)[position_G]
        mask_GBD = None if mask is None else mask.transpose(0, 1)[position_G]
        log_GBH = self.conditional.log_prob(chosen_GBD, observed=mask_GBD)
        position_P1 = torch.arange(self.num_positions, device=x.device)[:, None]
        circuit_PK, head_PK = self.head_index.locate(value_K, position_P1)
        return log_GBH[circuit_PK, :, head_PK].permute(2, 0, 1)


def _as_values(x: Tensor) -> Tensor:
    """Whole numbers of any type as int64, which draws come in; others as they are."""
    return x if x.is_floating_point() else x.long()


def _parts_in(saved: dict[str, Any]) -> Parts:
    """The parts of a saved circuit; until 0.1 files had the geometry of images of bytes."""
    if "parts" in saved:
        return parts_from(saved["parts"])
    return ImagePatches(saved["image_shape"], int(saved["patch_size"]))

"""Samples that gradients flow through: the descent of a sampler as sums and products of choices.

A sum unit that is reached with weight r hands r * y_c to its children c, y being its choice: one-hot, or soft weights
that sum to one. A product hands r to all its factors. Then a variable is the sum of r * value over all units of its
leaves. Autograd of that is the gradient for choices of samples of *all* children, chosen or not; without the others it
would depend on where zero lies.

Only one unit of a node is reached in a hard sample, so the units of a node share their noise.

Shapes: G circuits, B batch, D variables, F folded nodes, H outer units, K inner units, C values of a variable (1: the
value itself), S numbers stored per unit, V = G * D, E the row space of `plan.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvd_lightning.circuits.checks import check_generator, check_number, described, is_whole, plain_integers
from lvd_lightning.circuits.distributions import Distribution, Gaussian
from lvd_lightning.circuits.distributions.discretized import Discretized
from lvd_lightning.circuits.engine.batch import head_index
from lvd_lightning.circuits.engine.plan import InputPlan, LayerPlan
from lvd_lightning.circuits.engine.reference import Parts, index_of, log_values, take_inputs, weights_of
from lvd_lightning.circuits.queries import check_possible, nothing_observed

if TYPE_CHECKING:
    from lvd_lightning.circuits.circuit import Circuit
    from lvd_lightning.circuits.engine.reference import LogValues

__all__ = ["ESTIMATORS", "rsample"]

ESTIMATORS = ("gumbel", "straight_through", "simple")
#: Numbers that a chunk of folds may hold while choices are made.
CHUNK_SIZE = 1 << 20


def rsample(
    circuit: Circuit,
    n: int | None = None,
    *,
    head: int | Tensor = 0,
    x: Tensor | None = None,
    observed: Tensor | None = None,
    estimator: str = "simple",
    temperature: float = 1.0,
    hard: bool = False,
    onehot: bool = False,
    redraw: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Differentiable (conditional) samples; see `Circuit.rsample`."""
    _check_settings(circuit, estimator, temperature, {"hard": hard, "onehot": onehot, "redraw": redraw}, generator)
    x, observed = _evidence(circuit, n, x, observed)
    batch = circuit.prepare(x, observed)
    index_GB = head_index(circuit.engine, head, batch.size)
    is_evidence = circuit.engine.is_evidence
    is_shared = (x.ndim == 3) == is_evidence
    tables = circuit.probabilities()
    with torch.autocast(circuit.device.type, enabled=False):  # probabilities need their precision
        masks = None if observed is None else take_inputs(circuit.plan, observed, is_shared)
        found = log_values(circuit.plan, tables, take_inputs(circuit.plan, x, is_shared), masks)
        check_possible(circuit, found.heads.gather(1, index_GB[:, None])[:, 0], index_GB)
        sampler = _Sampler(circuit, tables, found, index_GB, float(temperature), onehot, estimator, generator)
        if estimator == "gumbel":
            out_VBC = sampler.draw(sampler.soft_sum, sampler.soft_leaf)
            if hard:
                with torch.no_grad():
                    hard_VBC = sampler.draw(sampler.hard_sum, sampler.hard_leaf)
                out_VBC = _straight_through(hard_VBC, out_VBC)
        else:
            out_VBC = sampler.draw(sampler.hard_sum, sampler.hard_leaf)
    out_GBDC = out_VBC.unflatten(0, (circuit.num_circuits, circuit.num_variables)).transpose(1, 2)
    if observed is not None and not is_evidence and not redraw:
        given = x if x.is_floating_point() else x.to(circuit.dtype)
        given = torch.where(observed, given, torch.zeros_like(given)).to(circuit.dtype)
        given_C = _onehot(given.long(), out_GBDC.shape[-1]).to(circuit.dtype) if onehot else given[..., None]
        out_GBDC = torch.where(observed[..., None], given_C, out_GBDC)
    out_GBDC = out_GBDC if circuit.batched else out_GBDC[0]
    return out_GBDC if onehot else out_GBDC[..., 0]


def _check_settings(
    circuit: Circuit, estimator: Any, temperature: Any, switches: dict[str, Any], generator: torch.Generator | None
) -> None:
    if not isinstance(estimator, str) or estimator not in ESTIMATORS:
        remedy = "; it is a function of f: pc.expected(circuit, f, estimator=...)"
        remedy = remedy if isinstance(estimator, str) and estimator in ("score", "exact") else ""
        raise ValueError(
            f"rsample: estimator: got {described(estimator)}, expected one of {', '.join(ESTIMATORS)}{remedy}"
        )
    check_number("rsample: temperature", temperature, 0, above_low=True)
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ValueError(f"rsample: {name}: got {described(value)}, expected True or False")
    check_generator("rsample", generator, circuit.device)
    for plan in circuit.plan.inputs:
        named = f"variable {int(plan.variables[0])} is {plan.distribution}, which has no list of values"
        if _num_values(plan) is None and switches["onehot"]:
            raise ValueError(f"rsample: onehot: {named}; give onehot=False")
        if _num_values(plan) is None and not isinstance(plan.distribution, Gaussian):
            raise ValueError(
                f"rsample: {named} and no known reparameterisation; pc.expected(..., estimator='score') needs none"
            )


def _evidence(
    circuit: Circuit, n: int | None, x: Tensor | None, observed: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """What is known, and the mask; as `sample` takes them."""
    if (n is None) == (x is None):
        raise ValueError("rsample: give either n, the number of samples, or x with `observed`, to complete its rows")
    if x is not None:
        if observed is None and not circuit.engine.is_evidence:
            raise ValueError("rsample: x needs `observed`, which says what of it is given (False: to be sampled)")
        return plain_integers(x), observed
    if n is None or not is_whole(n) or n < 0:
        remedy = "; examples are given by name: x=" if isinstance(n, Tensor) else ""
        raise ValueError(f"rsample: n: got {described(n)}, expected a whole number, 0 or larger{remedy}")
    if observed is not None:
        raise ValueError("rsample: observed: says what of x is given, and there is no x")
    return nothing_observed(circuit, int(n))


@dataclass
class _Noise:
    """Of every sum layer, Gumbel (F, K, B); of every input layer, Gumbel (F, C, B) or that of its family (F, B)."""

    sums: list[Tensor]
    leaves: list[Tensor]


class _Sampler:
    """The descent through one pass of values; its noise is drawn once, so a soft and a hard sample may share it."""

    def __init__(
        self,
        circuit: Circuit,
        tables: list[Tensor],
        found: LogValues,
        index_GB: Tensor,
        temperature: float,
        onehot: bool,
        estimator: str,
        generator: torch.Generator | None,
    ) -> None:
        self.circuit, self.tables, self.found, self.index_GB = circuit, tables, found, index_GB
        self.temperature, self.onehot, self.estimator = temperature, onehot, estimator
        self.num_values = max(_num_values(plan) or 1 for plan in circuit.plan.inputs)
        self.noise = self._draw_noise(generator)

    def draw(
        self,
        choose: Callable[[LayerPlan, Tensor, Tensor, Tensor, Tensor], Tensor],
        value: Callable[[InputPlan, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Samples (V, B, C). `choose` hands weights from the outer to the inner units of a sum layer; `value` makes a
        variable (F, B, C) of the weights of the units of its leaf.
        """
        plan = self.circuit.plan
        parts = Parts([0, *(layer.inner_start for layer in plan.layers)])
        parts.found = [self._heads()] * (1 + len(plan.layers))  # those of the layers come from the top down
        for number in reversed(range(len(plan.layers))):
            layer = plan.layers[number]
            assert layer.gradient is not None
            reach_FB = parts.gather(layer.gradient).unflatten(0, (len(layer.nodes), layer.outer_units))
            if layer.group >= 0:
                weight_FHK = weights_of(plan.groups[layer.group], self.tables[layer.group], layer)
                noise_FKB = self.noise.sums[number]
                reach_FB = choose(layer, weight_FHK, self.found.inner[number], noise_FKB, reach_FB)
            parts.found[1 + number] = _to_factors(layer, reach_FB).flatten(0, 1)
        num_rows = self.circuit.num_circuits * self.circuit.num_variables
        first = parts.found[0]
        out_VBC = first.new_zeros(num_rows, first.shape[1], self.num_values if self.onehot else 1)
        for number, leaf in enumerate(plan.inputs):
            assert leaf.gradient is not None
            reach_FKB = parts.gather(leaf.gradient).unflatten(0, (len(leaf.nodes), leaf.num_units))
            value_FBC = value(leaf, reach_FKB, self.noise.leaves[number])
            rows = index_of(leaf.circuits * self.circuit.num_variables + leaf.variables, first.device)
            value_FBC = torch.nn.functional.pad(value_FBC, (0, out_VBC.shape[2] - value_FBC.shape[2]))
            out_VBC = out_VBC.index_add(0, rows, value_FBC)
        return out_VBC

    def soft_sum(
        self, layer: LayerPlan, weight_FHK: Tensor, log_FKB: Tensor, noise_FKB: Tensor, reach_FHB: Tensor
    ) -> Tensor:
        """Every unit hands its weight on in the shares of a Gumbel-softmax, which backward computes again."""
        parts = (weight_FHK, log_FKB + noise_FKB, reach_FHB)
        size = layer.outer_units * log_FKB.shape[1] * log_FKB.shape[2]
        return _in_chunks(_soft_shares, parts, size, self.temperature)

    def hard_sum(
        self, layer: LayerPlan, weight_FHK: Tensor, log_FKB: Tensor, noise_FKB: Tensor, reach_FHB: Tensor
    ) -> Tensor:
        """Every unit hands its weight on to the child it drew; what is reached passes the gradient of soft shares."""
        drawn_FHB = _hard_choices(weight_FHK.detach(), (log_FKB.detach() + noise_FKB))
        out_FKB = torch.zeros_like(log_FKB.detach()).scatter_add(1, drawn_FHB, reach_FHB)
        is_reached_FB, unit_FB = _reached(reach_FHB)
        score_FKB = _log(_of_units(weight_FHK, unit_FB)).transpose(1, 2) + log_FKB
        if self.estimator == "straight_through":
            score_FKB = (score_FKB + noise_FKB) / self.temperature
        share_FKB = _softmax(score_FKB, 1) * is_reached_FB[:, None]
        return _straight_through(out_FKB, share_FKB)

    def soft_leaf(self, leaf: InputPlan, reach_FKB: Tensor, noise: Tensor) -> Tensor:
        """Values of all units, mixed; those of tables are a Gumbel-softmax over the values."""
        if not self._is_listed(leaf):
            return self._reparameterised(leaf, reach_FKB, noise)
        p_FKC = self._probabilities(leaf)
        size = p_FKC.shape[1] * p_FKC.shape[2] * reach_FKB.shape[2]
        return _in_chunks(_soft_values, (p_FKC, noise, reach_FKB), size, self.temperature, self.onehot)

    def hard_leaf(self, leaf: InputPlan, reach_FKB: Tensor, noise: Tensor) -> Tensor:
        """The value of the unit that is reached; the gradient for the choice of a unit has the units' means."""
        if not self._is_listed(leaf):
            if self.estimator == "simple" and isinstance(leaf.distribution, Discretized):
                drawn_FB1 = self._reparameterised(leaf, reach_FKB, noise).detach()
                return _straight_through(drawn_FB1, _mixed_means(reach_FKB, _as_values(self._probabilities(leaf))))
            return self._reparameterised(leaf, reach_FKB, noise)
        p_FKC = self._probabilities(leaf)
        is_reached_FB, unit_FB = _reached(reach_FKB)
        score_FBC = _log(_of_units(p_FKC, unit_FB)) + noise.transpose(1, 2)
        drawn_FBC = _onehot(score_FBC.detach().argmax(-1), p_FKC.shape[2]).to(p_FKC.dtype) * is_reached_FB[..., None]
        drawn_FBC = drawn_FBC if self.onehot else _as_values(drawn_FBC)
        mean_FKC = p_FKC if self.onehot else _as_values(p_FKC)
        if self.estimator == "simple":
            return _straight_through(drawn_FBC, _mixed_means(reach_FKB, mean_FKC))
        soft_FBC = _softmax(score_FBC / self.temperature, -1) * is_reached_FB[..., None]
        soft_FBC = soft_FBC if self.onehot else _as_values(soft_FBC)
        return _straight_through(drawn_FBC, soft_FBC + _mixed_means(reach_FKB, mean_FKC.detach()))

    def _reparameterised(self, leaf: InputPlan, reach_FKB: Tensor, noise_FB: Tensor) -> Tensor:
        """Place + spread * noise of all units, mixed; rounding passes gradients on as if it were not there."""
        mean_FK1, spread_FK1 = self._parameters(leaf).split(1, -1)
        value_FKB = mean_FK1 + spread_FK1 * noise_FB[:, None]
        if isinstance(leaf.distribution, Discretized):
            value_FKB = value_FKB.clamp(0, leaf.distribution.num_values - 1)
            value_FKB = _straight_through(value_FKB.detach().round(), value_FKB)
        return (reach_FKB * value_FKB).sum(1)[..., None]

    def _heads(self) -> Tensor:
        """The first part of E, (1 + G * heads, B): a row of zeros, and 1 for the heads that are asked for."""
        heads_GHB = torch.zeros_like(self.found.heads.detach()).scatter(1, self.index_GB[:, None], 1.0)
        return torch.cat([heads_GHB.new_zeros(1, heads_GHB.shape[2]), heads_GHB.flatten(0, 1)])

    def _parameters(self, leaf: InputPlan) -> Tensor:
        table = self.tables[leaf.group]
        return table[index_of(leaf.parameter_rows, table.device)]

    def _probabilities(self, leaf: InputPlan) -> Tensor:
        """p(value | unit), (F, K, C), differentiable; the states of evidence are its units."""
        family = leaf.distribution
        if leaf.group < 0:
            eye = torch.eye(leaf.num_units, dtype=self.found.heads.dtype, device=self.found.heads.device)
            return eye.expand(len(leaf.nodes), -1, -1)
        params_FKS = self._parameters(leaf)
        if family.is_table:
            return params_FKS
        values_C = torch.arange(family.num_outcomes or 0, device=params_FKS.device)
        return family.log_prob(params_FKS, values_C.expand(len(params_FKS), -1)).exp()

    def _is_listed(self, leaf: InputPlan) -> bool:
        """Whether samples come from the list of p(value | unit), and not by reparameterisation."""
        if _num_values(leaf) is None:
            return False
        return self.onehot or not isinstance(leaf.distribution, Discretized)

    def _draw_noise(self, generator: torch.Generator | None) -> _Noise:
        like = self.found.heads.detach()
        size = like.shape[2]

        def gumbel(*shape: int) -> Tensor:
            return -like.new_empty(shape).exponential_(generator=generator).log()

        sums = [
            gumbel(len(layer.nodes), layer.inner_units, size) if layer.group >= 0 else like.new_empty(0)
            for layer in self.circuit.plan.layers
        ]
        leaves = []
        for leaf in self.circuit.plan.inputs:
            if self._is_listed(leaf):
                leaves.append(gumbel(len(leaf.nodes), _num_values(leaf) or 0, size))
            else:
                leaves.append(_family_noise(leaf.distribution, like.new_empty(len(leaf.nodes), size), generator))
        return _Noise(sums, leaves)


def _num_values(leaf: InputPlan) -> int | None:
    """C of the variables of an input layer; None: no list holds them."""
    return leaf.num_units if leaf.distribution.is_evidence else leaf.distribution.num_outcomes


def _family_noise(family: Distribution, like_FB: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws of place 0 and spread 1."""
    if isinstance(family, Discretized):
        return family.noise(like_FB, generator)
    one_FB2 = torch.stack([torch.zeros_like(like_FB), torch.ones_like(like_FB)], -1)
    return family.sample(one_FB2, generator)


def _in_chunks(function: Callable[..., Tensor], parts: tuple[Tensor, ...], size: int, *settings: Any) -> Tensor:
    """A function of some folds at a time, `size` numbers each, that backward computes again instead of keeping them."""
    step = max(1, CHUNK_SIZE // max(1, size))
    found = [
        checkpoint(function, *(part[low : low + step] for part in parts), *settings, use_reentrant=False)
        for low in range(0, len(parts[0]), step)
    ]
    return found[0] if len(found) == 1 else torch.cat(found)


def _soft_shares(weight_FHK: Tensor, score_FKB: Tensor, reach_FHB: Tensor, temperature: float) -> Tensor:
    """Weights of the inner units, (F, K, B)."""
    score_FHKB = (_log(weight_FHK)[..., None] + score_FKB[:, None]) / temperature
    return torch.einsum("fhb,fhkb->fkb", reach_FHB, _softmax(score_FHKB, 2))


def _soft_values(p_FKC: Tensor, noise_FCB: Tensor, reach_FKB: Tensor, temperature: float, onehot: bool) -> Tensor:
    """Mixtures of Gumbel-softmaxes over the values, (F, B, C), or (F, B, 1) of their mean values."""
    y_FKCB = _softmax((_log(p_FKC)[..., None] + noise_FCB[:, None]) / temperature, 2)
    if onehot:
        return torch.einsum("fkb,fkcb->fbc", reach_FKB, y_FKCB)
    value_C = torch.arange(p_FKC.shape[2], dtype=p_FKC.dtype, device=p_FKC.device)
    return torch.einsum("fkb,fkcb,c->fb", reach_FKB, y_FKCB, value_C)[..., None]


@torch.no_grad()
def _hard_choices(weight_FHK: Tensor, score_FKB: Tensor) -> Tensor:
    """The inner unit that every outer unit draws, (F, H, B)."""
    num_folds, num_outer, _ = weight_FHK.shape
    log_FHK = weight_FHK.log()
    out_FHB = score_FKB.new_empty(num_folds, num_outer, score_FKB.shape[2], dtype=torch.int64)
    step = max(1, CHUNK_SIZE // max(1, num_outer * score_FKB.shape[1] * score_FKB.shape[2]))
    for low in range(0, num_folds, step):
        chosen = slice(low, low + step)
        out_FHB[chosen] = (log_FHK[chosen, ..., None] + score_FKB[chosen, None]).argmax(2)
    return out_FHB


def _to_factors(layer: LayerPlan, reach_FKB: Tensor) -> Tensor:
    """The weights of what E holds of a layer: its inner units, or the units of the factors of Kronecker products."""
    if layer.grid is None:
        return reach_FKB
    reach_FPIJB = reach_FKB.unflatten(1, (-1, *layer.grid))
    return torch.cat([reach_FPIJB.sum(3), reach_FPIJB.sum(2)], 2).flatten(1, 2)


def _reached(reach_FKB: Tensor) -> tuple[Tensor, Tensor]:
    """Whether a node is reached by a hard sample (1 or 0), and its unit, both (F, B)."""
    value_FB, unit_FB = reach_FKB.detach().max(1)
    return (value_FB > 0.5).to(value_FB.dtype), unit_FB


def _of_units(table_FKS: Tensor, unit_FB: Tensor) -> Tensor:
    """The rows of the units, (F, B, S)."""
    return table_FKS[torch.arange(len(table_FKS), device=table_FKS.device)[:, None], unit_FB]


def _straight_through(value: Tensor, gradient: Tensor) -> Tensor:
    """One tensor's value, and the gradients of both."""
    return value + (gradient - gradient.detach())


def _log(p: Tensor) -> Tensor:
    """log p; what has probability 0 has no gradient."""
    is_zero = p.detach() <= 0
    return p.masked_fill(is_zero, 1.0).log().masked_fill(is_zero, -torch.inf)


def _softmax(score: Tensor, dim: int) -> Tensor:
    """Shares; where nothing is possible (nobody reaches that) they are equal and pass no gradient."""
    is_dead = score.detach().amax(dim, keepdim=True) == -torch.inf
    return score.masked_fill(is_dead, 0.0).softmax(dim)


def _mixed_means(reach_FKB: Tensor, mean_FKC: Tensor) -> Tensor:
    """Means of units, mixed by their weights, (F, B, C)."""
    return torch.einsum("fkb,fkc->fbc", reach_FKB, mean_FKC)


def _as_values(share: Tensor) -> Tensor:
    """Mean values (..., 1) under shares of the values (..., C)."""
    return share @ torch.arange(share.shape[-1], dtype=share.dtype, device=share.device)[:, None]


def _onehot(index: Tensor, size: int) -> Tensor:
    return index[..., None] == torch.arange(size, device=index.device)

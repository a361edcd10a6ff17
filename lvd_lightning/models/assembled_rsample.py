"""Samples of an assembled circuit that gradients flow through: latent values from the prior, parts from their heads.

A latent value chooses a head, and the gradient of that choice compares what all heads would have drawn. Hard estimators
draw the chosen head alone and take the means of the others, which are exact and, as nothing of a part is known, the
same for all examples: K x D numbers in place of B x P x K x D. Soft samples are mixtures of samples of all heads, some
rows at a time, computed again in backward.

Shapes: B examples, P parts, D variables of a part, K latent values, N = B * P parts of all examples, G circuits,
H heads, S slots, A sets of heads (1 if positions share them, else P).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lvd_lightning import circuits as pc
from lvd_lightning.models.routing import route_in_passes

if TYPE_CHECKING:
    from lvd_lightning.models.assembled import AssembledCircuit

__all__ = ["head_means", "reconstruct", "rsample"]


def rsample(
    circuit: AssembledCircuit,
    n: int,
    *,
    estimator: str = "simple",
    temperature: float = 1.0,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Samples (n, ...) with gradients for prior and conditionals, floating point, in the values of the variables.

    Args:
        circuit: with parameters as logits, if a gradient optimizer is to use the gradients.
        n: how many samples.
        estimator, temperature, hard: see `Circuit.rsample`. "gumbel" draws from all K heads for every part, the others
            from one.
        generator: on the circuit's device; the default one if not given.

    Raises:
        ValueError: as `Circuit.rsample`.
    """
    settings: dict[str, Any] = {"estimator": estimator, "temperature": temperature, "hard": hard}
    z_BPK = circuit.prior.rsample(n, onehot=True, generator=generator, **settings)
    return _decode(circuit, z_BPK, settings, generator)


def reconstruct(
    circuit: AssembledCircuit,
    x: Tensor,
    evidence: Tensor | None = None,
    *,
    estimator: str = "simple",
    temperature: float = 1.0,
    hard: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Examples like x, (B, ...), floating point: latent values drawn given x, then all variables given these.

    With a single latent value, that of a circuit over whole examples, the latents inside of it take the place of
    latent values: those are drawn given x, and then all variables (see `redraw` in `Circuit.rsample`).

    Args:
        circuit, estimator, temperature, hard, generator: as for `rsample`.
        x: examples (B, ...), as the datamodule gives them.
        evidence: (B, P, K), log-likelihoods of latent values that someone else, such as an encoder, has; None: those of
            the conditionals. Gradients flow into both.

    Raises:
        ValueError: as `Circuit.rsample`.
    """
    settings: dict[str, Any] = {"estimator": estimator, "temperature": temperature, "hard": hard}
    if circuit.num_states == 1:
        return _through_inner_latents(circuit, x, settings, generator)
    if evidence is None:
        evidence = circuit.evidence_with_gradients(x)
    z_BPK = circuit.prior.rsample(x=evidence, onehot=True, generator=generator, **settings)
    return _decode(circuit, z_BPK, settings, generator)


@torch.no_grad()
def head_means(circuit: AssembledCircuit) -> Tensor:
    """The exact mean of every variable under every head, (A, K, D)."""
    conditional = circuit.conditional
    heads_G = [structure.num_heads for structure in conditional.structures]
    head_H = torch.arange(conditional.num_heads, device=conditional.device)
    head_GH = torch.minimum(head_H, torch.tensor(heads_G, device=head_H.device)[:, None] - 1)
    blank_GHD = torch.zeros(*head_GH.shape, conditional.num_variables, dtype=conditional.dtype, device=head_H.device)
    nothing = torch.zeros_like(blank_GHD, dtype=torch.bool)
    mean_GHD = pc.expectation(conditional, lambda values, _: values, x=blank_GHD, observed=nothing, head=head_GH)
    value_K = torch.arange(circuit.num_states, device=head_H.device)
    num_sets = 1 if circuit.head_index.tied else circuit.num_positions
    circuit_AK, head_AK = circuit.head_index.locate(value_K, torch.arange(num_sets, device=head_H.device)[:, None])
    return mean_GHD[circuit_AK, head_AK].view(num_sets, circuit.num_states, -1)


def _decode(
    circuit: AssembledCircuit, z_BPK: Tensor, settings: dict[str, Any], generator: torch.Generator | None
) -> Tensor:
    """Examples given latent values, one-hot or soft."""
    if settings["estimator"] == "gumbel":
        x_BPD = _mixed(circuit, z_BPK, settings, generator)
    else:
        x_BPD = _chosen(circuit, z_BPK, settings, generator)
        mean_PKD = head_means(circuit).to(z_BPK.dtype).expand(circuit.num_positions, -1, -1)
        other_BPD = torch.einsum("bpk,pkd->bpd", z_BPK, mean_PKD)
        x_BPD = x_BPD + (other_BPD - other_BPD.detach())
    return circuit.parts.join(x_BPD)


def _chosen(
    circuit: AssembledCircuit, z_BPK: Tensor, settings: dict[str, Any], generator: torch.Generator | None
) -> Tensor:
    """Parts drawn from the heads of their latent values, (B, P, D)."""
    conditional = circuit.conditional
    z_BP = z_BPK.detach().argmax(2)
    circuit_N, head_N = (found_BP.flatten() for found_BP in circuit.head_index.locate(z_BP))
    places, drawn = [], []
    for index_GS, filled_GS in route_in_passes(circuit_N, conditional.num_circuits, _step(conditional)):
        head_GS = torch.where(filled_GS, head_N[index_GS], 0)
        drawn_GSD = _drawn(conditional, head_GS, settings, generator)
        places.append(index_GS[filled_GS])
        drawn.append(drawn_GSD[filled_GS])
    x_ND = torch.cat(drawn)[torch.cat(places).argsort()]
    return x_ND.view(*z_BP.shape, -1)


def _mixed(
    circuit: AssembledCircuit, z_BPK: Tensor, settings: dict[str, Any], generator: torch.Generator | None
) -> Tensor:
    """Samples of all heads, mixed by the weights of latent values, (B, P, D)."""
    conditional, tied = circuit.conditional, circuit.head_index.tied
    weight_RAK = z_BPK.flatten(0, 1)[:, None] if tied else z_BPK  # rows are parts, or examples with a set per position
    heads_G = torch.tensor([structure.num_heads for structure in conditional.structures], device=z_BPK.device)
    number_G = torch.arange(conditional.num_circuits, device=z_BPK.device)
    position_G = circuit.head_index.position(number_G)
    chunks = []
    for part_RAK in weight_RAK.split(_step(conditional)):
        total_RAD = part_RAK.new_zeros(*part_RAK.shape[:2], conditional.num_variables)
        for head in range(conditional.num_heads):
            head_G = torch.clamp_max(heads_G - 1, head)
            value_G = circuit.head_index.value(number_G, head_G)
            weight_RG = part_RAK[:, position_G, value_G] * (heads_G > head)
            drawn_GRD = _drawn(conditional, head_G[:, None].expand(-1, len(part_RAK)), settings, generator)
            total_RAD = total_RAD.index_add(1, position_G, weight_RG[..., None] * drawn_GRD.transpose(0, 1))
        chunks.append(total_RAD)
    return torch.cat(chunks).view(*z_BPK.shape[:2], -1)


def _through_inner_latents(
    circuit: AssembledCircuit, x: Tensor, settings: dict[str, Any], generator: torch.Generator | None
) -> Tensor:
    conditional, tied = circuit.conditional, circuit.head_index.tied
    rows_BPD = circuit.split(x)
    rows_GSD = rows_BPD.flatten(0, 1)[None] if tied else rows_BPD.transpose(0, 1)  # a circuit for each position
    chunks = []
    for part_GSD in rows_GSD.split(_step(conditional), 1):
        head_GS = torch.zeros(part_GSD.shape[:2], dtype=torch.int64, device=x.device)
        chunks.append(_drawn(conditional, head_GS, settings, generator, part_GSD))
    drawn_GSD = torch.cat(chunks, 1)
    x_BPD = drawn_GSD[0].view(rows_BPD.shape) if tied else drawn_GSD.transpose(0, 1)
    return circuit.parts.join(x_BPD)


def _drawn(
    conditional: pc.Circuit,
    head_GS: Tensor,
    settings: dict[str, Any],
    generator: torch.Generator | None,
    given_GSD: Tensor | None = None,
) -> Tensor:
    """Samples (G, S, D) of chosen heads; backward draws them again with the same noise in place of keeping all units.

    given: examples whose latents decide the samples.
    """
    where = head_GS.device if generator is None else generator.device
    seed = int(torch.randint(1 << 62, (), generator=generator, device=where))

    def draw() -> Tensor:
        own = torch.Generator(head_GS.device).manual_seed(seed)
        if given_GSD is None:
            return conditional.rsample(head_GS.shape[1], head=head_GS, generator=own, **settings)
        whole = given_GSD if given_GSD.is_floating_point() else given_GSD.long()
        known = torch.ones_like(whole, dtype=torch.bool)
        return conditional.rsample(x=whole, observed=known, head=head_GS, redraw=True, generator=own, **settings)

    drawn: Tensor = checkpoint(draw, use_reentrant=False, preserve_rng_state=False)
    return drawn


def _step(conditional: pc.Circuit) -> int:
    """Examples per circuit that are drawn together: a backward pass keeps several values of every unit."""
    return max(1, conditional.batch_limit // 16)

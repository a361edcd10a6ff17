"""Expectations of functions of whole samples, with gradients: by enumeration, or by the score function.

Shapes: G circuits, B batch, D variables, K states, N samples or worlds of a row, R = B * N.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_counts, check_generator, check_type, described, plain_integers
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.engine.batch import head_index
from lvd_lightning.circuits.queries import nothing_observed

__all__ = ["MAX_WORLDS", "expected"]

#: How many worlds "exact" sums over at most, those of all rows together.
MAX_WORLDS = 1 << 16


def expected(
    circuit: Circuit,
    f: Callable[[Tensor], Tensor],
    *,
    estimator: Literal["score", "exact"] = "score",
    num_samples: int = 64,
    baseline: bool = True,
    x: Tensor | None = None,
    observed: Tensor | None = None,
    head: int | Tensor = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """E[f(x) | what is observed], with gradients for parameters, evidence and whatever f depends on.

    "exact" sums over all worlds of what is not observed, which is for small circuits. "score" takes the mean of
    samples; its gradient is that of f plus f times the gradient of the sample's log-likelihood (REINFORCE), which has
    no bias whatever f is and needs no derivative of f, but a large variance. They tell what the estimators of
    `Circuit.rsample` are worth. For functions of single variables `expectation` is exact on every circuit.

    Args:
        circuit: one, or a batch of circuits.
        f: takes samples (N, D), floating point, and gives a tensor (N,). Of evidence it gets states.
        estimator: "score" or "exact".
        num_samples: of "score", for each row; at least 2 with a baseline.
        baseline: of "score": from f of a sample the mean f of the row's other samples is taken off, which leaves the
            mean of the gradient and lowers its variance.
        x: (B, D), or evidence (B, D, K); for a batch of circuits led by G, or given to all of them. None: nothing is
            known.
        observed: bool, the shape of x without states; False: x does not say. Needed with x, except for evidence.
        head: an int, or a tensor (B,) ((G, B) for a batch of circuits).
        generator: of "score", on the circuit's device; the default one if not given.

    Returns:
        (B,), or () without x; for a batch of circuits led by G.

    Raises:
        ValueError: "exact" with more than 65536 worlds of all rows together, or with an unobserved variable that has no
            list of values; f gives no tensor (N,); a wrong estimator or number of samples; x without `observed`, or
            `observed` without x; an impossible row; or a graph in place of a circuit.

    References:
        Williams, Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning, 1992; Kool,
        van Hoof, Welling, Buy 4 REINFORCE Samples, Get a Baseline for Free!, 2019.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> graph = pc.hclt([-1, 0, 1], num_latents=4, leaf=pc.Bernoulli())
        >>> circuit = pc.Circuit(graph, parameterization="logits")
        >>> all_equal = lambda x: (x == x[:, :1]).all(1).float()  # without a derivative
        >>> exact = pc.expected(circuit, all_equal, estimator="exact")
        >>> drawn = pc.expected(circuit, all_equal, num_samples=2000, generator=torch.Generator().manual_seed(0))
        >>> bool((exact - drawn).abs() < 0.05)
        True
        >>> drawn.backward()
    """
    check_type("expected: circuit", circuit, Circuit)
    if not callable(f):
        raise ValueError(f"expected: f: got {described(f)}, expected a function of samples (N, variables)")
    if estimator not in ("score", "exact"):
        remedy = "; that one makes samples: circuit.rsample(...)" if _makes_samples(estimator) else ""
        raise ValueError(f"expected: estimator: got {described(estimator)}, expected score or exact{remedy}")
    if not isinstance(baseline, bool):
        raise ValueError(f"expected: baseline: got {described(baseline)}, expected True or False")
    check_counts("expected", num_samples=num_samples)
    if estimator == "score" and baseline and num_samples < 2:
        raise ValueError("expected: num_samples: got 1, expected at least 2, or baseline=False")
    check_generator("expected", generator, circuit.device)
    if x is None and observed is not None:
        raise ValueError("expected: observed: says what of x is given, and there is no x")
    if x is not None and observed is None and not circuit.engine.is_evidence:
        raise ValueError("expected: x needs `observed`, which says what of it is given (False: not known)")
    known, mask = nothing_observed(circuit, 1) if x is None else (plain_integers(x), observed)
    size = circuit.prepare(known, mask).size
    index_GB = head_index(circuit.engine, head, size)
    known, mask = _complete(circuit, known, mask)
    if estimator == "exact":
        out_GB = _exact(circuit, f, known, mask, index_GB)
    else:
        out_GB = _score(circuit, f, known, mask, index_GB, int(num_samples), baseline, generator)
    out = out_GB if circuit.batched else out_GB[0]
    return out if x is not None else out[..., 0]


def _makes_samples(estimator: Any) -> bool:
    return isinstance(estimator, str) and estimator in ("gumbel", "straight_through", "simple")


def _complete(circuit: Circuit, x: Tensor, observed: Tensor | None) -> tuple[Tensor, Tensor]:
    """x (G, B, D) or (G, B, D, K), floating point and 0 where it does not say, and its mask (G, B, D)."""
    is_evidence = circuit.engine.is_evidence
    if observed is None:
        observed = torch.ones(x.shape[:-1] if is_evidence else x.shape, dtype=torch.bool, device=x.device)
    dims = 4 if is_evidence else 3
    x = x if x.is_floating_point() else x.to(circuit.dtype)
    x = torch.where(observed[..., None] if is_evidence else observed, x, torch.zeros_like(x))
    if x.ndim < dims:
        x, observed = (t.expand(circuit.num_circuits, *t.shape) for t in (x, observed))
    return x, observed


def _exact(
    circuit: Circuit, f: Callable[[Tensor], Tensor], x: Tensor, observed_GBD: Tensor, index_GB: Tensor
) -> Tensor:
    """The sum over all worlds of the variables that some row does not know, (G, B)."""
    is_evidence = circuit.engine.is_evidence
    is_open_D = torch.ones_like(observed_GBD[0, 0]) if is_evidence else ~observed_GBD.flatten(0, 1).all(0)
    open_variables = is_open_D.nonzero()[:, 0].tolist()
    values = _values(circuit, open_variables)
    num_rows, num_worlds = index_GB.shape[1], math.prod(values)
    if num_rows * num_worlds > MAX_WORLDS:
        rows = f" for each of {num_rows} rows" if num_rows > 1 else ""
        raise ValueError(
            f"expected: estimator 'exact' sums over all {num_worlds} worlds{rows}, more than {MAX_WORLDS}; give fewer "
            "rows, observe more variables, or take estimator='score'"
        )
    filled_ND = torch.zeros(num_worlds, circuit.num_variables, dtype=x.dtype, device=circuit.device)
    axes = [torch.arange(size, device=circuit.device) for size in values]
    for variable, grid in zip(open_variables, torch.meshgrid(*axes, indexing="ij") if axes else (), strict=True):
        filled_ND[:, variable] = grid.flatten().to(x.dtype)
    if is_evidence:
        z_GBND = filled_ND.expand(*index_GB.shape, -1, -1)
    else:
        # Where a row knows what another one does not, its worlds come several times, all of them equally often.
        z_GBND = torch.where(observed_GBD[:, :, None], x[:, :, None], filled_ND)
    log_GBN = _log_joint(circuit, z_GBND, x, index_GB)
    _check_rows(log_GBN.detach().amax(2) > -torch.inf)
    p_GBN = log_GBN.softmax(2)
    f_GBN = _apply(f, z_GBND)
    return (p_GBN * f_GBN.masked_fill(p_GBN.detach() == 0, 0.0)).sum(2)


def _score(
    circuit: Circuit,
    f: Callable[[Tensor], Tensor],
    x: Tensor,
    observed_GBD: Tensor,
    index_GB: Tensor,
    num_samples: int,
    baseline: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The mean f of samples, (G, B), with the gradient of the score function."""
    rows = x.detach().repeat_interleave(num_samples, 1)
    masks = observed_GBD.repeat_interleave(num_samples, 1)
    heads = index_GB.repeat_interleave(num_samples, 1)
    batched = circuit.batched
    drawn = circuit.sample(
        x=rows if batched else rows[0],
        observed=masks if batched else masks[0],
        head=heads if batched else heads[0],
        generator=generator,
    )
    drawn_GRD = drawn.to(x.dtype) if batched else drawn.to(x.dtype)[None]
    z_GBND = drawn_GRD.unflatten(1, (index_GB.shape[1], num_samples))
    if not circuit.engine.is_evidence:
        z_GBND = torch.where(observed_GBD[:, :, None], x[:, :, None], z_GBND)
    f_GBN = _apply(f, z_GBND)
    log_known_GB = circuit.log_prob(
        x if batched else x[0],
        head=index_GB if batched else index_GB[0],
        observed=observed_GBD if batched else observed_GBD[0],
    ).view(index_GB.shape)
    log_GBN = _log_joint(circuit, z_GBND, x, index_GB) - log_known_GB[..., None]
    weight_GBN = f_GBN.detach()
    if baseline:
        weight_GBN = (weight_GBN - weight_GBN.mean(2, keepdim=True)) * (num_samples / (num_samples - 1))
    return (f_GBN + weight_GBN * (log_GBN - log_GBN.detach())).mean(2)


def _log_joint(circuit: Circuit, z_GBND: Tensor, x: Tensor, index_GB: Tensor) -> Tensor:
    """log p of whole samples, (G, B, N); of states together with their evidence."""
    num = z_GBND.shape[2]
    rows = z_GBND.flatten(1, 2)
    if circuit.engine.is_evidence:
        is_state = rows[..., None] == torch.arange(x.shape[-1], device=x.device)
        rows = x.repeat_interleave(num, 1).masked_fill(~is_state, -torch.inf)
    heads = index_GB.repeat_interleave(num, 1)
    found = circuit.log_prob(rows if circuit.batched else rows[0], head=heads if circuit.batched else heads[0])
    return found.view(*index_GB.shape, num)


def _values(circuit: Circuit, variables: list[int]) -> list[int]:
    """How many values these variables have."""
    found: dict[int, int] = {}
    for plan in circuit.plan.inputs:
        size = plan.num_units if plan.distribution.is_evidence else plan.distribution.num_outcomes
        for variable in set(plan.variables.tolist()) & set(variables):
            if size is None:
                raise ValueError(
                    f"expected: estimator 'exact' lists worlds, but variable {variable} is {plan.distribution}, which "
                    "has no list of values; observe it, or take estimator='score'"
                )
            found[variable] = min(size, found.get(variable, size))
    return [found[variable] for variable in variables]


def _apply(f: Callable[[Tensor], Tensor], z_GBND: Tensor) -> Tensor:
    """f of all samples, (G, B, N)."""
    rows_ND = z_GBND.flatten(0, 2)
    found = f(rows_ND)
    if not isinstance(found, Tensor) or found.shape != rows_ND.shape[:1]:
        raise ValueError(
            f"expected: f: gave {described(found)} for samples of shape {tuple(rows_ND.shape)}, expected a tensor of "
            f"shape ({len(rows_ND)},), a number for each"
        )
    return found.to(z_GBND.dtype).view(z_GBND.shape[:3])


def _check_rows(is_possible_GB: Tensor) -> None:
    if not bool(is_possible_GB.all()):
        raise ValueError("x: a row has probability zero under its head, so nothing can be conditioned on it")

"""Expectations of functions of single variables, given what is observed.

Shapes: G circuits, B batch, D variables, C values of a variable, F folded nodes, K units, N points.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.circuits.checks import check_type, described
from lvd_lightning.circuits.circuit import Circuit
from lvd_lightning.circuits.distributions import Distribution, Gaussian
from lvd_lightning.circuits.engine.batch import head_index
from lvd_lightning.circuits.engine.layers import InputLayer
from lvd_lightning.circuits.queries import nothing_observed, unit_posteriors

__all__ = ["expectation"]

Function = Tensor | Callable[[Tensor, Tensor], Tensor]
#: Points of the Gauss-Hermite rule: exact for polynomials up to degree 127.
POINTS = 64


@torch.no_grad()
def expectation(
    circuit: Circuit,
    f: Function,
    *,
    x: Tensor | None = None,
    observed: Tensor | None = None,
    head: int | Tensor = 0,
) -> Tensor:
    """E[f_v(x_v) | what is observed] for every variable v, in one forward and one backward pass.

    Exact; for Gaussian inputs as exact as Gauss-Hermite quadrature with 64 points in every unit: polynomials up to
    degree 127 are exact.

    Args:
        f: (D, C), the value f_v(c) for every variable and value; for evidence C are the states. Or a function of two
            tensors of equal shape, values and the variables they belong to, to a tensor of that shape.
        x: (B, D), or evidence (B, D, C); for a batch of circuits also led by G. None: nothing is known.
        observed: bool, the shape of x without states; False: x does not say.
        head: an int, or a tensor (B,) ((G, B) for a batch of circuits).

    Returns:
        (B, D), or (D,) without x; for a batch of circuits led by G. Where x_v is observed it is f_v(x_v).

    Raises:
        ValueError: f has too few values or the wrong shape, Gaussian variables get a table, a row of x has probability
            zero, `observed` comes without x, or a graph is given in place of a circuit.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hclt([-1, 0, 1], num_latents=4, leaf=pc.Categorical(8)))
        >>> value = torch.arange(8.0).expand(3, 8)  # f_v(c) = c: conditional means
        >>> x, observed = torch.tensor([[5, 0, 2]]), torch.tensor([[True, False, True]])
        >>> mean = pc.expectation(circuit, value, x=x, observed=observed)
        >>> [round(found, 4) for found in mean[0, ::2].tolist()]  # what is observed is what it is
        [5.0, 2.0]
    """
    check_type("expectation: circuit", circuit, Circuit)
    if not isinstance(f, Tensor) and not callable(f):
        raise ValueError(
            f"expectation: f: expected a tensor (variables, values) or a function of (values, variables), got "
            f"{described(f)}"
        )
    if isinstance(f, Tensor) and (f.ndim != 2 or len(f) != circuit.num_variables):
        raise ValueError(
            f"f: expected shape (variables, values), with a row for each of the {circuit.num_variables} variables, got "
            f"{tuple(f.shape)}"
        )
    if x is None and observed is not None:
        raise ValueError("expectation: observed: says what of x is given, and there is no x")
    known, mask = nothing_observed(circuit, 1) if x is None else (x, observed)
    batch = circuit.prepare(known, mask)
    space = unit_posteriors(circuit, batch, head_index(circuit.engine, head, batch.size))
    tables = circuit.probabilities()
    out_VB = torch.zeros(circuit.num_circuits * circuit.num_variables, batch.size).to(space.inner)
    for number, layer in enumerate(circuit.engine.leaf_layers()):
        seen_FB = None if batch.observed is None else batch.observed[number]
        reached_FKB = layer.gradient_of(space.inner, 0, layer.num_folds)
        mean_FK = _mean(f, layer, tables)
        found_FB = torch.einsum("fkb,fk->fb", reached_FKB, mean_FK)
        if layer.group >= 0:
            given_FB = _at(f, layer, batch.values[number].to(circuit.dtype)) * reached_FKB.sum(1)
            found_FB = given_FB if seen_FB is None else torch.where(seen_FB, given_FB, found_FB)
        out_VB.index_add_(0, layer.columns, found_FB)
    circuit.engine.return_gradient_space(space)
    out_GBD = out_VB.view(circuit.num_circuits, circuit.num_variables, batch.size).transpose(1, 2)
    out = out_GBD if circuit.batched else out_GBD[0]
    return out if x is not None else out.select(-2, 0)


def _mean(f: Function, layer: InputLayer, tables: list[Tensor]) -> Tensor:
    """The expectation of f under every unit, (F, K)."""
    if layer.group < 0:
        states = torch.arange(layer.num_units, device=layer.variables.device).expand(layer.num_folds, -1)
        return _at(f, layer, states.to(tables[0].dtype))
    params_FKS = layer.parameters_of(tables[layer.group], 0, layer.num_folds)
    if isinstance(layer.distribution, Gaussian):
        points, weights = (torch.from_numpy(part).to(params_FKS) for part in np.polynomial.hermite_e.hermegauss(POINTS))
        values_FKN = params_FKS[..., :1] + params_FKS[..., 1:] * points
        return _at(f, layer, values_FKN.flatten(1)).view(values_FKN.shape) @ (weights / weights.sum())
    table_FKC = layer.distribution.probabilities(params_FKS)
    values_C = torch.arange(table_FKC.shape[2], device=table_FKC.device, dtype=table_FKC.dtype)
    return torch.einsum("fkc,fc->fk", table_FKC, _at(f, layer, values_C.expand(layer.num_folds, -1)))


def _at(f: Function, layer: InputLayer, values_FN: Tensor) -> Tensor:
    """f of values of the folds' variables, (F, N)."""
    variables_FN = layer.variables[:, None].expand(values_FN.shape)
    if not isinstance(f, Tensor):
        found = f(values_FN, variables_FN)
        if not isinstance(found, Tensor) or found.shape != values_FN.shape:
            raise ValueError("f: expected a function of (values, variables) to a tensor of their shape")
        return found.to(values_FN)
    _check_table(f, layer.distribution, layer.variables, layer.num_units)
    return f.to(values_FN)[variables_FN, values_FN.long()]


def _check_table(f_DC: Tensor, distribution: Distribution, variables: Tensor, num_units: int) -> None:
    variable = int(variables.max())
    wanted = num_units if distribution.is_evidence else distribution.num_outcomes
    if wanted is None:
        raise ValueError(f"f: variable {variable} is {distribution}, whose values no table can list; give a function")
    if f_DC.shape[1] < wanted:
        raise ValueError(
            f"f: expected shape (variables, values) with {wanted} values for variable {variable}, got "
            f"{tuple(f_DC.shape)}"
        )

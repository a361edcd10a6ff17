"""Hidden Markov models."""

from __future__ import annotations

import torch

from lvd_lightning.circuits.checks import check_counts, check_generator, check_leaf, described, float_type
from lvd_lightning.circuits.distributions import Categorical, Distribution
from lvd_lightning.circuits.graph import CircuitGraph
from lvd_lightning.circuits.structures.drawing import add_leaf, add_mixture

__all__ = ["hmm"]


def hmm(
    length: int,
    num_states: int,
    num_tokens: int | None = None,
    homogeneous: bool = False,
    num_heads: int = 1,
    *,
    leaf: Distribution | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype | None = None,
) -> CircuitGraph:
    r"""Hidden Markov model over sequences of one length.

    .. math:: p(x) = \sum_z p(z_0) \prod_{t \ge 1} p(z_t | z_{t-1}) \prod_t p(x_t | z_t)

    A circuit computes it from the last token to the first. Parameters are drawn at random.

    Args:
        length: tokens in a sequence; variable t is the token at position t.
        num_states: states of every z_t.
        num_tokens: size of the vocabulary; tokens are categorical.
        homogeneous: one transition matrix and one table of emissions for all positions (tied nodes), instead of
            `length - 1` and `length` of them.
        num_heads: rows p(z_0 | head), which share everything else.
        leaf: input distribution of every position, in place of `num_tokens`.
        generator: on the CPU.
        dtype: of all parameters, float32 or float64; the default type if not given.

    Returns:
        The graph; `latents[t]` is the node whose unit k stands for z_t = k.

    Raises:
        ValueError: a count that is no whole number of at least 1, a leaf that is no distribution, not exactly one of
            `num_tokens` and `leaf`, or a generator or type of another kind.

    References:
        Rabiner, A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition, 1989; as a circuit
        for language, Liu, Zhang and Van den Broeck, Scaling Up Probabilistic Circuits by Latent Variable Distillation,
        2023 (arXiv 2210.04398), section 2.

    Example:
        >>> import torch
        >>> import lvd_lightning.circuits as pc
        >>> circuit = pc.Circuit(pc.hmm(length=5, num_states=2, num_tokens=10, homogeneous=True))
        >>> circuit.num_parameters  # two emissions, one transition matrix, the first state
        21
        >>> circuit.log_prob(torch.tensor([[3, 1, 4, 1, 5]])).shape
        torch.Size([1, 1])
    """
    check_counts("hmm", length=length, num_states=num_states, num_heads=num_heads)
    if (num_tokens is None) == (leaf is None):
        raise ValueError(f"hmm: give either num_tokens or leaf, got num_tokens={num_tokens} and leaf={leaf}")
    if isinstance(num_tokens, Distribution):
        raise ValueError(
            f"hmm: num_tokens: got {described(num_tokens)}, expected a whole number; give a distribution as leaf=..."
        )
    if num_tokens is not None:
        check_counts("hmm", num_tokens=num_tokens)
        leaf = Categorical(num_tokens)
    check_leaf("hmm: leaf", leaf)
    assert leaf is not None
    dtype = float_type("hmm", dtype)
    check_generator("hmm", generator)
    graph = CircuitGraph()
    emission = transition = None
    for t in reversed(range(length)):
        token = add_leaf(graph, t, leaf, num_states, generator=generator, dtype=dtype, like=emission)
        factors = [token]
        if t + 1 < length:
            later = [graph.latents[t + 1]]
            factors.append(add_mixture(graph, later, num_states, generator=generator, dtype=dtype, like=transition))
        graph.latents[t] = graph.add_product(factors)
        if homogeneous:
            emission = token if emission is None else emission
            transition = factors[1] if transition is None and len(factors) > 1 else transition
    add_mixture(graph, [graph.latents[0]], num_heads, generator=generator, dtype=dtype)
    return graph

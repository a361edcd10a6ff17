"""Missing words of a text under a hidden Markov model: samples, the best guess, the word that comes next.

Shapes: B sequences, L tokens of one, K states, V words, N samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lvd_lightning.checks import check_counts
from lvd_lightning.models.language import HiddenMarkovModel

__all__ = ["Completions", "best_completion", "next_word", "sampled_completions", "states_before"]


@dataclass(frozen=True)
class Completions:
    """Sequences whose missing words were filled in.

    tokens_NL: the sequences.
    log_prob_N: log p(the words that were missing | those that were there), in nats.
    """

    tokens_NL: Tensor
    log_prob_N: Tensor


@torch.no_grad()
def sampled_completions(
    model: HiddenMarkovModel,
    x: Tensor,
    observed: Tensor,
    num_samples: int = 1,
    generator: torch.Generator | None = None,
) -> Completions:
    """Exact samples of the missing words given the others, and how likely each is.

    Args:
        model: of windows of T tokens.
        x: int (L,), L at most T; where a word is missing it may hold anything.
        observed: bool (L,); False: the word is missing.
        num_samples: how many, N.
        generator: on the model's device.

    Raises:
        ValueError: a sequence longer than T, a token that there is none of, or words that cannot come together.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10)))
        >>> x, observed = torch.tensor([7, 0, 2]), torch.tensor([True, False, True])
        >>> found = sampled_completions(model, x, observed, num_samples=5)
        >>> found.tokens_NL.shape, bool((found.log_prob_N < 0).all())
        (torch.Size([5, 3]), True)
    """
    check_counts(num_samples=num_samples)
    rows, masks = _row(x, observed, num_samples)
    filled, mask = model.padded(rows, masks)
    drawn_NT = model.circuit.sample(x=filled, observed=masks if mask is None else mask, generator=generator)
    tokens_NL = drawn_NT[:, : len(x)]
    return Completions(tokens_NL, _given(model, tokens_NL, rows, masks))


@torch.no_grad()
def best_completion(model: HiddenMarkovModel, x: Tensor, observed: Tensor) -> Completions:
    """The missing words of the likeliest words and states together (max-product): one completion.

    With states summed out other words may be likelier still: to find those takes time exponential in the words that are
    missing. The log-probability is that of the words, with states summed out. Arguments as in `sampled_completions`.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10)))
        >>> best_completion(model, torch.tensor([7, 0]), torch.tensor([True, False])).tokens_NL[0, 0]
        tensor(7)
    """
    rows, masks = _row(x, observed, 1)
    missing = model.length - len(x)
    if missing and len(x):  # what follows the sequence is summed out, not maximised with it
        tokens_NL = _viterbi(model, rows[0], masks[0])[None]
    else:
        tokens_NL = model.circuit.mpe(rows, observed=masks)[0]
    return Completions(tokens_NL, _given(model, tokens_NL, rows, masks))


@torch.no_grad()
def next_word(model: HiddenMarkovModel, context: Tensor) -> Tensor:
    """p(the next word = v | those before it), (B, V), in double precision; rows sum to one.

    Args:
        model: of windows of T tokens; the context stands at the beginning of one.
        context: int (B, L), L from 0 to T - 1; of a homogeneous model any number: the state is carried on.

    Raises:
        ValueError: a context that leaves no room for a next word, or words that cannot come together.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> model = HiddenMarkovModel(pc.Circuit(pc.hmm(length=4, num_states=3, num_tokens=10)))
        >>> next_word(model, torch.tensor([[7, 0, 2]])).shape
        torch.Size([1, 10])
    """
    state_BK = states_before(model, context)
    emission_SKV = model.tables().emission_SKV
    place = 0 if model.homogeneous else context.shape[1]
    return state_BK @ emission_SKV[place].double()


@torch.no_grad()
def states_before(model: HiddenMarkovModel, context: Tensor) -> Tensor:
    """p(the state of the next word = k | the words before it), (B, K), in double precision; see `next_word`."""
    if context.ndim != 2 or (not model.homogeneous and context.shape[1] >= model.length):
        raise ValueError(
            f"context: got shape {tuple(context.shape)}, expected (batch, fewer than {model.length} words), to "
            "leave room for the next one"
        )
    if context.numel() and not (int(context.min()) >= 0 and int(context.max()) < model.num_tokens):
        raise ValueError(f"context: got {int(context.min())}..{int(context.max())}, expected 0..{model.num_tokens - 1}")
    tables = model.tables()
    state_BK = tables.initial_K.double().expand(len(context), -1)
    for t in range(context.shape[1]):
        place = 0 if model.homogeneous else t
        joint_BK = state_BK * tables.emission_SKV[place].T[context[:, t]].double()
        total_B1 = joint_BK.sum(1, keepdim=True)
        if not bool((total_B1 > 0).all()):
            raise ValueError("context: a row has probability zero, so nothing can be told of what follows it")
        state_BK = (joint_BK / total_B1) @ tables.transition_SKK[place].double()
    return state_BK


def _row(x: Tensor, observed: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if x.ndim != 1 or observed.shape != x.shape:
        raise ValueError(f"x, observed: got shapes {tuple(x.shape)} and {tuple(observed.shape)}, expected (L,) both")
    return x.expand(count, -1), observed.expand(count, -1)


def _given(model: HiddenMarkovModel, tokens_NL: Tensor, rows: Tensor, masks: Tensor) -> Tensor:
    """log p(missing words | the others), (N,)."""
    return model.log_prob(tokens_NL) - model.log_prob(rows[:1], masks[:1])


def _viterbi(model: HiddenMarkovModel, x_L: Tensor, observed_L: Tensor) -> Tensor:
    """The words of the best words and states of a sequence shorter than the window, (L,)."""
    model.log_prob(x_L[None], observed_L[None])  # for its checks
    tables, best = model.tables(), []
    score_K, back = tables.initial_K.double().log(), []
    for t in range(len(x_L)):
        place = 0 if model.homogeneous else t
        if t:
            step_KK = score_K[:, None] + tables.transition_SKK[0 if model.homogeneous else t - 1].double().log()
            score_K, origin_K = step_KK.max(0)
            back.append(origin_K)
        emission_KV = tables.emission_SKV[place].double().log()
        value_K, word_K = emission_KV.max(1)
        if bool(observed_L[t]):
            value_K, word_K = emission_KV[:, x_L[t]], x_L[t].expand(model.num_states).long()
        score_K = score_K + value_K
        best.append(word_K)
    if not bool(score_K.max() > -torch.inf):
        raise ValueError("x: has probability zero, so nothing can be conditioned on it")
    states = [int(score_K.argmax())]
    for origin_K in reversed(back):
        states.append(int(origin_K[states[-1]]))
    return torch.stack([word_K[state] for word_K, state in zip(best, reversed(states), strict=True)])

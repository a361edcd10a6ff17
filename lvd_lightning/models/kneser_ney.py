"""An n-gram model with modified Kneser-Ney smoothing: what a model of words has to be compared with.

Shapes: N windows, T positions, V words, C contexts, G n-grams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lvd_lightning.checks import check_counts, expect

__all__ = ["KneserNey"]

#: Something is always left to words that never came, however few there are to estimate it from.
LEAST_DISCOUNT = 0.05


@dataclass(frozen=True)
class _Smoothed:
    """Counts of one order as probabilities: n-gram g has share_G[g], context c leaves rest_C[c] to the order below."""

    share_G: np.ndarray
    rest_C: np.ndarray


class KneserNey:
    r"""p(x_t | the words before it in the window), interpolated over orders 1 to n, each discounted.

    .. math:: p(w | c) = (n(c, w) - D(n(c, w))) / n(c) + \gamma(c) p(w | c')

    c' is the context c without its first word. D is one number for n-grams seen once, one for those seen twice and one
    for those seen more often, estimated from how many there are of each. Below the highest order an n-gram counts the
    different words that come before it, not how often it comes. A context is cut where its window begins: there the
    longest one that is left is the highest order, and has its plain counts. Below order 1 all words are equally likely.

    Args:
        x: training tokens, int (N, T): windows, or one row that is the whole text (which counts no n-gram twice).
        vocabulary: V, words 0..V-1.
        order: n, words of an n-gram.

    Raises:
        ValueError: tokens outside the vocabulary or of another shape, or an order below 1.

    References:
        Kneser and Ney, 1995; Chen and Goodman, An Empirical Study of Smoothing Techniques for Language Modeling, 1999.

    Example:
        >>> text = torch.tensor([[0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 3]])
        >>> model = KneserNey(text, vocabulary=4, order=3)
        >>> next_word = model.next_word(torch.tensor([0, 1]))
        >>> int(next_word.argmax()), f"{next_word.sum():.6f}"
        (2, '1.000000')
    """

    def __init__(self, x: Tensor, vocabulary: int, order: int) -> None:
        check_counts(vocabulary=vocabulary, order=order)
        self.vocabulary, self.order = vocabulary, order
        x_NT = self._checked(x)
        expect(x_NT.size > 0, "x", tuple(x.shape), "at least one token")
        self._keys: list[
            np.ndarray
        ] = []  # of order k at k - 1: context * V + word, sorted; its place is the n-gram's id
        self._plain: list[_Smoothed] = []
        self._continued: list[_Smoothed] = []
        before_NT = np.zeros_like(x_NT)  # ids of the contexts: of order 0 there is one
        lower: np.ndarray | None = None
        found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        for k in range(1, min(order, x_NT.shape[1]) + 1):
            key = before_NT[:, k - 1 :] * vocabulary + x_NT[:, k - 1 :]
            keys, place, counts = np.unique(key, return_inverse=True, return_counts=True)
            place = place.reshape(key.shape)
            if lower is not None:  # different words before every n-gram of the order below
                suffix_G = np.empty(len(keys), np.int64)
                suffix_G[place] = lower[:, 1:]
                kinds = np.bincount(suffix_G, minlength=len(found[-1][0]))
                self._continued.append(self._smoothed(found[-1][0], kinds))
            self._keys.append(keys)
            self._plain.append(self._smoothed(keys, counts))
            found.append((keys, counts, place))
            lower = place
            before_NT = np.zeros_like(x_NT)
            before_NT[:, k:] = place[:, :-1]  # the n-gram that ends before a word is its context

    def log_prob(self, x: Tensor) -> Tensor:
        """log p of windows in nats, float64 (N,); x: int (N, T), of any T.

        Raises:
            ValueError: tokens outside the vocabulary, or of another shape.
        """
        x_NT = self._checked(x)
        return torch.from_numpy(np.log(self._probabilities(x_NT)).sum(1))

    def next_word(self, context: Tensor) -> Tensor:
        """p(w | the context) of every word, float64 (V,); context: int (L,), all that the window holds so far."""
        words = torch.arange(self.vocabulary)[:, None]
        x_VT = torch.cat([context.long().expand(self.vocabulary, -1), words], 1)
        return torch.from_numpy(self._probabilities(self._checked(x_VT))[:, -1])

    @property
    def num_parameters(self) -> int:
        """N-grams that have a probability of their own, over all orders."""
        return sum(map(len, self._keys))

    def _probabilities(self, x_NT: np.ndarray) -> np.ndarray:
        """p of every token given those before it, (N, T)."""
        out_NT = np.empty(x_NT.shape)
        continued_NT = np.full(x_NT.shape, 1 / self.vocabulary)
        before_NT = np.zeros_like(x_NT)  # -1: a context that never came
        for k, keys in enumerate(self._keys, start=1):
            at = (slice(None), slice(k - 1, None))
            context, word = before_NT[at], x_NT[at]
            key = context * self.vocabulary + word
            place = np.minimum(np.searchsorted(keys, key), len(keys) - 1)
            place = np.where((context >= 0) & (keys[place] == key), place, -1)
            plain = _interpolated(self._plain[k - 1], context, place, continued_NT[at])
            # The longest context that there is stands at the first k - 1 words, and at all others the order is n.
            last = k == len(self._keys)
            out_NT[:, k - 1 : None if last else k] = plain if last else plain[:, :1]
            if not last:
                continued_NT[at] = _interpolated(self._continued[k - 1], context, place, continued_NT[at])
                before_NT = np.full_like(x_NT, -1)
                before_NT[:, k:] = place[:, :-1]
        return out_NT

    def _smoothed(self, keys: np.ndarray, counts: np.ndarray) -> _Smoothed:
        """Discounted counts of n-grams (G,) as shares of their contexts' sums, and what is left to the order below."""
        discount_G = _discounts(counts)[np.minimum(counts, 3)]
        context_G = keys // self.vocabulary
        total_C = np.bincount(context_G, counts)
        taken_C = np.bincount(context_G, discount_G)
        share_G = (counts - discount_G) / np.maximum(total_C, 1)[context_G]
        return _Smoothed(share_G, np.where(total_C > 0, taken_C / np.maximum(total_C, 1), 1.0))

    def _checked(self, x: Tensor) -> np.ndarray:
        if x.ndim != 2 or x.is_floating_point():
            raise ValueError(f"x: got {x.dtype} {tuple(x.shape)}, expected whole numbers (windows, tokens)")
        x_NT = x.cpu().long().numpy()
        if x_NT.size and not (x_NT.min() >= 0 and x_NT.max() < self.vocabulary):
            raise ValueError(f"x: got tokens {x_NT.min()}..{x_NT.max()}, expected 0..{self.vocabulary - 1}")
        return x_NT


def _interpolated(smoothed: _Smoothed, context: np.ndarray, place: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """Shares of n-grams (-1: never seen) and what their contexts (-1 likewise) leave, times the order below."""
    share = np.where(place >= 0, smoothed.share_G[place], 0.0)
    known = (context >= 0) & (context < len(smoothed.rest_C))
    rest = np.where(known, smoothed.rest_C[np.where(known, context, 0)], 1.0)
    return share + rest * lower


def _discounts(counts: np.ndarray) -> np.ndarray:
    """What is taken from counts of 0, 1, 2 and 3 or more (Chen and Goodman), never more than the count itself.

    Where too few n-grams came once or twice to say, a half of every count of one and three quarters of others.
    """
    n1, n2, n3, n4 = (int((counts == number).sum()) for number in (1, 2, 3, 4))
    if min(n1, n2) == 0:
        return np.array([0.0, 0.5, 0.75, 0.75])
    y = n1 / (n1 + 2 * n2)
    found = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / max(n3, 1) if n3 else 0.75]
    return np.clip(found, [0.0, *[LEAST_DISCOUNT] * 3], [0.0, 1.0, 2.0, 3.0])

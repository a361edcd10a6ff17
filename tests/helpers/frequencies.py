"""Whether samples come as often as they should."""

from __future__ import annotations

import numpy as np
from scipy import stats
from torch import Tensor

__all__ = ["assert_frequencies"]


def assert_frequencies(sample: Tensor, worlds: Tensor, probabilities: np.ndarray) -> None:
    """A chi-square test; the seed is fixed, so it never fails by chance once it has passed."""
    matches = (sample[:, None] == worlds[None]).all(2)
    assert matches.any(1).all(), "a sample lies outside the support"
    counts = matches.sum(0).numpy()
    assert not counts[probabilities == 0].any(), "an impossible world was drawn"
    expected = probabilities * len(sample)
    rare = expected < 5  # the approximation wants five expected samples per cell
    counts = np.append(counts[~rare], counts[rare].sum())
    expected = np.append(expected[~rare], expected[rare].sum())
    counts, expected = counts[expected > 0], expected[expected > 0]
    if len(counts) > 1:
        assert stats.chisquare(counts, expected).pvalue > 1e-3

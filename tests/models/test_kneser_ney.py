"""n-grams: distributions that sum to one, against a plain version with dictionaries."""

from collections import Counter

import pytest
import torch

from lvd_lightning.models.kneser_ney import KneserNey, _discounts

V = 9


def windows(count: int = 30, length: int = 7) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, length, generator=generator).abs() * 3).long().clamp_max(V - 1)


def plain(rows: list[list[int]], order: int, context: list[int], word: int) -> float:
    """p(word | context) from dictionaries, the context cut to order - 1 words."""
    tables: dict[tuple[int, bool], Counter] = {}
    for k in range(1, order + 1):
        grams = Counter(tuple(row[i : i + k]) for row in rows for i in range(len(row) - k + 1))
        tables[k, True] = grams
        if k > 1:
            tables[k - 1, False] = Counter(gram[1:] for gram in grams)

    def p(k: int, raw: bool, before: tuple[int, ...]) -> float:
        if k == 0:
            return 1 / V
        counts = tables[k, raw]
        discount = _discounts(__import__("numpy").array([counts[gram] for gram in tables[k, True]]))
        lower = p(k - 1, False, before[1:])
        following = [(gram[-1], count) for gram, count in counts.items() if gram[:-1] == before and count]
        total = sum(count for _, count in following)
        if total == 0:
            return lower
        own = dict(following).get(word, 0)
        left = sum(discount[min(count, 3)] for _, count in following)
        return (own - discount[min(own, 3)]) / total + left / total * lower

    k = min(order, len(context) + 1)
    return p(k, True, tuple(context[len(context) - k + 1 :]))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_against_dictionaries(order: int) -> None:
    x = windows()
    model = KneserNey(x, V, order)
    for row in ([0, 1, 2, 0, 8, 1, 1], [3, 3, 8, 8, 8, 0, 2]):
        wanted = [plain(x.tolist(), order, row[:t], row[t]) for t in range(7)]
        found = model.log_prob(torch.tensor([row]))
        assert float(found) == pytest.approx(float(torch.tensor(wanted, dtype=torch.float64).log().sum()), rel=1e-9)


@pytest.mark.parametrize("order", [3, 5])
@pytest.mark.parametrize("text", [windows(), windows().view(1, -1)], ids=["windows", "stream"])
def test_the_next_word_is_one_of_all(order: int, text: torch.Tensor) -> None:
    model = KneserNey(text, V + 2, order)  # two words never came
    for context in ([], [0], [0, 1], [10, 0, 1], [0, 1, 2, 3, 0, 1]):
        next_word = model.next_word(torch.tensor(context, dtype=torch.int64))
        assert float(next_word.sum()) == pytest.approx(1.0, abs=1e-12)
        assert float(next_word.min()) > 0


def test_contexts_are_cut_at_the_window() -> None:
    """The first word of a window is told by its frequency, whatever the text held before."""
    x = windows()
    model = KneserNey(x, V, 3)
    assert model.next_word(torch.tensor([], dtype=torch.int64)) == pytest.approx(
        KneserNey(x, V, 1).next_word(torch.tensor([1, 2])), rel=1e-12
    )


def test_higher_orders_know_a_text_better() -> None:
    text = torch.arange(6).repeat(40)[None]
    likelihoods = [float(KneserNey(text, 6, order).log_prob(text[:, :20])) for order in (1, 2, 3)]
    assert likelihoods[0] < likelihoods[1] - 10
    assert likelihoods[2] > -10


def test_words_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: got tokens 0..8, expected 0..4"):
        KneserNey(windows(), 5, 3)

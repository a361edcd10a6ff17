"""Every check names the setting."""

import math
from collections.abc import Callable
from typing import Any

import pytest

from lvd_lightning.checks import check_above, check_at_least, check_between, check_choice, check_counts, check_share


@pytest.mark.parametrize(
    ("check", "good", "bad", "expected"),
    [
        (check_counts, [1, 7], [0, -1, 2.5, True, "3"], "a whole number of at least 1"),
        (lambda **settings: check_at_least(0, **settings), [0, 0.5], [-1, math.nan], "at least 0"),
        (lambda **settings: check_above(0, **settings), [0.5], [0, -1, math.nan], "more than 0"),
        (lambda **settings: check_between(0, 1, **settings), [0, 0.5, 1], [-0.1, 1.1, math.nan], "0 to 1"),
        (check_share, [0, 0.99], [1, -0.1, math.nan], "at least 0 and less than 1"),
        (lambda **settings: check_choice(("a", "b"), **settings), ["a", "b"], ["c", ""], "one of a, b"),
    ],
)
def test_a_wrong_setting_is_named_with_what_came_and_what_was_expected(
    check: Callable[..., None], good: list[Any], bad: list[Any], expected: str
) -> None:
    check(left_away=None)
    for value in good:
        check(setting=value)
    for value in bad:
        with pytest.raises(ValueError) as caught:
            check(fine=good[0], setting=value)
        assert str(caught.value) == f"setting: got {value!r}, expected {expected}"

"""Temperatures over steps."""

from typing import Any

import pytest

import lvd_lightning.circuits as pc


def test_it_falls_by_equal_factors_or_amounts_and_stays_at_the_end() -> None:
    factors = pc.TemperatureSchedule(2.0, 0.5)
    assert [factors(step, 3) for step in (0, 1, 2, 9)] == pytest.approx([2.0, 1.0, 0.5, 0.5])
    amounts = pc.TemperatureSchedule(2.0, 0.5, "linear")
    assert [amounts(step, 4) for step in range(5)] == pytest.approx([2.0, 1.5, 1.0, 0.5, 0.5])
    assert pc.TemperatureSchedule(0.7, 0.7)(3, 10) == pytest.approx(0.7)
    assert pc.TemperatureSchedule(2.0, 0.5)(0, 1) == 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"start": 0.0}, "start: got 0.0"),
        ({"end": float("nan")}, "end: got nan"),
        ({"shape": "cosine"}, "shape: got 'cosine', expected exponential or linear"),
    ],
)
def test_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pc.TemperatureSchedule(**settings)

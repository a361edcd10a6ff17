"""How the temperature of Gumbel-softmaxes falls over the steps of training."""

from __future__ import annotations

from dataclasses import dataclass

from lvd_lightning.circuits.checks import check_number

__all__ = ["TemperatureSchedule"]


@dataclass(frozen=True)
class TemperatureSchedule:
    """The temperature to give `Circuit.rsample` in every step: from `start` to `end`, and `end` from then on.

    At a high temperature gradients have a small variance and a large bias, at a low one it is the other way round, so
    that training begins warm and ends cold.

    Args:
        start, end: temperatures, above 0.
        shape: "exponential", by the same factor in every step, or "linear", by the same amount.

    Raises:
        ValueError: a temperature that is not above 0, or another shape.

    References:
        Jang, Gu, Poole, Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, section 2.2, anneals it.

    Example:
        >>> import lvd_lightning.circuits as pc
        >>> schedule = pc.TemperatureSchedule(start=1.0, end=0.25)
        >>> [schedule(step, num_steps=5) for step in (0, 2, 4, 100)]
        [1.0, 0.5, 0.25, 0.25]
    """

    start: float = 1.0
    end: float = 1.0
    shape: str = "exponential"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            check_number(f"TemperatureSchedule: {name}", getattr(self, name), 0, above_low=True)
        if self.shape not in ("exponential", "linear"):
            raise ValueError(f"TemperatureSchedule: shape: got {self.shape!r}, expected exponential or linear")

    def __call__(self, step: int, num_steps: int) -> float:
        """The temperature of step `step`, from 0, of `num_steps`."""
        share = min(1.0, step / max(1, num_steps - 1))
        if self.shape == "linear":
            return self.start + share * (self.end - self.start)
        return float(self.start * (self.end / self.start) ** share)

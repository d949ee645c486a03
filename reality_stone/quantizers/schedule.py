"""How a temperature falls from one value to another."""

from __future__ import annotations

import math
from dataclasses import dataclass

LAWS = ("exponential", "linear", "cosine")


def positive(value: float, what: str) -> float:
    """A temperature or a step, as a float."""
    if isinstance(value, (int, float)) and value > 0 and math.isfinite(value):
        return float(value)
    raise ValueError(f"{what} must be positive and finite, got {value!r}")


@dataclass(frozen=True)
class TauSchedule:
    """tau at each training step: `start` at step 0, `end` from `steps` on.

    >>> TauSchedule(1.0, 0.01, 100)(50)
    0.1
    """

    start: float
    end: float
    steps: int
    law: str = "exponential"

    def __post_init__(self):
        positive(self.start, "tau")
        positive(self.end, "tau")
        if not (isinstance(self.steps, int) and self.steps > 0):
            raise ValueError(f"the steps of a schedule must be 1 or more, got {self.steps!r}")
        if self.law not in LAWS:
            raise ValueError(f"law must be {', '.join(LAWS[:-1])} or {LAWS[-1]}, got {self.law!r}")

    def __call__(self, step: int) -> float:
        way = min(max(step, 0), self.steps) / self.steps
        if self.law == "exponential":
            return self.start * (self.end / self.start) ** way
        if self.law == "cosine":
            way = 0.5 * (1 - math.cos(math.pi * way))
        return self.start + (self.end - self.start) * way

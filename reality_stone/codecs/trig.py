"""Cosine and sine of rational turns in float64: the operations of csrc/trig.h, so the same bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_COSINE = [(-1.0) ** n / math.factorial(2 * n) for n in range(9)]
_SINE = [(-1.0) ** n / math.factorial(2 * n + 1) for n in range(9)]


def turn_cosine(k: Tensor, n: int) -> Tensor:
    """cos(2 pi k / n) for integers k of any sign and n a multiple of 4."""
    k = k.long() % n
    k = torch.where(2 * k > n, n - k, k)
    negative = 4 * k > n
    k = torch.where(negative, n // 2 - k, k)
    unit = 6.283185307179586 / n
    high = 8 * k > n
    x = torch.where(high, n // 4 - k, k).double() * unit
    value = torch.where(high, _series(x, _SINE) * x, _series(x, _COSINE))
    return torch.where(negative, -value, value)


def turn_sine(k: Tensor, n: int) -> Tensor:
    """sin(2 pi k / n), as turn_cosine."""
    return turn_cosine(k.long() % n + n - n // 4, n)


def _series(x: Tensor, coefficients: list[float]) -> Tensor:
    y = x * x
    total = torch.full_like(y, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        total = total * y + c
    return total

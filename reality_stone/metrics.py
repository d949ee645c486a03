"""How far a decoded matrix is from the original."""

from __future__ import annotations

import math

from torch import Tensor


def nmse(a: Tensor, b: Tensor) -> float:
    """|a - b|^2 / |b|^2; 0 when both are zero."""
    power = b.double().pow(2).sum().item()
    error = (a.double() - b.double()).pow(2).sum().item()
    return error / power if power else (0.0 if error == 0 else math.inf)


def rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference, in the unit of the weights."""
    return math.sqrt((a.double() - b.double()).pow(2).mean().item())


def squared_error(a: Tensor, b: Tensor, importance: Tensor | None = None) -> float:
    """Sum of (a - b)^2, each column weighed by `importance` (columns,); in float64."""
    error = (a.double() - b.double()).pow(2)
    return (error if importance is None else error * importance).sum().item()


def hessian_nmse(a: Tensor, b: Tensor, hessian: Tensor) -> float:
    """tr (a-b) H (a-b)^T / tr b H b^T: the relative error of the layer's output, H = E[x x^T]."""
    h = hessian.to(a.device, a.dtype)
    power = ((b @ h) * b).sum().item()
    e = a - b
    return ((e @ h) * e).sum().item() / power if power > 0 else math.inf


def shannon_db(error: float, bits: float) -> float:
    """Distance of a normalised error from the Gaussian bound 2^(-2 bits), in dB."""
    return 10 * math.log10(error) + 20 * bits * math.log10(2) if error > 0 else -math.inf

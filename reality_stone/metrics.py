"""How far a decoded matrix or a compressed model is from the original, and what it takes to store.

Functions take (decoded, original).
"""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional

from .packed import Packed, storage_bits


def nmse(a: Tensor, b: Tensor) -> float:
    """|a - b|^2 / |b|^2; 0 when both are zero."""
    power = b.double().pow(2).sum().item()
    error = (a.double() - b.double()).pow(2).sum().item()
    return error / power if power else (0.0 if error == 0 else math.inf)


def rmse(a: Tensor, b: Tensor) -> float:
    """Root of the mean squared difference, in the unit of the weights."""
    return math.sqrt((a.double() - b.double()).pow(2).mean().item())


def psnr(a: Tensor, b: Tensor) -> float:
    """20 log10 (peak / rmse) in dB, peak the largest magnitude of b; infinite where a equals b."""
    error = rmse(a, b)
    peak = b.abs().max().double().item()
    if error == 0:
        return math.inf
    return 20 * math.log10(peak / error) if peak else -math.inf


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of two matrices seen as images, at most 1.

    Uniform windows of 7 x 7 that lie inside, sample covariances, K1 = .01, K2 = .03, and the data
    range that of b (Wang, Bovik, Sheikh and Simoncelli, 2004). ValueError below 7 x 7.
    """
    if a.shape != b.shape or a.dim() != 2 or min(a.shape) < 7:
        raise ValueError(
            f"ssim takes two matrices of one shape of at least 7 x 7, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}"
        )
    a, b = a.double(), b.double()
    spread = (b.max() - b.min()).item() or 1.0
    c1, c2, sample = (0.01 * spread) ** 2, (0.03 * spread) ** 2, 49 / 48

    def mean(x: Tensor) -> Tensor:
        return functional.avg_pool2d(x[None], 7, stride=1)[0]

    ma, mb = mean(a), mean(b)
    va, vb = sample * (mean(a * a) - ma * ma), sample * (mean(b * b) - mb * mb)
    together = sample * (mean(a * b) - ma * mb)
    top = (2 * ma * mb + c1) * (2 * together + c2)
    return (top / ((ma * ma + mb * mb + c1) * (va + vb + c2))).mean().item()


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


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) in nats of each position (...), from log-probabilities (..., classes)."""
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def stored(thing: Packed | nn.Module) -> tuple[int, int]:
    """(bits, weights) of a packed matrix, or of all compressed layers of a module: everything that
    is stored for them, a table that several layers share once. ValueError where there is none."""
    if isinstance(thing, Packed):
        return thing.bits, thing.shape[0] * thing.shape[1]
    layers = [m for m in thing.modules() if isinstance(getattr(m, "packed", None), Packed)]
    if not layers:
        raise ValueError("there is no compressed layer in this module")
    tensors = {id(t): t.detach() for layer in layers for t in (layer.codes, *layer.params)}
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    return sum(storage_bits(t) for t in tensors.values()), weights


def bits_per_weight(thing: Packed | nn.Module) -> float:
    """Stored bits over the logical number of weights; see `stored`."""
    bits, weights = stored(thing)
    return bits / max(1, weights)


def compression_ratio(thing: Packed | nn.Module, dense_bits: int = 16) -> float:
    """How many times smaller than dense weights of `dense_bits` bits each; see `stored`."""
    return dense_bits / bits_per_weight(thing)

"""Where a bitfield's shared params start: basis lines, the range of radii, the basis' length."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..fitting import axes, evenly
from .radial import LARGEST_RADIUS, LEAST_RADIUS

SAMPLE = 1 << 13  # blocks that lines are fitted to
FACTORS = 1 << 10  # factors that the range of radii is fitted to
ROUNDS = 8
SMOOTHING = 0.1  # of r_max from round to round: its exponential moving average
SPANNED = 7 * 2.0**-24  # sine of an angle that a few roundings to float32 make
TARGET_USE = 0.5  # of the range of amplitudes, on average over the codes


def fit_basis(
    inner: Tensor,
    block: int,
    count: int,
    kind: str,
    seed: int,
    importance: Tensor | None,
    exact: bool,
) -> Tensor:
    """Unit vectors (count, block) along the blocks of the rows of `inner` (out, in)."""
    if importance is not None:
        inner = inner * (importance / importance.max()).sqrt()
    points = _blocks(inner, block)
    if exact:
        lines = spanning_lines(_every(points, SAMPLE), count)
        lines = lines if lines is None else spanning_lines(points, count)
        if lines is not None:
            return lines
    points = _every(points, SAMPLE)
    return axes(points, count, seed, 10) if kind == "kmeans" else _frames(points, count, seed)


def _blocks(inner: Tensor, block: int) -> Tensor:
    padded = torch.nn.functional.pad(inner, (0, -inner.shape[1] % block))
    return padded.reshape(-1, block)


def _every(x: Tensor, limit: int) -> Tensor:
    """At most `limit` of x's first dimension, evenly spaced."""
    return x[evenly(len(x), limit)]


def spanning_lines(points: Tensor, count: int) -> Tensor | None:
    """Unit vectors (count, d) such that each of points (n, d) lies along one, or None where no
    `count` lines do: the point farthest from all lines so far gives the next one. Those that are
    not needed are zero."""
    points = points[points.abs().amax(1) > 0]
    unit = (points / points.abs().amax(1, keepdim=True)).double()
    unit = unit / unit.norm(dim=1, keepdim=True)
    lines = torch.zeros(count, points.shape[1], dtype=torch.float64)
    off = torch.ones(len(unit), dtype=torch.float64)  # sine of the angle to the nearest line
    for k in range(count):
        if not len(unit) or off.max() < SPANNED:
            return lines.float()
        lines[k] = unit[off.argmax()]
        off = torch.minimum(off, (unit - (unit @ lines[k])[:, None] * lines[k]).norm(dim=1))
    return lines.float() if off.max() < SPANNED else None


def _frames(points: Tensor, count: int, seed: int) -> Tensor:
    """Orthonormal frames of clusters of points, by singular value decomposition."""
    size = points.shape[1]
    clusters = -(-count // size)
    centres = axes(points, clusters, seed, 10)
    nearest = (points @ centres.t()).abs().argmax(1)
    generator = torch.Generator().manual_seed(seed)
    rows = min(size, count)
    frames = []
    for cluster in range(clusters):
        own = points[nearest == cluster].double()
        principal = torch.linalg.svd(own, full_matrices=False).Vh[:rows]
        more = torch.randn(rows, size, generator=generator, dtype=torch.float64)
        # QR keeps what is orthonormal already and completes it to a frame.
        completed = torch.linalg.qr(torch.cat((principal, more)).t()).Q.t()[:rows]
        side = torch.where(completed.sum(1, keepdim=True) < 0, -1.0, 1.0)
        frames.append((completed * side).float())
    return torch.cat(frames)[:count]


def fit_range(
    inner: Tensor,
    lines: Tensor,
    table: Callable[[float], tuple[np.ndarray, np.ndarray]],
    r_max: float,
    cover: bool,
    byte: bool,
) -> tuple[float, float, bool]:
    """(r_max, length of the basis vectors, whether factors have both signs).

    Each round moves r_max toward the value at which amplitudes are used evenly, with the length
    that quantizes best there; the best round counts. A given r_max stays. `cover`: the largest
    factor must be inside the table. `byte`: amplitudes have 8 bits and not 10.
    """
    top = 255 if byte else 1023
    points = _blocks(inner, lines.shape[1])
    along = (points if cover else _every(points, FACTORS)) @ lines.t()
    factors = along.gather(1, along.abs().argmax(1, keepdim=True))[:, 0].numpy()
    peak = max(float(abs(factors).max()), 1e-30)
    factors = factors[:: max(1, len(factors) // FACTORS)]
    now, best = r_max or 2.0, None
    for _ in range(1 if r_max else ROUNDS):
        now = float(np.float16(now))
        values, entries = table(now)
        order = np.argsort(values, kind="stable")
        values, amps = values[order], entries[order] & top
        both = min((values > 0).mean(), (values < 0).mean()) > 0.01  # one function in 64 is enough
        reach = float(min(values[-1], -values[0]) if both else abs(values).max())
        wanted = factors if both else abs(factors) * np.sign(values[abs(values).argmax()])
        sizes = (
            [peak / reach * 1.001] if cover else [peak / reach * 1.25**-i for i in range(-2, 12)]
        )
        for size in sizes:
            at = _nearest(values, wanted / size)
            error = float(((wanted - size * values[at]) ** 2).sum())
            if best is None or error < best[0]:
                best = error, now, size, both, amps[at].mean() / top
        use = best[4] if best[1] == now else amps[_nearest(values, wanted / best[2])].mean() / top
        toward = now * use / TARGET_USE
        now = (1 - SMOOTHING) * now + SMOOTHING * toward
        now = min(max(now, LEAST_RADIUS), LARGEST_RADIUS)
    return best[1], best[2], best[3]


def _nearest(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Places of the nearest of rising values."""
    at = np.searchsorted(values, wanted).clip(1, len(values) - 1)
    return np.where(wanted - values[at - 1] <= values[at] - wanted, at - 1, at)

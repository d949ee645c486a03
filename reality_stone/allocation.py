"""Which layer gets which rate: a Lagrangian over the layers' convex hulls.

Every layer has a curve of choices (stored bits, predicted loss). Steps along the lower convex hulls
are taken in the order of loss saved per bit (Shoham and Gersho, 1988) until one does not fit, and
the remainder goes to the steps that save most within it. A larger budget never predicts a larger
loss: it takes the same steps first, and a step that did not fit saves more than any filling of the
room it did not fit into.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from .codecs import REGISTRY, Codec, Uniform
from .codecs import codec as make_codec

DENSE = 16.0  # bits of a weight that stays as it is
RATES = (1.5, 2, 2.5, 3, 3.5, 4, 8, DENSE)
ROOM = 2048  # parts that the largest step is cut into when the remainder is filled


@dataclass(frozen=True)
class Choice:
    """A layer at one nominal rate: bits a weight with everything stored, and the predicted loss."""

    rate: float
    codec: Codec | None  # None: dense
    bits: float
    loss: float


@dataclass(frozen=True)
class LayerCurve:
    """One layer's choices, by rising rate."""

    name: str
    shape: tuple[int, int]
    choices: tuple[Choice, ...]

    @property
    def weights(self) -> int:
        return self.shape[0] * self.shape[1]

    def bits_at(self, rate: float) -> float:
        """Stored bits a weight at a nominal rate, on the line between the choices beside it."""
        known = [c.rate for c in self.choices], [c.bits for c in self.choices]
        return float(np.interp(rate, *known))


def options(codec: str | Codec, rates: Sequence[float] = RATES) -> dict[float, Codec | None]:
    """The codec at each of the nominal rates that it has, None at 16: dense.

    8 bits are those of `uniform` where the codec has none. ValueError where there are not two.
    """
    if not (isinstance(codec, str) and codec in REGISTRY):
        codec = make_codec(codec)
    found: dict[float, Codec | None] = {}
    for rate in sorted({float(rate) for rate in rates}):
        try:
            found[rate] = None if rate == DENSE else _at_rate(codec, rate)
        except ValueError:
            if rate == 8:
                found[rate] = Uniform(bits=8)
    if len([c for c in found.values() if c is not None]) < 2:
        name = codec if isinstance(codec, str) else codec.spec
        wanted = ", ".join(f"{rate:g}" for rate in rates)
        raise ValueError(f"{name}: a plan needs two rates at least, it has not two of {wanted}")
    return found


def _at_rate(codec: str | Codec, rate: float) -> Codec:
    """A codec by name at a nominal rate, or a configured one with its `bits` changed."""
    if isinstance(codec, str):
        return REGISTRY[codec].at_bits(rate)
    if "bits" not in {f.name for f in dataclasses.fields(codec)}:
        raise ValueError(f"{codec.spec} has no setting bits")
    return dataclasses.replace(codec, bits=rate)


def stored_bits(codec: Codec | None, shape: tuple[int, int]) -> float:
    """Bits of a matrix in a file: codes, and params at 16 bits a value; dense weights at 16."""
    if codec is None:
        return DENSE * shape[0] * shape[1]
    tile = codec.tile(shape)
    rows, cols = tile.grid(shape)
    params = sum((8 if p.codes else 16) * math.prod(p.sizes) for p in codec.params(shape))
    return 8 * tile.bytes * rows * cols + params


def check_bits(bits: float, rates: Collection[float]) -> None:
    """ValueError unless a mixture of the rates has this average."""
    low, high = min(rates), max(rates)
    if not (isinstance(bits, (int, float)) and low <= bits <= high):
        raise ValueError(f"bits must be between {low:g} and {high:g} for a plan, got {bits!r}")


def allocate(curves: Sequence[LayerCurve], bits: float) -> list[Choice]:
    """A choice for each layer, least predicted loss together.

    They store at most what every layer at the nominal rate `bits` would, on the line between the
    rates beside it. Raises ValueError where `bits` is outside of the rates there are.
    """
    check_bits(bits, [choice.rate for choice in curves[0].choices])
    hulls = [_hull(curve) for curve in curves]
    cost = [[round(c.bits * curve.weights) for c in hull]
            for curve, hull in zip(curves, hulls, strict=True)]  # fmt: skip
    gain = [[hull[0].loss - c.loss for c in hull] for hull in hulls]
    left = int(sum(c.bits_at(bits) * c.weights for c in curves) + 0.5) - sum(c[0] for c in cost)
    steps = [
        ((gain[i][k] - gain[i][k - 1]) / (cost[i][k] - cost[i][k - 1]), i, k)
        for i in range(len(hulls))
        for k in range(1, len(hulls[i]))
    ]
    level = [0] * len(hulls)
    for _, i, k in sorted(steps, key=lambda step: (-step[0], step[1], step[2])):
        need = cost[i][k] - cost[i][k - 1]
        if need > left:
            break
        level[i], left = k, left - need
    level = _fill(cost, gain, level, left)
    return [hull[k] for hull, k in zip(hulls, level, strict=True)]


def _hull(curve: LayerCurve) -> list[Choice]:
    """The lower convex hull, from the cheapest choice to the one of least loss."""
    hull: list[Choice] = []
    for c in sorted(curve.choices, key=lambda c: (c.bits, c.loss)):
        if hull and c.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], c) >= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(c)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Loss saved per bit from a to b."""
    return (a.loss - b.loss) / (b.bits - a.bits)


def _fill(
    cost: Sequence[Sequence[int]], gain: Sequence[Sequence[float]], level: list[int], left: int
) -> list[int]:
    """Levels raised so as to gain most within `left` more bits: a knapsack over the layers, costs
    rounded up to units that do not depend on `left`."""
    largest = max((b - a for c in cost for a, b in pairwise(c)), default=0)
    unit = max(1, largest // ROOM)
    room = min(left, largest) // unit  # beyond the largest only where no step is left
    best, chosen = np.zeros(room + 1), []
    for c, g, now in zip(cost, gain, level, strict=True):
        pick = np.full(room + 1, now, dtype=np.int16)
        found = best.copy()
        for k in range(now + 1, len(c)):
            need = -((c[now] - c[k]) // unit)
            if need > room:
                break
            value = best[: room + 1 - need] + (g[k] - g[now])
            better = value > found[need:]
            found[need:][better] = value[better]
            pick[need:][better] = k
        best = found
        chosen.append(pick)
    filled = list(level)
    for i in reversed(range(len(cost))):
        filled[i] = int(chosen[i][room])
        room -= -((cost[i][level[i]] - cost[i][filled[i]]) // unit)
    return filled


def uniform_loss(curves: Sequence[LayerCurve], rate: float) -> float:
    """Predicted loss of every layer at one of the nominal rates."""
    return sum(c.loss for curve in curves for c in curve.choices if c.rate == rate)


def curve_of(
    name: str, shape: tuple[int, int], codecs: Mapping[float, Codec | None], loss: Sequence[float]
) -> LayerCurve:
    """A layer's curve from the loss at each rate."""
    weights = shape[0] * shape[1]
    return LayerCurve(
        name,
        shape,
        tuple(
            Choice(rate, codec, stored_bits(codec, shape) / weights, value)
            for (rate, codec), value in zip(codecs.items(), loss, strict=True)
        ),
    )

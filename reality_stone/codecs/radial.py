"""The 64 functions of a radius that bitfield codes name, with their derivatives.

The operations of csrc/codecs/radial.cpp, one for one in float64, so the same bits: a math library
promises none. Why each formula is written as it is stands there.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

LEAST_RADIUS, LARGEST_RADIUS = 0.5, 8.0  # what r_max is held to
CATEGORIES = ("poincare", "lorentz", "klein", "special")
FUNCTIONS = 64

_TERMS = 28


@dataclass
class Dual:
    """Numbers v and their derivatives d to the radius."""

    v: np.ndarray
    d: np.ndarray

    def __add__(self, other):
        other = _dual(other)
        return Dual(self.v + other.v, self.d + other.d)

    def __sub__(self, other):
        other = _dual(other)
        return Dual(self.v - other.v, self.d - other.d)

    def __mul__(self, other):
        other = _dual(other)
        return Dual(self.v * other.v, self.d * other.v + self.v * other.d)

    def __truediv__(self, other):
        other = _dual(other)
        v = self.v / other.v
        return Dual(v, (self.d - v * other.d) / other.v)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other):
        return _dual(other) - self

    def __rtruediv__(self, other):
        return _dual(other) / self


def _dual(x) -> Dual:
    return x if isinstance(x, Dual) else Dual(np.float64(x), np.float64(0))


def _sum(c: list[float], y):
    total = c[-1]
    for n in range(_TERMS - 2, -1, -1):
        total = total * y + c[n]
    return total


def _series(first: float, ratio) -> list[float]:
    c = [first]
    for n in range(1, _TERMS):
        c.append(c[-1] / ratio(n))
    return c


def _stumpff_series(k: int) -> list[float]:
    first = 1.0
    for i in range(2, k + 1):
        first /= i
    return _series(first, lambda n: float((2 * n + k - 1) * (2 * n + k)))


_STUMPFF = [_stumpff_series(k) for k in range(5)]
_EXP = _series(1.0, float)
_J0 = _series(1.0, lambda n: -4.0 * n * n)
_J1 = _series(0.5, lambda n: -4.0 * n * (n + 1))
_ODD = [1.0 / (2 * n + 1) for n in range(_TERMS)]


def _stumpff(k: int, y):
    return _sum(_STUMPFF[k], y)


def _exp(x: Dual) -> Dual:
    k = np.floor(x.v * 1.4426950408889634 + 0.5)
    z = (x.v - k * 0.6931471803691238) - k * 1.9082149292705877e-10
    e = np.ldexp(_sum(_EXP, z), k.astype(np.int32))
    return Dual(e, e * x.d)


def _turn(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    k = np.floor(x * 0.6366197723675814 + 0.5)
    z = (x - k * 1.5707963267341256) - k * 6.077100506506192e-11
    y = z * z
    c, s = _stumpff(0, -y), z * _stumpff(1, -y)
    quarter = k.astype(np.int64) & 3
    return np.choose(quarter, [c, -s, -c, s]), np.choose(quarter, [s, c, -s, -c])


def _cos(x: Dual) -> Dual:
    c, s = _turn(x.v)
    return Dual(c, -s * x.d)


def _sin(x: Dual) -> Dual:
    c, s = _turn(x.v)
    return Dual(s, c * x.d)


def _log_over(x: Dual) -> Dual:
    near = abs(x.v) <= 0.25
    s = x / (2 + x)
    close = 2 / (2 + x) * _sum(_ODD, s * s)
    m, exponent = np.frexp(1 + x.v)
    low = m < 0.7071067811865476
    m, exponent = np.where(low, 2 * m, m), np.where(low, exponent - 1, exponent)
    s = (m - 1) / (m + 1)
    log = exponent * 0.6931471805599453 + 2 * s * _sum(_ODD, s * s)
    apart = np.where(near, 1.0, x.v)
    value = log / apart
    slope = (1 / (1 + x.v) - value) / apart * x.d
    return Dual(np.where(near, close.v, value), np.where(near, close.d, slope))


def _atan(x: Dual) -> Dual:
    t = x.v
    for _ in range(3):
        t = t / (1 + np.sqrt(1 + t * t))
    return Dual(8 * t * _sum(_ODD, -(t * t)), x.d / (1 + x.v * x.v))


def _sqrt(x: Dual) -> Dual:
    root = np.sqrt(x.v)
    return Dual(root, x.d / (2 * root))


def _signed_sqrt(x: Dual) -> Dual:
    root = np.sqrt(abs(x.v))
    slope = np.where(root > 0, x.d / (2 * np.where(root > 0, root, 1)), 0.0)
    return Dual(np.copysign(root, x.v), slope)


def _abs(x: Dual) -> Dual:
    return Dual(np.where(x.v < 0, -x.v, x.v), np.where(x.v < 0, -x.d, x.d))


def _held(r: Dual, low: float, high: float) -> Dual:
    outside = (r.v < low) | (r.v > high)
    return Dual(np.clip(r.v, low, high), np.where(outside, 0.0, r.d))


def _tanh_of_positive(x: Dual) -> Dual:
    return 1 - 2 / (_exp(2 * x) + 1)


def radial_functions(radius: np.ndarray) -> Dual:
    """f and df/dr (64, n) at float64 radii (n,), |r| <= 8, in the order of the function numbers
    16 * category + 4 * subcategory + order."""
    r = Dual(radius, np.ones_like(radius))
    y = r * r
    h, yh, q, yq = r / 2, y / 4, r / 4, y / 16
    cosh, sinh_over = _stumpff(0, y), _stumpff(1, y)
    sinh = r * sinh_over
    cosh1 = y * _stumpff(2, y)
    cosine, sin_over = _stumpff(0, 0 - y), _stumpff(1, 0 - y)
    sine = r * sin_over
    cosh_half, sinh_half_over = _stumpff(0, yh), _stumpff(1, yh)
    sinh_half = h * sinh_half_over
    cos_half = _stumpff(0, 0 - yh)
    tanh, tanh_half = sinh / cosh, sinh_half / cosh_half
    tanh_quarter = q * _stumpff(1, yq) / _stumpff(0, yq)
    e, grow_over = _exp(r), _exp(h) * sinh_half_over
    decay_over = _exp(0 - h) * sinh_half_over
    bell, wide_bell, one_y = _exp(0 - y / 2), _exp(0 - y / 4), 1 + y
    past, between = _held(r, -0.75, 8), _held(r, -0.5, 2.25)
    within, inside = _held(r, -1.5, 1.5), _held(r, -3, 3)
    w, u = within * within, inside * inside
    bessel0, bessel1_over = _sum(_J0, y), _sum(_J1, y)
    found = [
        # Poincare
        *(tanh_half, 0 - tanh_half, 2 * tanh_quarter, tanh_half * tanh_half),
        *(sinh / (1 + cosh), cosh1 / (1 + cosh), tanh, sinh_over),
        *(sin_over, cosine, _stumpff(2, 0 - y), sine * cosine),
        *(grow_over, e / (1 + e), _log_over(past), r / (1 + _abs(r))),
        # Lorentz
        *(sinh, cosh1, tanh, sinh / cosh),
        *(2 * sinh_half, cosh_half, r * grow_over, r * decay_over),
        *(r * cosh, r * sinh, r * _stumpff(3, y), r * _stumpff(4, y)),
        *(_sqrt(cosh), _signed_sqrt(sinh), _tanh_of_positive(y), sinh_over / cosh),
        # Klein
        *(past / (1 + past), r / _sqrt(one_y), y / one_y, past / (1 + past)),
        *(2 * r / one_y, (1 - y) / one_y, 4 * r / (one_y * one_y), _atan(r) * 0.6366197723675814),
        *(r / (1 + r + y / 2), between / (1 + between - between * between / 2)),
        *(r - r * y / 3 + r * y * y / 5, r / (1 + y / 3)),
        *(r / (1 + _abs(r)), _signed_sqrt(r), r * y / one_y, r * bell),
        # Special
        *((bessel0 + r * bessel1_over) / 2, sin_over * cos_half, 2 * bessel1_over),
        bessel0 * cosine,
        *(bell, r * bell, (1 - y) * bell, 1 / _sqrt(one_y)),
        *(cosine * wide_bell, sine * wide_bell, _cos(y), _sin(y)),
        *(_stumpff(1, 0 - w) / _stumpff(0, 0 - w), sin_over * cosine),
        *(_stumpff(2, 0 - u) / _stumpff(1, 0 - u), r * _log_over(y)),
    ]
    return Dual(np.stack([f.v for f in found]), np.stack([f.d for f in found]))


def held_r_max(r_max: float) -> float:
    """What decode makes of any r_max; a NaN counts as the least."""
    r_max = r_max if r_max > LEAST_RADIUS else LEAST_RADIUS
    return r_max if r_max < LARGEST_RADIUS else LARGEST_RADIUS


@functools.lru_cache(maxsize=32)
def radial_table(word: int, r_max: float) -> tuple[np.ndarray, np.ndarray]:
    """f(r) and df/dr_max of all entries of a word's table, float64; order in csrc/codecs/radial.h.
    r_max in [0.5, 8]."""
    f, share = _entries(word, r_max)
    return _in_order(word, f.v), _in_order(word, f.d * share)


@functools.lru_cache(maxsize=8)
def radial_slopes(word: int, r_max: float) -> tuple[np.ndarray, np.ndarray]:
    """df/dr, r being the function's argument, and the change of r per step of the amplitude, of all
    entries in the order of `radial_table`."""
    f, share = _entries(word, r_max)
    steps = 255 if word == 22 else 1023
    step = np.where(np.signbit(share), -r_max, r_max) / steps
    return _in_order(word, f.d), _in_order(word, np.broadcast_to(step, f.d.shape))


def _entries(word: int, r_max: float) -> tuple[Dual, np.ndarray]:
    """All functions at all radii of a table (64, radii), and the radii's shares of r_max."""
    if word == 22:
        i = np.arange(256.0)
        return radial_functions(i * r_max / 255), i / 255
    i = np.arange(1024.0)
    r, share = i * r_max / 1023, i / 1023
    return radial_functions(np.concatenate((r, -r))), np.concatenate((share, -share))


def _in_order(word: int, x: np.ndarray) -> np.ndarray:
    if word == 22:
        return x.reshape(-1)
    # (16, order, sign, amp) -> (16, sign, order, amp), orders 0 and 1
    return x.reshape(16, 4, 2, 1024)[:, :2].swapaxes(1, 2).reshape(-1)

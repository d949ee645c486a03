"""The integer tables of the cyclic codes: the twin of csrc/codecs/cyclic_tables.h."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_TANH = (  # tanh(2x) and its derivatives, each over its largest magnitude
    (-127, -124, -118, -110, -96, -77, -50, -17, 17, 50, 77, 96, 110, 118, 124, 127),
    (9, 15, 25, 39, 60, 85, 111, 127, 127, 111, 85, 60, 39, 25, 15, 9),
    (22, 36, 57, 84, 112, 127, 107, 43, -43, -107, -127, -112, -84, -57, -36, -22),
    (17, 26, 37, 45, 39, 2, -66, -127, -127, -66, 2, 39, 45, 37, 26, 17),
)
_SINH = (-127, -106, -87, -69, -52, -37, -22, -7, 7, 22, 37, 52, 69, 87, 106, 127)
_COSH = (127, 115, 105, 98, 91, 87, 84, 82, 82, 84, 87, 91, 98, 105, 115, 127)
_EXP = (17, 20, 22, 26, 29, 33, 38, 44, 50, 57, 65, 75, 85, 97, 111, 127)
_QUARTER = (127, 117, 90, 49, 0)
_QUARTER16 = (
    *(32767, 32609, 32137, 31356, 30273, 28898, 27245, 25329, 23170),
    *(20787, 18204, 15446, 12539, 9512, 6393, 3212, 0),
)
_QUARTER256 = (
    *(32767, 32757, 32728, 32678, 32609, 32521, 32412, 32285, 32137, 31971, 31785, 31580, 31356),
    *(31113, 30852, 30571, 30273, 29956, 29621, 29268, 28898, 28510, 28105, 27683, 27245, 26790),
    *(26319, 25832, 25329, 24811, 24279, 23731, 23170, 22594, 22005, 21403, 20787, 20159, 19519),
    *(18868, 18204, 17530, 16846, 16151, 15446, 14732, 14010, 13279, 12539, 11793, 11039, 10278),
    *(9512, 8739, 7962, 7179, 6393, 5602, 4808, 4011, 3212, 2410, 1608, 804, 0),
)


def _cycle(quarter: tuple[int, ...]) -> list[list[int]]:
    """Cosine and its three derivatives over a turn, from the cosine of its first quarter."""
    n = len(quarter) - 1
    turn = [*quarter[:n], *(-v for v in quarter[:0:-1])]
    turn += [-v for v in turn]
    return [[turn[(p + n * d) % (4 * n)] for p in range(4 * n)] for d in range(4)]


def cyclic() -> Tensor:
    """T (4, 16) int8: round(127 cos(2 pi p / 16 + d pi / 2))."""
    return torch.tensor(_cycle(_QUARTER), dtype=torch.int8)


def cyclic16() -> Tensor:
    """T16 (4, 64) int16: round(32767 cos(2 pi p / 64 + d pi / 2))."""
    return torch.tensor(_cycle(_QUARTER16), dtype=torch.int16)


def cyclic256() -> Tensor:
    """(4, 256) int16: round(32767 cos(2 pi k / 256 + d pi / 2))."""
    return torch.tensor(_cycle(_QUARTER256), dtype=torch.int16)


def cyclic_scalar_slopes() -> Tensor:
    """Derivatives of what `cyclic_scalar` rounds by the phase in radians (family 4, diff 4,
    phase 16), float64: 16 phases are a turn."""
    p = torch.arange(16, dtype=torch.float64)
    x, speed = (p - 7.5) / 7.5, 16 / (2 * math.pi * 7.5)  # dx / dphase
    angle = p * (2 * math.pi / 16)
    cosine = [-(angle + d * math.pi / 2).sin() for d in range(4)]
    sinh, cosh = speed * x.cosh() / math.sinh(1), speed * x.sinh() / math.cosh(1)
    t = torch.tanh(2 * x)
    u = 1 - t * t
    tanh = (  # and its first four derivatives
        *(t, 2 * u, -8 * t * u, -16 * u * (1 - 3 * t * t), 128 * t * u * (2 - 3 * t * t)),
    )
    tanh = [speed * tanh[d + 1] / tanh[d].abs().max() for d in range(4)]
    families = (cosine, (sinh, cosh, sinh, cosh), (speed * (x - 1).exp(),) * 4, tanh)
    return 127 * torch.stack([torch.stack(tuple(f)) for f in families])


def cyclic_scalar() -> Tensor:
    """The 8-bit scalar codes (family 4, diff 4, phase 16) int8; formulas in the header."""
    families = [_cycle(_QUARTER), (_SINH, _COSH, _SINH, _COSH), (_EXP,) * 4, _TANH]
    return torch.tensor([list(f) for f in families], dtype=torch.int8)

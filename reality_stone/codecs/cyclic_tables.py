"""The integer tables of the cyclic codes: the twin of csrc/codecs/cyclic_tables.h."""

from __future__ import annotations

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


def cyclic_scalar() -> Tensor:
    """The 8-bit scalar codes (family 4, diff 4, phase 16) int8; formulas in the header."""
    families = [_cycle(_QUARTER), (_SINH, _COSH, _SINH, _COSH), (_EXP,) * 4, _TANH]
    return torch.tensor([list(f) for f in families], dtype=torch.int8)

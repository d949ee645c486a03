"""Angles as bits: nine encodings of the source documents, vectorised over tensors of any shape.

`encode` takes any real angle in radians and wraps it to a turn; `decode` gives float64 angles in
[0, 2 pi). `max_error` is the largest distance between them, in radians around the circle. A turn is
the float64 number 2 pi: of an angle of 1e30 only that much is known.

Two corrections to the documents: n bits are 2^n steps to the turn (theirs has 2^n - 1, so that 0
and 2 pi differ by a code and wrapping costs a branch), and values are rounded, not cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

TURN = 2 * math.pi
_CORDIC = tuple(math.atan(2.0**-i) for i in range(16))  # 45, 26.57, 14.04, ... degrees
_WORDS = {8: (torch.uint8, torch.int8), 16: (torch.uint16, torch.int16)}


def wrap(angle: Tensor) -> Tensor:
    """`angle` in [0, 2 pi), float64. TypeError or ValueError where it is no real number."""
    if not isinstance(angle, Tensor) or angle.is_complex() or angle.dtype == torch.bool:
        what = angle.dtype if isinstance(angle, Tensor) else type(angle).__name__
        raise TypeError(f"phase: angles must be a tensor of real numbers, got {what}")
    angle = angle.double()
    bad = (~angle.isfinite()).nonzero()
    if len(bad):
        raise ValueError(f"phase: the angle at {tuple(bad[0].tolist())} is not finite")
    wrapped = angle.remainder(TURN)
    return torch.where(wrapped >= TURN, 0.0, wrapped)  # -1e-20 rounds up to a whole turn


def distance(a: Tensor, b: Tensor) -> Tensor:
    """The way between two angles around the circle, in [0, pi]."""
    apart = (a.double() - b.double()).remainder(TURN)
    return torch.minimum(apart, TURN - apart)


def _steps(angle: Tensor, bits: int) -> Tensor:
    """The nearest of 2^bits steps to the turn, int64."""
    return (wrap(angle) * (2**bits / TURN)).round().long() & (2**bits - 1)


def _turns(steps: Tensor, bits: int) -> Tensor:
    return (steps.long() & (2**bits - 1)).double() * (TURN / 2**bits)


def _codes(codes: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if not isinstance(codes, Tensor) or codes.dtype != dtype:
        what = codes.dtype if isinstance(codes, Tensor) else type(codes).__name__
        raise TypeError(f"phase: {name} codes must be {dtype}, got {what}")
    return codes.long()


def _magnitude(magnitude: Tensor | float, like: Tensor) -> Tensor:
    m = torch.as_tensor(magnitude, dtype=torch.float64).expand(like.shape)
    if not bool(((m >= 0) & (m <= 1)).all()):
        raise ValueError("phase: magnitudes must be between 0 and 1")
    return m


class Encoding(ABC):
    """name: of the documents; bits: stored for an angle; max_error: radians."""

    name: ClassVar[str]
    bits: float
    max_error: float

    @abstractmethod
    def encode(self, angle: Tensor) -> Tensor | tuple[Tensor, Tensor]: ...

    @abstractmethod
    def decode(self, codes: Tensor | tuple[Tensor, Tensor]) -> Tensor: ...


@dataclass(frozen=True)
class Fixed(Encoding):
    """uint8 or uint16: 2^bits steps to the turn, so adding codes adds angles and wrap is free."""

    name: ClassVar[str] = "fixed"
    bits: int = 16

    def __post_init__(self):
        _check_bits(self)

    @property
    def max_error(self):
        return math.pi / 2**self.bits

    def encode(self, angle):
        return _steps(angle, self.bits).to(_WORDS[self.bits][0])

    def decode(self, codes):
        return _turns(_codes(codes, _WORDS[self.bits][0], self.name), self.bits)


@dataclass(frozen=True)
class Signed(Fixed):
    """int8 or int16, two's complement: the same steps from -pi on. The documents scale by 127 and
    say -128; the whole range is used here."""

    name: ClassVar[str] = "signed"

    def encode(self, angle):
        steps, half = _steps(angle, self.bits), 2 ** (self.bits - 1)
        return torch.where(steps >= half, steps - 2 * half, steps).to(_WORDS[self.bits][1])

    def decode(self, codes):
        return _turns(_codes(codes, _WORDS[self.bits][1], self.name), self.bits)


@dataclass(frozen=True)
class Complex(Encoding):
    """Two int8, 127 m (cos, sin): (..., 2). Rotations are products, no table is needed.

    Rounding moves the point by up to 1/sqrt(2), seen from at least 127 - 1/sqrt(2) away; the error
    is for magnitude 1 and grows as it falls.
    """

    name: ClassVar[str] = "complex"
    bits: ClassVar[int] = 16
    max_error: ClassVar[float] = math.asin(math.sqrt(0.5) / 127)

    def encode(self, angle, magnitude: Tensor | float = 1.0):
        angle = wrap(angle)
        m = 127 * _magnitude(magnitude, angle)
        return torch.stack((m * angle.cos(), m * angle.sin()), -1).round().to(torch.int8)

    def decode(self, codes):
        z = self._point(codes)
        return wrap(torch.atan2(z[..., 1], z[..., 0]))

    def magnitude(self, codes: Tensor) -> Tensor:
        """Within 1/(127 sqrt 2) of what was encoded."""
        return self._point(codes).norm(dim=-1) / 127

    def _point(self, codes):
        z = _codes(codes, torch.int8, self.name).double()
        if z.dim() == 0 or z.shape[-1] != 2:
            raise ValueError(f"phase: complex codes must end in 2, got shape {tuple(z.shape)}")
        return z


@dataclass(frozen=True)
class Polar(Encoding):
    """uint16: phase[15:4] in 4096 steps, magnitude[3:0] in fifteenths."""

    name: ClassVar[str] = "polar"
    bits: ClassVar[int] = 16
    max_error: ClassVar[float] = math.pi / 4096

    def encode(self, angle, magnitude: Tensor | float = 1.0):
        steps = _steps(angle, 12)
        return (steps << 4 | (15 * _magnitude(magnitude, steps)).round().long()).to(torch.uint16)

    def decode(self, codes):
        return _turns(_codes(codes, torch.uint16, self.name) >> 4, 12)

    def magnitude(self, codes: Tensor) -> Tensor:
        """Within 1/30 of what was encoded."""
        return (_codes(codes, torch.uint16, self.name) & 15).double() / 15


@dataclass(frozen=True)
class Cordic(Encoding):
    """int32: quadrant[17:16], then a bit for each rotation by atan(2^-i), i = 0 the highest, taken
    greedily. The documents' 16 rotations reach 99.9 degrees; the quadrant gives the whole turn.

    Each angle of the series is at most the sum of those after it and the last, so what is left at
    the end is less than the last, atan(2^-15).
    """

    name: ClassVar[str] = "cordic"
    bits: ClassVar[int] = 18
    max_error: ClassVar[float] = _CORDIC[-1]

    def encode(self, angle):
        angle = wrap(angle)
        quadrant = (angle / (TURN / 4)).floor().clamp_max(3)
        left = angle - quadrant * (TURN / 4)
        codes = quadrant.int() << 16
        for i, rotation in enumerate(_CORDIC):
            turned = left >= rotation
            left = torch.where(turned, left - rotation, left)
            codes = codes | turned.int() << (15 - i)
        return codes

    def decode(self, codes):
        codes = _codes(codes, torch.int32, self.name)
        angle = ((codes >> 16) & 3).double() * (TURN / 4)
        for i, rotation in enumerate(_CORDIC):
            angle = angle + ((codes >> (15 - i)) & 1).double() * rotation
        return wrap(angle)


@dataclass(frozen=True)
class Delta(Encoding):
    """Sequences of nine angles (..., 9): a uint16 base (...) and eight int8 differences (..., 8) in
    256ths of a turn. Each is taken from the decoded angle before it, so errors do not add up."""

    name: ClassVar[str] = "delta"
    bits: ClassVar[float] = 80 / 9
    max_error: ClassVar[float] = math.pi / 256

    def encode(self, angle):
        angle = wrap(angle)
        if angle.dim() == 0 or angle.shape[-1] != 9:
            raise ValueError(f"phase: delta takes angles (..., 9), got {tuple(angle.shape)}")
        base = Fixed(16).encode(angle[..., 0])
        known, differences = Fixed(16).decode(base), []
        for i in range(1, 9):
            differences.append(Signed(8).encode(angle[..., i] - known))
            known = known + Signed(8).decode(differences[-1])
        return base, torch.stack(differences, -1)

    def decode(self, codes):
        base, differences = codes
        if differences.shape != (*base.shape, 8):
            raise ValueError(
                f"phase: delta needs a base (...) and differences (..., 8), got "
                f"{tuple(base.shape)} and {tuple(differences.shape)}"
            )
        first = Fixed(16).decode(base)[..., None]
        rest = first + Signed(8).decode(differences).cumsum(-1)
        return wrap(torch.cat((first, rest), -1))


@dataclass(frozen=True)
class Hierarchical(Encoding):
    """uint16: coarse[15:12] in steps of 22.5 degrees, fine[11:0] in 4096ths of that, 2048 for none.
    The coarse field alone is within pi/16."""

    name: ClassVar[str] = "hierarchical"
    bits: ClassVar[int] = 16
    max_error: ClassVar[float] = math.pi / 65536

    def encode(self, angle):
        steps = _steps(angle, 16)
        coarse = ((steps + 2048) >> 12) & 15
        fine = (steps - (coarse << 12) + 2048) & 4095
        return (coarse << 12 | fine).to(torch.uint16)

    def decode(self, codes):
        codes = _codes(codes, torch.uint16, self.name)
        return _turns((codes >> 12 << 12) + (codes & 4095) - 2048, 16)

    def coarse(self, codes: Tensor) -> Tensor:
        """The angle to the next 22.5 degrees."""
        return _turns(_codes(codes, torch.uint16, self.name) >> 12, 4)


@dataclass(frozen=True)
class Extended(Encoding):
    """uint16: phase[9:0] in 1024ths of a quadrant, quadrant[11:10], flags[15:12] free for use."""

    name: ClassVar[str] = "extended"
    bits: ClassVar[int] = 16
    max_error: ClassVar[float] = math.pi / 4096

    def encode(self, angle, flags: Tensor | int = 0):
        steps = _steps(angle, 12)
        flags = torch.as_tensor(flags).long().expand(steps.shape)
        if not bool(((flags >= 0) & (flags <= 15)).all()):
            raise ValueError("phase: flags must be from 0 to 15")
        return (flags << 12 | steps).to(torch.uint16)

    def decode(self, codes):
        return _turns(_codes(codes, torch.uint16, self.name), 12)

    def flags(self, codes: Tensor) -> Tensor:
        return _codes(codes, torch.uint16, self.name) >> 12


@dataclass(frozen=True)
class Kronecker(Encoding):
    """uint16: index[15:8] of the delta at or below, interpolation[7:0] toward the next."""

    name: ClassVar[str] = "kronecker"
    bits: ClassVar[int] = 16
    max_error: ClassVar[float] = math.pi / 65536

    def encode(self, angle):
        return _steps(angle, 16).to(torch.uint16)

    def decode(self, codes):
        return _turns(_codes(codes, torch.uint16, self.name), 16)


def delta_coefficients(phase: Tensor, n: int = 256) -> Tensor:
    """The interpolated one-hot vector (..., n) of an angle: 1 - t at its index, t at the next.

    Differentiable: the derivative is -n/(2 pi) and n/(2 pi) at the two. n of at least 3.
    """
    if n < 3:
        raise ValueError(f"phase: a turn needs at least 3 deltas, got {n}")
    wrap(phase)  # checks
    place = (phase if phase.is_floating_point() else phase.double()) * (n / TURN)
    low = place.detach().floor()
    high_weight = (place - low)[..., None]
    index = low.long().remainder(n)[..., None]
    zeros = torch.zeros((*phase.shape, n), dtype=place.dtype, device=phase.device)
    return zeros.scatter_add(-1, index, 1 - high_weight).scatter_add(
        -1, (index + 1) % n, high_weight
    )


def multi_resolution(phase: Tensor, levels: Sequence[int] = (4, 4, 4)) -> tuple[Tensor, Tensor]:
    """Indices (..., len(levels)) of an angle, each level dividing the step before it by its number,
    and the angle they stand for, at most the last step below. (The documents divide the whole turn
    at every level, so that levels after the first add nothing.)"""
    if not levels or any(not isinstance(n, int) or n < 2 for n in levels):
        raise ValueError(f"phase: levels must be whole numbers from 2 on, got {levels!r}")
    left, step, indices = wrap(phase), TURN, []
    total = torch.zeros_like(left)
    for n in levels:
        step = step / n
        index = (left / step).floor().clamp(0, n - 1)
        left = left - index * step
        total = total + index * step
        indices.append(index.long())
    return torch.stack(indices, -1), total


def _check_bits(encoding: Fixed) -> None:
    if encoding.bits not in _WORDS:
        raise ValueError(f"phase: {encoding.name} has 8 or 16 bits, got {encoding.bits!r}")


ENCODINGS: tuple[Encoding, ...] = (
    Fixed(8),
    Fixed(16),
    Signed(8),
    Signed(16),
    Complex(),
    Polar(),
    Cordic(),
    Delta(),
    Hierarchical(),
    Extended(),
    Kronecker(),
)

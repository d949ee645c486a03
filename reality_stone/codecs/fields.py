"""The fields of a codec's codes that can change alone: where their bits are and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

KINDS = ("level", "cyclic", "index", "sign")
HELD_BYTES = 1 << 25  # temporaries of a read or write


@dataclass(frozen=True)
class Field:
    """One number in every code of a tile.

    kind: level (an amount: neighbours are one apart, and it ends at both ends), cyclic (an amount
    that wraps around), index (a name: neighbours differ in one bit) or sign (one bit).
    A tile holds `count` codes side by side, each of rows x cols weights; the field of code j has
    `width` (at most 16) bits from bit `offset + stride * j` of the tile on, least significant
    first. `where` takes the place of offset and stride where that is no such line: it gives the
    bits (count,) or (down, across, count) of the field for codes (down, across, bytes), and which
    of them exist, or None for all.
    signed: two's complement, symmetric (-128 is no level). absent: zero says that there is nothing
    to change.
    """

    name: str
    kind: str
    width: int
    cols: int
    rows: int = 1
    offset: int = 0
    stride: int = 0
    count: int = 1
    signed: bool = False
    absent: bool = False
    where: Callable[[Tensor], tuple[Tensor, Tensor | None]] | None = None

    def __post_init__(self):
        if self.kind not in KINDS or not 1 <= self.width <= 16:
            raise ValueError(f"{self.name}: no field of kind {self.kind!r} and {self.width} bits")

    def grid(self, codes: Tensor) -> tuple[int, int]:
        """Codes down and across of codes (down, across, bytes)."""
        return codes.shape[0], codes.shape[1] * self.count

    def read(self, codes: Tensor) -> Tensor:
        """Value of the field in every code, int32 of the size `grid`; 0 where it does not exist."""
        parts = [self._read(part) for part in self._parts(codes)]
        return torch.cat(parts) if parts else codes.new_zeros(self.grid(codes), dtype=torch.int32)

    def write(self, codes: Tensor, values: Tensor) -> Tensor:
        """`codes` with the field of every code replaced by values (grid) in its range."""
        sizes = [len(part) for part in self._parts(codes)]
        pairs = zip(codes.split(sizes), values.split(sizes), strict=True)
        parts = [self._write(part, value) for part, value in pairs]
        return torch.cat(parts) if parts else codes.clone()

    def neighbours(self) -> list[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name, values -> values) of every smallest change."""
        if self.kind in ("level", "cyclic"):
            steps = ((1, "+1"), (-1, "-1"))
            return [(self.name + text, lambda v, d=d: self._stepped(v, d)) for d, text in steps]
        flips = [(f"{self.name}^{k}", lambda v, k=k: v ^ 1 << k) for k in range(self.width)]
        return flips if self.kind == "index" else [(self.name, flips[0][1])]

    def _stepped(self, values: Tensor, step: int) -> Tensor:
        moved = values + step
        if self.kind == "cyclic":
            return moved & (1 << self.width) - 1
        top = (1 << self.width - 1) - 1 if self.signed else (1 << self.width) - 1
        inside = (moved <= top) & (moved >= (-top if self.signed else 0))
        if self.absent:
            inside &= values != 0
        return torch.where(inside, moved, values)

    def _parts(self, codes: Tensor) -> Iterator[Tensor]:
        """Rows of tiles, few enough that what a read or write holds stays small."""
        held = 40 * self.count * codes.shape[1] + 8 * codes[:1].numel()
        return iter(codes.split(max(1, HELD_BYTES // max(1, held))) if len(codes) else ())

    def _place(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(byte, shift, exists): (count,) or (down, across, count)."""
        if self.where is not None:
            bit, exists = self.where(codes)
        else:
            j = torch.arange(self.count, device=codes.device)
            bit, exists = self.offset + self.stride * j, None
        return bit >> 3, (bit & 7).int(), exists

    def _bytes(self) -> int:
        """Bytes that the field can touch, from any bit of the first."""
        return (self.width + 14) // 8

    def _read(self, codes: Tensor) -> Tensor:
        byte, shift, exists = self._place(codes)
        value = torch.zeros((*codes.shape[:2], self.count), dtype=torch.int32, device=codes.device)
        for i in range(self._bytes()):  # bits past the tile are not of the field
            at = (byte + i).clamp_max(codes.shape[2] - 1)
            part = codes[..., at] if at.dim() == 1 else codes.gather(2, at)
            value |= part.int() << 8 * i
        value = value >> shift & (1 << self.width) - 1
        if self.signed:
            value -= (value >> self.width - 1) << self.width
        return (value if exists is None else value.where(exists, 0)).flatten(1)

    def _write(self, codes: Tensor, values: Tensor) -> Tensor:
        byte, shift, exists = self._place(codes)
        change = (values.int() ^ self._read(codes)).view(*codes.shape[:2], self.count)
        change = (change & (1 << self.width) - 1) << shift
        if exists is not None:
            change = change.where(exists, 0)
        # Fields share bytes but no bits, so that sums of their changes are their union.
        turned = torch.zeros(codes.shape, dtype=torch.int32, device=codes.device)
        for i in range(self._bytes()):
            at = (byte + i).clamp_max(codes.shape[2] - 1).expand(change.shape)
            turned.scatter_add_(2, at, change >> 8 * i & 255)
        return codes ^ turned.to(torch.uint8)

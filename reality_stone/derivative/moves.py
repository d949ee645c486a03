"""Discrete coordinate moves: what codes become when one field of each changes by the least it can.

Which fields a codec's codes have is said by `Codec.fields` in the codec's own file; nothing here
knows a codec by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec
from ..codecs import codec as make_codec
from ..codecs.fields import Field


@dataclass(frozen=True)
class Move:
    """A change of one field that any code can make alone; each code covers rows x cols weights of
    the inner matrix T.

    name: the field's, with +1 or -1 for an amount, ^k for bit k of an index, nothing for a sign.
    """

    name: str
    field: Field
    change: Callable[[Tensor], Tensor]

    @property
    def rows(self) -> int:
        return self.field.rows

    @property
    def cols(self) -> int:
        return self.field.cols

    def apply(self, codes: Tensor, chosen: Tensor | None = None) -> Tensor:
        """New codes (down, across, bytes), of which all or the `chosen` have made the move.

        chosen: bool of the size `self.grid(codes)`. A code whose field is at the end of its range,
        or that has no such field, stays as it is.
        """
        values = self.field.read(codes)
        moved = self.change(values)
        return self.field.write(codes, moved if chosen is None else values.where(~chosen, moved))

    def grid(self, codes: Tensor) -> tuple[int, int]:
        """Codes down and across, padding included."""
        return self.field.grid(codes)

    def sums(self, values: Tensor, codes: Tensor) -> Tensor:
        """Sums (grid) of values (out, in) over the weights that each code covers."""
        down, across = self.grid(codes)
        out, n = values.shape
        if (out, n) != (down * self.rows, across * self.cols):
            pad = (0, across * self.cols - n, 0, down * self.rows - out)
            values = torch.nn.functional.pad(values, pad)
        if self.rows == self.cols == 1:
            return values
        return values.view(down, self.rows, across, self.cols).sum((1, 3))

    def spread(self, values: Tensor, shape: tuple[int, int]) -> Tensor:
        """values (grid) at every weight that a code covers, (out, in)."""
        wide = values.repeat_interleave(self.rows, 0).repeat_interleave(self.cols, 1)
        return wide[: shape[0], : shape[1]]


def moves(codec: str | Codec, shape: tuple[int, int]) -> list[Move]:
    """Every move of a codec's codes, each field's in turn; [] where codes have no fields."""
    return [
        Move(name, field, change)
        for field in make_codec(codec).fields((shape[0], shape[1]))
        for name, change in field.neighbours()
    ]


def neighbours(
    codes: Tensor, codec: str | Codec, shape: tuple[int, int]
) -> list[tuple[Move, Tensor]]:
    """(move, codes with every code moved) for every move: valid codes of the same size.

    Codes do not overlap in T, so where T is not rotated (codec.blocks(shape) == (1, 1)) the change
    of the decoded weight under one code is that of its own move alone.

    >>> codes = torch.tensor([[[0b1100]]], dtype=torch.uint8)
    >>> found = neighbours(codes, "uniform(bits=2, group=2)", (1, 2))
    >>> [(move.name, bin(moved.item())) for move, moved in found]
    [('level+1', '0b1101'), ('level-1', '0b1000')]
    """
    return [(move, move.apply(codes)) for move in moves(codec, shape)]

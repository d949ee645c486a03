"""vq_cyclic: vectors of `block` weights, each one of 16 prototypes seen through a transform.

The transforms are identity, a roll by a quarter of the vector, negation, and both: 64 codewords of
16 trained vectors. Layout in csrc/codecs/vq_cyclic.h. Source: vector quantization by Lloyd's
algorithm (Linde, Buzo, Gray, 1980), in which every transform takes part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fitting import unit_rows
from ..packed import round_to_half
from .base import Codec, Param, Tile, row_scale, whole_number
from .fields import Field
from .uniform import pack_bits, unpack_bits

PROTOTYPES = 16


@dataclass(frozen=True)
class VqCyclic(Codec):
    """block: weights of a vector, a multiple of 4 from 4 to 256; 6 / block bits per weight."""

    name: ClassVar[str] = "vq_cyclic"
    rates: ClassVar = {1.5: {"block": 4}, 0.75: {"block": 8}}
    refits: ClassVar = ("prototypes",)
    block: int = 4

    def __post_init__(self):
        wrong = f"vq_cyclic: block must be a multiple of 4 from 4 to 256, got {self.block!r}"
        try:
            object.__setattr__(self, "block", whole_number(self.block, 4, 256, ""))
        except ValueError:
            raise ValueError(wrong) from None
        if self.block % 4:
            raise ValueError(wrong)

    def tile(self, shape):
        return Tile(1, 4 * self.block, 3)

    def fields(self, shape):
        code = {"cols": self.block, "stride": 6, "count": 4}
        return (
            Field("prototype", "index", 4, **code),
            Field("roll", "index", 1, offset=4, **code),
            Field("sign", "sign", 1, offset=5, **code),
        )

    def params(self, shape):
        return (
            Param("prototypes", (PROTOTYPES, self.block), "shared"),
            Param("out_scale", (shape[0],), "out"),
        )

    def initial_params(self, weight, seed, feedback=False, importance=None):
        scale = row_scale(weight)
        rows, weights = unit_rows(weight, importance, limit=1 << 16)
        whole = rows.shape[1] // self.block * self.block
        points, h = (x[:, :whole].reshape(-1, self.block) for x in (rows, weights))
        return {"prototypes": round_to_half(prototypes(points, h, seed)), "out_scale": scale}

    def decode_tiles(self, codes, params, shape):
        code = unpack_bits(codes, 6, 4).long()
        return codewords(params["prototypes"])[code].flatten(1)

    def encode_reference(self, target, importance, params):
        w = target.unflatten(1, (-1, self.block))
        h = torch.ones_like(w[:1]) if importance is None else importance.view(1, -1, self.block)
        code = nearest(w, h.expand_as(w), codewords(params["prototypes"]))
        return pack_bits(code.unflatten(1, (-1, 4)), 6), params


def codewords(prototypes: Tensor) -> Tensor:
    """(16, block) -> the 64 vectors in the order of their codes, (64, block)."""
    rolled = prototypes.roll(prototypes.shape[1] // 4, 1)
    both = torch.cat((prototypes, rolled))
    return torch.cat((both, -both))


def nearest(w: Tensor, h: Tensor, words: Tensor) -> Tensor:
    """Index of the codeword with the least h-weighted squared error, for w (..., block)."""
    return ((h * w) @ words.t() * -2 + h @ words.t() ** 2).argmin(-1)


def prototypes(points: Tensor, h: Tensor, seed: int, rounds: int = 20) -> Tensor:
    """(16, block) for points (n, block) of importance h by Lloyd's algorithm on all codewords:
    each vector moves the prototype behind its codeword, transformed back."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)[:PROTOTYPES]
    missing = PROTOTYPES - len(order)
    found = torch.cat((points[order], torch.randn(missing, points.shape[1], generator=generator)))
    back = -(points.shape[1] // 4)
    for _ in range(rounds):
        code = nearest(points, h, codewords(found))
        rolled = (code & 16 != 0)[:, None]
        sign = 1 - 2.0 * (code >> 5)[:, None]
        at = torch.where(rolled, (points * sign).roll(back, 1), points * sign)
        weight = torch.where(rolled, h.roll(back, 1), h)
        total = torch.zeros_like(found).index_add_(0, code & 15, weight)
        moment = torch.zeros_like(found).index_add_(0, code & 15, weight * at)
        moved = torch.where(total > 0, moment / total, found)
        if torch.equal(moved, found):
            break
        found = moved
    return found

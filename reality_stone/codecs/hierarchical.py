"""hierarchical: eight weights share a 16-bit base, and two bits each say how they differ from it.

mode=mul: each weight is the base times one of four multipliers. mode=xor: the base is a compound
cyclic code, and each weight another code, the base with some bits turned over. Layout in
csrc/codecs/hierarchical.h. The source documents leave the weights of a group no sign of their own
and fix the multipliers at 0.8, 1, 1.2, 1.5 (`fitted=False`); fitted ones take both signs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .base import Codec, Param, Tile, check_words, flag, one_of, row_scale
from .cyclic_tables import cyclic
from .fields import Field

BLOCK = 8
STEP = 1 / 512  # of an integer base
FIXED_MULTIPLIERS = (0.8, 1.0, 1.2, 1.5)
# Where fits to Gaussian weights end.
MULTIPLIERS = (-1.17, -0.39, 0.16, 0.83)
LEVELS = (
    *(-3.86, -2.97, -2.57, -2.36, -1.43, -1.86, -0.38, -0.13),
    *(0.13, 0.38, 0.63, 1.68, 1.95, 3.31, 4.84, 6.2),
)
MASKS = (0, 0x00F0, 0x0F00, 0x00FF)


@dataclass(frozen=True)
class Hierarchical(Codec):
    """mode: mul or xor; fitted: the multipliers (mul) or levels (xor) are fitted to the layer."""

    name: ClassVar[str] = "hierarchical"
    rates: ClassVar = {4: {}}
    mode: str = one_of("mul", "xor")
    fitted: bool = True

    def __post_init__(self):
        check_words(self)
        flag(self.fitted, "hierarchical: fitted")

    @property
    def table(self) -> str:
        """Name of the shared param."""
        return "multipliers" if self.mode == "mul" else "levels"

    @property
    def refits(self) -> tuple[str, ...]:
        return (self.table,) if self.fitted else ()

    def tile(self, shape):
        return Tile(1, BLOCK, 4)

    def fields(self, shape):
        delta = {"width": 2, "cols": 1, "offset": 16, "stride": 2, "count": BLOCK}
        if self.mode == "mul":  # a step of a base is a 512th of a row's size, a coarse one a 32nd
            return (
                Field("base", "level", 16, BLOCK, signed=True),
                Field("base_coarse", "level", 12, BLOCK, offset=4, signed=True),
                Field("delta", "level", **delta),
            )
        return (
            Field("index", "index", 4, BLOCK),
            Field("amplitude", "level", 6, BLOCK, offset=4),
            Field("diff", "cyclic", 2, BLOCK, offset=10),
            Field("phase", "cyclic", 4, BLOCK, offset=12),
            Field("delta", "index", **delta),
        )

    def params(self, shape):
        entries = 4 if self.mode == "mul" else 16
        return (
            Param(self.table, (entries,), "shared"),
            Param("out_scale", (shape[0],), "out"),
        )

    def initial_params(self, weight, seed, feedback=False, importance=None):
        table = LEVELS if self.mode == "xor" else MULTIPLIERS if self.fitted else FIXED_MULTIPLIERS
        # Held to float16 values, so that a file stores them in 16 bits exactly.
        return {self.table: torch.tensor(table).half().float(), "out_scale": row_scale(weight)}

    def decode_tiles(self, codes, params, shape):
        byte, table = codes.long(), params[self.table]
        base = byte[..., 0] | byte[..., 1] << 8
        deltas = (byte[..., 2] | byte[..., 3] << 8)[..., None]
        delta = (deltas >> torch.arange(0, 16, 2, device=codes.device)) & 3
        if self.mode == "mul":
            signed = torch.where(base >= 1 << 15, base - (1 << 16), base)[..., None]
            return (signed.to(table.dtype) * STEP * table[delta]).flatten(1)
        factor, index = xor_parts(base[..., None], delta)
        return (factor.to(table.dtype) / 8192 * table[index]).flatten(1)

    def encode_reference(self, target, importance, params):
        w = target.reshape(-1, BLOCK)
        h = torch.ones(target.shape[1]) if importance is None else importance
        h = h.expand_as(target).reshape(-1, BLOCK)
        table = params[self.table]
        search = search_mul if self.mode == "mul" else search_xor
        base, delta = search(w, h, table)
        word = torch.stack((base & 0xFFFF, (delta << torch.arange(0, 16, 2)).sum(-1)), -1)
        codes = torch.stack((word & 255, word >> 8), -1).to(torch.uint8)
        return codes.view(target.shape[0], -1, 4), params


def xor_parts(base: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(T * (amp + 1), index of the level) of each weight's code; the factor counts in 1/8192."""
    code = base ^ torch.tensor(MASKS, device=base.device)[delta]
    turn = ((code >> 12) + ((code >> 10) & 3) * 4) & 15
    cosine = cyclic()[0].long().to(base.device)[turn]
    return cosine * (((code >> 4) & 63) + 1), code & 15


def search_mul(w: Tensor, h: Tensor, multipliers: Tensor) -> tuple[Tensor, Tensor]:
    """Integer bases (groups,) and deltas (groups, 8) for w (groups, 8): every choice of deltas
    that some base makes, each with its best base."""
    m, order = multipliers.sort()
    middle = (m[1:] + m[:-1]) / 2
    border = (middle / w[..., None]).flatten(1) * (1 - 2**-20)  # 1 / base, one beyond each
    ends = torch.tensor([1e30, -1e30]).expand(len(w), 2)
    inverse = torch.cat((border, ends), 1)[..., None]  # (groups, trials, 1)
    chosen = m[torch.bucketize((w[:, None] * inverse).nan_to_num(0), middle)]
    dot, power = ((h * w)[:, None] * chosen).sum(-1), (h[:, None] * chosen**2).sum(-1)
    best = (dot**2 / power).nan_to_num(0, 0).argmax(1, keepdim=True)
    base = (dot / power).gather(1, best).nan_to_num(0, 0, 0)
    base = (base / STEP).round().clamp(-32767, 32767)
    value = base[..., None] * STEP * m
    return base[:, 0].long(), order[(w[..., None] - value).abs().argmin(-1)]


def search_xor(w: Tensor, h: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Bases (groups,) and deltas (groups, 8) for w (groups, 8) by trying every base with diff = 0,
    to which all others are equal."""
    base = torch.arange(1 << 14)
    base = base >> 10 << 12 | base & 1023
    factor, index = xor_parts(base[:, None], torch.arange(4))
    value = factor / 8192 * levels[index]  # (bases, 4)
    found = []
    for own, weight in zip(w.split(16), h.split(16), strict=True):
        cost = torch.zeros(len(own), len(base))
        for i in range(BLOCK):
            miss = torch.full_like(cost, float("inf"))
            for d in range(4):
                miss = torch.minimum(miss, (own[:, i, None] - value[:, d]).abs_())
            cost.addcmul_(miss, miss * weight[:, i, None])
        found.append(cost.argmin(1))
    at = torch.cat(found) if found else torch.zeros(0, dtype=torch.long)
    return base[at], (w[..., None] - value[at][:, None]).abs().argmin(-1)

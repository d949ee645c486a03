"""adaptive_precision: 12, 6 or 2 bits a weight by the importance of groups of 16 columns.

Layout in csrc/codecs/adaptive_precision.h.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..packed import round_to_half
from .base import Codec, Param, Tile
from .fields import Field
from .uniform import pack_bits, unpack_bits

GROUP = 16
BITS = (2, 6, 12)  # by class


@dataclass(frozen=True)
class AdaptivePrecision(Codec):
    """window: columns of a row that are ranked together, a multiple of 16; high, middle: shares of
    its groups that get 12 and 6 bits, the others get 2.

    The defaults take 6.5 bits per weight, 0.125 for the map and 0.375 for the three scales of a
    window: 7 in all.
    """

    name: ClassVar[str] = "adaptive_precision"
    rates: ClassVar[dict] = {
        3: {"high": 0.0, "middle": 0.25},
        4: {"high": 0.0, "middle": 0.5},
        6.5: {},
        7.5: {"high": 0.25, "middle": 0.75},
    }
    window: int = 128
    high: float = 0.25
    middle: float = 0.5

    def __post_init__(self):
        def number(x):
            return isinstance(x, (int, float)) and not isinstance(x, bool)

        if not (number(self.window) and 16 <= self.window <= 65536 and self.window % 16 == 0):
            raise ValueError(
                "adaptive_precision: window must be a multiple of 16 from 16 to 65536, "
                f"got {self.window!r}"
            )
        if not (
            number(self.high)
            and number(self.middle)
            and 0 <= self.high <= 1
            and 0 <= self.middle <= 1
            and self.high + self.middle <= 1
        ):
            raise ValueError(
                "adaptive_precision: high and middle must be shares of at most 1 together, "
                f"got {self.high!r} and {self.middle!r}"
            )
        object.__setattr__(self, "window", int(self.window))
        object.__setattr__(self, "high", float(self.high))
        object.__setattr__(self, "middle", float(self.middle))

    def counts(self) -> tuple[int, int, int]:
        """Groups of a window with 2, 6 and 12 bits."""
        n = self.window // GROUP
        high = min(n, math.floor(self.high * n + 0.5))
        middle = min(n - high, math.floor(self.middle * n + 0.5))
        return n - high - middle, middle, high

    def tile(self, shape):
        codes = sum(2 * bits * count for bits, count in zip(BITS, self.counts(), strict=True))
        return Tile(1, self.window, -(-self.window // GROUP // 4) + codes)

    def fields(self, shape):
        where = [functools.partial(self._code_bits, kind) for kind in range(len(BITS))]
        return tuple(
            Field(f"level{bits}", "level", bits, 1, count=self.window, where=where[kind])
            for kind, bits in enumerate(BITS)
            if self.counts()[kind]
        )

    def _code_bits(self, kind: int, codes: Tensor) -> tuple[Tensor, Tensor]:
        """First bits of all weights' codes, and which weights are of the class `kind`."""
        kinds, start, inside = self._groups(codes)
        exists = inside & (kinds == kind)
        j = BITS[kind] * torch.arange(GROUP, device=codes.device)
        bit = torch.where(exists, 8 * start, 0)[..., None] + j
        return bit.flatten(2), exists[..., None].expand(bit.shape).flatten(2)

    def _groups(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Class and first byte of the groups of tiles (..., bytes), and which lie inside them."""
        n = self.window // GROUP
        head = -(-n // 4)
        kinds = unpack_bits(codes[..., :head], 2, n).clamp_max(2)
        sizes = 2 * torch.tensor(BITS, device=codes.device)[kinds]
        start = head + sizes.cumsum(-1) - sizes
        return kinds, start, start + sizes <= codes.shape[-1]

    def params(self, shape):
        return (Param("scale", (*self.tile(shape).grid(shape), 3), "both"),)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        return {p.name: torch.zeros(p.sizes) for p in self.params(tuple(weight.shape))}

    def decode_tiles(self, codes, params, shape):
        n, tiles = self.window // GROUP, codes.flatten(0, 1)
        kinds, start, inside = self._groups(tiles)
        at = start[..., None] + torch.arange(2 * BITS[2], device=codes.device)
        group = tiles[:, None].expand(-1, n, -1).gather(-1, at.clamp_max(codes.shape[-1] - 1))
        scale = params["scale"].flatten(0, 1)
        level = torch.zeros((*kinds.shape, GROUP), dtype=scale.dtype, device=codes.device)
        for kind, bits in enumerate(BITS):
            code = unpack_bits(group[..., : 2 * bits], bits, GROUP)
            own = (2 * code - (2**bits - 1)).to(scale.dtype) * _unit(bits).to(scale.dtype)
            level = torch.where((kinds == kind)[..., None], own, level)
        w = level * scale.gather(1, kinds)[..., None]
        w = torch.where(inside[..., None], w, 0)
        return w.flatten(1).view(codes.shape[0], -1)

    def encode_reference(self, target, importance, params):
        n, (rows, width) = self.window // GROUP, target.shape
        w = target.reshape(-1, n, GROUP)
        h = torch.ones(width) if importance is None else importance
        h = h.view(1, -1, n, GROUP).expand(rows, -1, -1, -1).reshape(-1, n, GROUP)
        # Zeros at the end are the padding of a row, which must not draw a scale to itself.
        power = w.abs().amax(-1)
        real = power.flip(1).cummax(1).values.flip(1) > 0
        order = (h * w.double() ** 2).sum(-1).sort(dim=1, descending=True, stable=True).indices
        low, middle, high = self.counts()
        kinds = torch.empty_like(order)
        ranked = torch.tensor([2] * high + [1] * middle + [0] * low)
        kinds.scatter_(1, order, ranked.expand_as(order))
        head = torch.nn.functional.pad(kinds, (0, -n % 4))
        pieces = [pack_bits(head, 2)]
        scales, parts = torch.zeros(len(w), 3), {}
        for kind, count in enumerate((low, middle, high)):
            if not count:
                continue
            at = (kinds == kind).nonzero()[:, 1].view(-1, count)
            own = w.gather(1, at[..., None].expand(-1, -1, GROUP))
            weight = (h * real[..., None]).gather(1, at[..., None].expand(-1, -1, GROUP))
            scales[:, kind] = _fit(own.flatten(1), weight.flatten(1), BITS[kind])
            codes = _nearest(own.flatten(1), scales[:, kind, None], BITS[kind])
            parts[kind] = pack_bits(codes.unflatten(1, (count, GROUP)), BITS[kind])
        tiles = []
        for t in range(len(w)):  # groups of a window differ in size
            taken = dict.fromkeys(parts, 0)
            tile = [pieces[0][t]]
            for kind in kinds[t].tolist():
                tile.append(parts[kind][t, taken[kind]])
                taken[kind] += 1
            tiles.append(torch.cat(tile))
        codes = torch.stack(tiles).view(rows, width // self.window, -1)
        return codes, {"scale": scales.view(rows, -1, 3)}


def _unit(bits: int) -> Tensor:
    """One over the top level, rounded to float32."""
    return torch.tensor(1 / (2**bits - 1), dtype=torch.float32)


def _nearest(w: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2**bits - 1
    return ((w / scale.where(scale != 0, 1) * top + top) / 2).round().clamp(0, top).int()


def _fit(w: Tensor, h: Tensor, bits: int) -> Tensor:
    """The scale of each row of w (n, weights) for odd levels: clipping ranges, each refitted."""
    top, peak = 2**bits - 1, w.abs().amax(1, keepdim=True)
    best, found = torch.full_like(peak, float("inf")), torch.zeros_like(peak)
    for shrink in torch.linspace(1, 0.35, 21).tolist():
        scale = shrink * peak
        for _ in range(5):
            scale = round_to_half(scale)
            level = (2 * _nearest(w, scale, bits) - top).to(w.dtype) * _unit(bits)
            error = (h * (w - level * scale) ** 2).sum(1, keepdim=True)
            better = error < best
            best, found = torch.where(better, error, best), torch.where(better, scale, found)
            scale = (h * level * w).sum(1, True) / (h * level**2).sum(1, True).clamp_min(1e-30)
    return found[:, 0]

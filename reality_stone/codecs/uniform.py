"""uniform: integers of 2 to 8 bits, one scale (and zero) per group of a row. The honest baseline.

Source: round-to-nearest with a searched clipping range; layout in csrc/codecs/uniform.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..packed import Packed, round_to_half
from .base import Codec, Param, Tile, flag, whole_number
from .fields import Field

EVEN = 1e-5  # of a step: levels further from an even grid are not this codec's


@dataclass(frozen=True)
class Uniform(Codec):
    """bits: 2 to 8; group: weights of a row that share a scale; symmetric: no zero point."""

    name: ClassVar[str] = "uniform"
    bits: int = 4
    group: int = 64
    symmetric: bool = False

    def __post_init__(self):
        object.__setattr__(self, "bits", whole_number(self.bits, 2, 8, "uniform: bits"))
        object.__setattr__(self, "group", whole_number(self.group, 1, 1 << 20, "uniform: group"))
        flag(self.symmetric, "uniform: symmetric")

    def tile(self, shape):
        return Tile(1, self.group, -(-self.group * self.bits // 8))

    def fields(self, shape):
        return (Field("level", "level", self.bits, 1, stride=self.bits, count=self.group),)

    def params(self, shape):
        sizes = self.tile(shape).grid(shape)
        scale, zero = Param("scale", sizes, "both"), Param("zero", sizes, "both")
        return (scale,) if self.symmetric else (scale, zero)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        return {p.name: torch.zeros(p.sizes) for p in self.params(tuple(weight.shape))}

    def from_levels(self, codes, levels, scale):
        order = levels.argsort()
        step = (levels.max() - levels.min()) / (len(levels) - 1)
        grid = levels.min() + step * torch.arange(len(levels))
        zero = -levels.min() / step
        own = 2 ** (self.bits - 1)
        if not (levels[order] - grid).abs().max() <= EVEN * step:
            return None
        # A symmetric scale has its zero in the middle of its codes; other grids may lie inside it.
        shift = (own - zero).round() if self.symmetric else torch.zeros(())
        if self.symmetric and (zero + shift - own).abs() > EVEN:
            return None
        if shift < 0 or shift + len(levels) > 2**self.bits:
            return None
        shape = (codes.shape[0], codes.shape[1])
        rows, tiles = self.tile(shape).grid(shape)
        code = order.argsort()[codes.long()] + shift.long()
        code = torch.nn.functional.pad(code, (0, tiles * self.group - shape[1]))
        sizes = (rows, tiles)
        params = {"scale": round_to_half((scale * step)[:, None]).expand(sizes).contiguous()}
        if not self.symmetric:
            params["zero"] = round_to_half(zero).expand(sizes).contiguous()
        return Packed(self, shape, pack_bits(code.view(*sizes, self.group), self.bits), params)

    def decode_tiles(self, codes, params, shape):
        level = unpack_bits(codes, self.bits, self.group).to(params["scale"].dtype)
        level = level - (2 ** (self.bits - 1) if self.symmetric else params["zero"][..., None])
        return (level * params["scale"][..., None]).flatten(1)

    def encode_reference(self, target, importance, params):
        w = target.unflatten(1, (-1, self.group))
        h = torch.ones_like(w[:1]) if importance is None else importance.view(1, -1, self.group)
        top = 2**self.bits - 1
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        best = torch.full_like(low, float("inf"))
        best_scale, best_zero = torch.zeros_like(low), torch.zeros_like(low)
        for shrink in torch.linspace(1, 0.4, 25).tolist():
            if self.symmetric:
                side = torch.where(-low >= high, 1.0, -1.0)
                zero = torch.full_like(low, 2 ** (self.bits - 1))
                scale = side * shrink * torch.maximum(-low, high) / zero
            else:
                scale = shrink * (high - low) / top
                zero = -((low + high) / 2 - shrink * (high - low) / 2) / scale.where(scale != 0, 1)
            for _ in range(4):
                scale, zero = round_to_half(scale), round_to_half(zero)
                codes = self._nearest(w, scale, zero)
                error = (h * (w - (codes - zero) * scale) ** 2).sum(-1, keepdim=True)
                better = error < best
                best = torch.where(better, error, best)
                best_scale = torch.where(better, scale, best_scale)
                best_zero = torch.where(better, zero, best_zero)
                scale, zero = self._refit(w, h, codes, scale, zero)
        codes = self._nearest(w, best_scale, best_zero).to(torch.uint8)
        fitted = {"scale": best_scale[..., 0], "zero": best_zero[..., 0]}
        return pack_bits(codes, self.bits), {name: fitted[name] for name in params}

    def _nearest(self, w: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (w / scale.where(scale != 0, 1) + zero).round().clamp(0, 2**self.bits - 1)

    def _refit(self, w, h, codes, scale, zero) -> tuple[Tensor, Tensor]:
        if self.symmetric:
            q = codes - zero
            return (h * q * w).sum(-1, True) / (h * q * q).sum(-1, True).clamp_min(1e-30), zero
        h = h.expand_as(w)
        total = h.sum(-1, True)
        mean_q, mean_w = (h * codes).sum(-1, True) / total, (h * w).sum(-1, True) / total
        q = codes - mean_q
        power = (h * q * q).sum(-1, True)
        scale = torch.where(power > 0, (h * q * w).sum(-1, True) / power.clamp_min(1e-30), scale)
        return scale, mean_q - mean_w / scale.where(scale != 0, 1)


def unpack_bits(codes: Tensor, bits: int, count: int) -> Tensor:
    """(..., bytes) uint8 -> (..., count) integers of `bits` bits, least significant bit first."""
    bit = (codes.unsqueeze(-1).int() >> torch.arange(8, device=codes.device)) & 1
    bit = bit.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    return (bit << torch.arange(bits, device=codes.device)).sum(-1)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """The inverse of unpack_bits; the last byte is filled with zero bits."""
    bit = ((values.unsqueeze(-1).int() >> torch.arange(bits)) & 1).flatten(-2)
    bit = torch.nn.functional.pad(bit, (0, -bit.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bit << torch.arange(8)).sum(-1).to(torch.uint8)

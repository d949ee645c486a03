"""cyclic_scalar: one phase code of 8 or 16 bits per weight, one scale per group of a row.

Source: the documents' cyclic and hyperbolic derivative tables read as a scalar quantizer; layout in
csrc/codecs/cyclic_scalar.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..packed import round_to_half
from .base import Codec, Param, Tile, whole_number
from .cyclic_tables import cyclic_scalar, cyclic_scalar_slopes
from .fields import Field
from .slopes import Slopes
from .trig import turn_cosine


@dataclass(frozen=True)
class CyclicScalar(Codec):
    """bits: 8 or 16; group: weights of a row that share a scale."""

    name: ClassVar[str] = "cyclic_scalar"
    rates: ClassVar = {8: {"bits": 8}, 16: {"bits": 16}}
    bits: int = 8
    group: int = 64

    def __post_init__(self):
        if self.bits not in (8, 16):
            raise ValueError(f"cyclic_scalar: bits must be 8 or 16, got {self.bits!r}")
        object.__setattr__(self, "bits", int(self.bits))
        group = whole_number(self.group, 1, 1 << 20, "cyclic_scalar: group")
        object.__setattr__(self, "group", group)

    def tile(self, shape):
        return Tile(1, self.group, self.group * self.bits // 8)

    def fields(self, shape):
        code = {"cols": 1, "stride": self.bits, "count": self.group}
        if self.bits == 8:
            return (
                Field("phase", "cyclic", 4, **code),
                Field("diff", "cyclic", 2, offset=4, **code),
                Field("family", "index", 2, offset=6, **code),
            )
        return (
            Field("phase", "cyclic", 8, **code),
            Field("phase_coarse", "cyclic", 4, offset=4, **code),
            Field("diff", "cyclic", 2, offset=8, **code),
            Field("amplitude", "level", 6, offset=10, **code),
        )

    def params(self, shape):
        return (Param("scale", self.tile(shape).grid(shape), "both"),)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        return {p.name: torch.zeros(p.sizes) for p in self.params(tuple(weight.shape))}

    def _levels(self, dtype: torch.dtype) -> Tensor:
        """What each code is times the group's step: (2^bits,)."""
        if self.bits == 8:
            return cyclic_scalar().flatten().to(dtype)
        code = torch.arange(1 << 16)
        cosine = turn_cosine(code + 64 * (code >> 8 & 3), 256).float().to(dtype)
        return cosine * ((code >> 10) + 1).to(dtype).mul(1 / 64)

    @property
    def _unit(self) -> Tensor:
        """step = scale * unit, float32."""
        return torch.tensor(1 / 127 if self.bits == 8 else 1.0)

    def decode_tiles(self, codes, params, shape):
        scale = params["scale"]
        level = self._levels(scale.dtype).to(codes.device)[self._codes(codes)]
        step = scale * self._unit.to(scale)
        return (level * step[..., None]).flatten(1)

    def slopes(self, codes, params, shape):
        code, scale = self._codes(codes), params["scale"]
        step = (scale * self._unit.to(scale))[..., None]

        def along(table: Tensor) -> Tensor:
            return (table.to(scale)[code] * step).flatten(1)

        factor = along(self._levels(scale.dtype))
        if self.bits == 8:
            return Slopes(factor, {"phase": along(cyclic_scalar_slopes().flatten())})
        every = torch.arange(1 << 16)
        turn, amp = every + 64 * (every >> 8 & 3), (every >> 10) + 1
        cosine, slope = (turn_cosine(k, 256).float().double() / 64 for k in (turn, turn + 64))
        return Slopes(factor, {"phase": along(slope * amp), "amplitude": along(cosine)})

    def _codes(self, codes: Tensor) -> Tensor:
        """(rows, groups, group) int64."""
        code = codes.long()
        return code if self.bits == 8 else code[..., 0::2] | code[..., 1::2] << 8

    def encode_reference(self, target, importance, params):
        w = target.unflatten(1, (-1, self.group)).double()
        h = torch.ones_like(w[:1]) if importance is None else importance.view(1, -1, self.group)
        level = self._levels(torch.float64) * self._unit.double()
        value, order = level.sort(stable=True)
        middle = (value[1:] + value[:-1]) / 2
        peak = w.abs().amax(-1, keepdim=True)
        best = torch.full_like(peak, float("inf"))
        best_scale = torch.zeros_like(peak)

        def nearest(scale: Tensor) -> Tensor:
            return torch.bucketize(w / scale.where(scale != 0, 1), middle)

        for reach in torch.linspace(0.7, 1.2, 13).tolist():
            for side in (1, -1):
                scale = side * reach * peak
                for _ in range(3):
                    scale = round_to_half(scale.float()).double()
                    q = value[nearest(scale)]
                    error = (h * (w - scale * q) ** 2).sum(-1, keepdim=True)
                    better = error < best
                    best = torch.where(better, error, best)
                    best_scale = torch.where(better, scale, best_scale)
                    power = (h * q * q).sum(-1, True)
                    scale = (h * q * w).sum(-1, True) / power.where(power > 0, 1)
        code = order[nearest(best_scale)]
        if self.bits == 16:
            code = torch.stack((code & 255, code >> 8), -1).flatten(-2)
        return code.to(torch.uint8), {"scale": best_scale[..., 0].float()}

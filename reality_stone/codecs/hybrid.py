"""hybrid: a block as eight smooth functions plus the largest terms of the cosine transform of the
rest. Layout and order of operations in csrc/codecs/hybrid.h.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..feedback import Hessian, refit_scales
from .base import Codec, Param, Tile, check_weight, row_scale, whole_number
from .trig import turn_cosine

SMOOTH = 8
WEIGHTED_ROUNDS = 12
UNIT = 2.0**-8  # of stored float16 values


@dataclass(frozen=True)
class Hybrid(Codec):
    """block: side of a block, a power of two from 8 to 256; terms: cosine terms kept in each.

    (16 + 4 terms) bytes a block: with the defaults 2 bits per weight and a scale per row.
    """

    name: ClassVar[str] = "hybrid"
    rates: ClassVar[dict] = {
        0.5: {"terms": 60},
        1: {"terms": 124},
        2: {"terms": 252},
        4: {"terms": 508},
    }
    block: int = 64
    terms: int = 252

    def __post_init__(self):
        if self.block not in (8, 16, 32, 64, 128, 256) or isinstance(self.block, bool):
            raise ValueError(
                f"hybrid: block must be a power of two from 8 to 256, got {self.block!r}"
            )
        object.__setattr__(self, "block", int(self.block))
        terms = whole_number(self.terms, 0, self.block**2, "hybrid: terms")
        object.__setattr__(self, "terms", terms)

    def tile(self, shape):
        return Tile(self.block, self.block, 2 * SMOOTH + 4 * self.terms)

    def params(self, shape):
        return (Param("out_scale", (shape[0],), "out"),)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        return {"out_scale": row_scale(weight)}

    def encode(self, weight, hessian=None, outputs=None, *, seed=0, label="", given=None):
        weight = check_weight(weight, self.name)
        prepared = Hessian.prepare(hessian, weight.shape[1], label)
        plain = super().encode(weight, seed=seed, label=label, given=given)
        if prepared is None or not weight.numel():
            return plain
        scaled = replace(plain, params=plain.params | refit_scales(plain, weight, prepared))
        fed = super().encode(weight, prepared, seed=seed, label=label, given=given)
        h, power = prepared.damped(), weight.double().pow(2).sum().item()

        def loss(packed):
            miss = weight - packed.decode()
            # A block keeps so little that errors fed back may pile up instead of cancelling: not
            # beyond what leaving the weight out would lose.
            if packed is not plain and miss.double().pow(2).sum().item() > power:
                return math.inf
            return ((miss @ h) * miss).sum(dtype=torch.float64).item()

        return min(plain, scaled, fed, key=loss)

    def decode_tiles(self, codes, params, shape):
        dtype, side = params["out_scale"].dtype, self.block
        tiles = codes.flatten(0, 1)
        words = tiles[:, : 2 * (SMOOTH + self.terms)].contiguous()
        coefficient = _halves(words[:, : 2 * SMOOTH]).to(dtype)
        position = words[:, 2 * SMOOTH :].reshape(len(words), self.terms, 2).long()
        position = (position[..., 0] | position[..., 1] << 8) & (side * side - 1)
        value = _halves(tiles[:, 2 * (SMOOTH + self.terms) :]).to(dtype)
        cosine, smooth = (t.to(codes.device, dtype) for t in tables(side))
        w = torch.zeros(len(tiles), side, side, dtype=dtype, device=codes.device)
        for k in range(SMOOTH):
            w = w + coefficient[:, k, None, None] * smooth[k]
        g, every = torch.zeros_like(w), torch.arange(len(tiles), device=codes.device)
        for e in range(self.terms):
            u, v = position[:, e] // side, position[:, e] % side
            g[every, u] = g[every, u] + value[:, e, None] * cosine[v]
        w = w + _columns(g, cosine)
        w = w.view(codes.shape[0], codes.shape[1], side, side)
        return w.transpose(1, 2).flatten(2).flatten(0, 1)

    def encode_reference(self, target, importance, params):
        side, (rows, width) = self.block, target.shape
        w = target.unflatten(0, (-1, side)).unflatten(2, (-1, side)).transpose(1, 2)
        w = w.flatten(0, 1).double()
        h = torch.ones(width) if importance is None else importance
        h = h.view(1, -1, 1, side).double().expand(rows // side, -1, 1, -1).flatten(0, 1)
        h = h / h.amax(-1, keepdim=True)
        cosine, smooth = (t.double() for t in tables(side))
        root = h.sqrt().expand_as(w).flatten(1)
        design = smooth.flatten(1).t() * root[..., None]
        kept = torch.zeros_like(w)
        for _ in range(1 if importance is None else WEIGHTED_ROUNDS):
            goal = (root * (w - kept).flatten(1))[..., None]
            coefficient = _rounded(torch.linalg.lstsq(design, goal).solution[..., 0])
            rest = w - torch.einsum("nk,kij->nij", coefficient, smooth)
            spectrum = cosine @ (h * (rest - kept) + kept) @ cosine.t()
            position = spectrum.flatten(1).abs().topk(self.terms, dim=1).indices.sort(1).values
            value = _rounded(spectrum.flatten(1).gather(1, position))
            chosen = torch.zeros_like(spectrum).flatten(1).scatter(1, position, value)
            kept = cosine.t() @ chosen.view_as(w) @ cosine
        places = torch.stack((position & 255, position >> 8), -1).to(torch.uint8).flatten(1)
        parts = (_half_bytes(coefficient), places, _half_bytes(value))
        codes = torch.cat(parts, 1).view(rows // side, width // side, -1)
        return codes, dict(params)


@functools.cache
def tables(side: int) -> tuple[Tensor, Tensor]:
    """The orthonormal DCT-II (frequency, place) and the smooth functions (8, row, column)."""
    i = torch.arange(side)
    size = torch.full((side, 1), 2.0, dtype=torch.float64)
    size[0] = 1.0
    cosine = (size / side).sqrt() * turn_cosine(i[:, None] * (2 * i + 1), 4 * side)
    x = (2 * i - (side - 1)).double() / float(side - 1)
    x, y = x.expand(side, side), x[:, None].expand(side, side)
    square = x * x + y * y
    rho = square.sqrt()
    smooth = torch.stack(
        (
            torch.ones_like(rho),
            rho,
            square,
            rho * square,
            x / rho,
            y / rho,
            (x * x - y * y) / square,
            2.0 * x * y / square,
        )
    )
    return cosine.float(), smooth.float()


def _columns(g: Tensor, cosine: Tensor) -> Tensor:
    """The inverse transform down the columns of g (n, side, side) by partial butterflies."""
    side = g.shape[1]
    t = cosine[0, 0] * g[:, :1]
    n = 2
    while n <= side:
        odd = torch.zeros_like(g[:, : n // 2])
        for u in range(side // n, side, 2 * side // n):
            odd = odd + cosine[u, : n // 2, None] * g[:, u : u + 1]
        t = torch.cat((t + odd, (t - odd).flip(1)), 1)
        n *= 2
    return t


def _halves(codes: Tensor) -> Tensor:
    """Little-endian float16 in units of 1/256, uint8 (..., 2n), as float32 (..., n); those not
    finite as zero."""
    word = codes.unflatten(-1, (codes.shape[-1] // 2, 2)).int()
    bits = word[..., 0] | word[..., 1] << 8
    value = torch.where(bits > 32767, bits - 65536, bits).to(torch.int16).view(torch.float16)
    sign = torch.where(bits > 32767, -0.0, 0.0)
    return torch.where(value.isfinite(), value.float() * UNIT, sign)


def _rounded(values: Tensor) -> Tensor:
    """Float64 values a tile can hold."""
    return (values / UNIT).clamp(-65504, 65504).half().double() * UNIT


def _half_bytes(values: Tensor) -> Tensor:
    bits = (values / UNIT).half().view(torch.int16).int() & 0xFFFF
    return torch.stack((bits & 255, bits >> 8), -1).to(torch.uint8).flatten(-2)

"""bitfield: blocks of weights along one of 256 basis vectors, each as long as one of 64 functions
of a radius says. Layout in csrc/codecs/bitfield.h, the functions in radial.py.

Source: the bitfield of the Riemannian basis encoding, 22 bits, and its extension to 32.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ..packed import over_scale, round_to_half
from .base import Codec, Param, Tile, check_words, one_of, row_scale, whole_number
from .bitfield_fit import fit_basis, fit_range
from .fields import Field
from .radial import (
    CATEGORIES,
    FUNCTIONS,
    LARGEST_RADIUS,
    LEAST_RADIUS,
    held_r_max,
    radial_slopes,
    radial_table,
)
from .slopes import Slopes
from .trig import turn_cosine

BASIS = 256
PHASES = range(0, 64, 8)  # that encoders try with word=32


@dataclass(frozen=True)
class Bitfield(Codec):
    """word: 22 or 32 bits per block; block: weights of a row that share a code; amplitude: byte, or
    uint16 and float32, which add a finer one beside each code of 22 bits; basis: fitted by kmeans
    (and least squares) or left as svd, orthonormal frames of clusters of blocks; functions: what
    encoders choose from: all, or some of poincare, lorentz, klein, special, c0s0d0 ... c3s3d3
    joined by "_"; r_max: the first range of radii, 0.5 to 8, or 0 to fit it.
    """

    name: ClassVar[str] = "bitfield"
    # Basis vectors, not bits, limit blocks of eight: their size is what a rate chooses.
    rates: ClassVar[dict[float, dict[str, Any]]] = {
        2.75: {"word": 22, "block": 8},
        5.5: {"word": 22, "block": 4},
    }
    word: int = 22
    amplitude: str = one_of("byte", "uint16", "float32")
    basis: str = one_of("kmeans", "svd")
    block: int = 8
    functions: str = "all"
    r_max: float = 0

    def __post_init__(self):
        if self.word not in (22, 32) or isinstance(self.word, bool):
            raise ValueError(f"bitfield: word must be 22 or 32, got {self.word!r}")
        object.__setattr__(self, "word", int(self.word))
        check_words(self)
        if self.amplitude != "byte" and self.word != 22:
            raise ValueError(f"bitfield: amplitude={self.amplitude} needs word=22")
        object.__setattr__(self, "block", whole_number(self.block, 1, 1 << 20, "bitfield: block"))
        r = self.r_max
        number = isinstance(r, (int, float)) and not isinstance(r, bool)
        if not number or not (r == 0 or LEAST_RADIUS <= r <= LARGEST_RADIUS):
            raise ValueError(f"bitfield: r_max must be 0 (fitted) or from 0.5 to 8, got {r!r}")
        object.__setattr__(self, "r_max", float(r))
        parse_functions(self.functions, self.word)

    @classmethod
    def high_compression(cls, **settings: Any) -> Bitfield:
        """Eight bits of amplitude, radii up to 1."""
        return cls(**{"r_max": 1} | settings)

    @classmethod
    def practical_lossless(cls, **settings: Any) -> Bitfield:
        """Sixteen bits beside each code, radii up to 2: relative (Frobenius) error 1e-3 wherever
        every block lies along one of at most 256 lines, as blocks of 1 do."""
        return cls(**{"amplitude": "uint16", "block": 1, "r_max": 2} | settings)

    @classmethod
    def ultra_high_precision(cls, **settings: Any) -> Bitfield:
        """A float32 beside each code, orthonormal bases, radii up to 4: relative error 1e-6 where
        practical_lossless has 1e-3."""
        return cls(**{"amplitude": "float32", "basis": "svd", "block": 1, "r_max": 4} | settings)

    @property
    def refits(self) -> tuple[str, ...]:
        """A refit would not leave the frames of basis=svd orthonormal."""
        return ("basis",) if self.basis == "kmeans" else ()

    @property
    def codes_per_tile(self) -> int:
        return 4 if self.word == 22 else 1

    def tile(self, shape):
        width = {"byte": 0, "uint16": 2, "float32": 4}[self.amplitude]
        size = 11 + 4 * width if self.word == 22 else 4
        return Tile(1, self.codes_per_tile * self.block, size)

    def fields(self, shape):
        if self.word == 22:
            code = {"cols": self.block, "stride": 22, "count": 4}
            found = [
                Field("amplitude", "level", 8, **code),
                Field("index", "index", 8, offset=10, **code),
            ]
            if self.amplitude == "uint16":  # in steps of a 256th of one of the amplitude's
                beside = code | {"stride": 16}
                found.append(Field("fraction", "level", 8, offset=96, **beside))
            names = {"diff": (8, 2), "sub": (18, 2), "cat": (20, 2)}
        else:
            code = {"cols": self.block}
            found = [
                Field("amplitude", "level", 10, **code),
                Field("amplitude_coarse", "level", 8, offset=2, **code),
                Field("sign", "sign", 1, offset=11, **code),
                Field("index", "index", 8, offset=12, **code),
                Field("phase", "cyclic", 8, offset=24, **code),
            ]
            names = {"diff": (10, 1), "sub": (20, 2), "cat": (22, 2)}
        # Parts of a function's number, where every neighbour of an allowed function is one.
        allowed = set(parse_functions(self.functions, self.word))
        for (name, (offset, width)), first in zip(names.items(), (0, 2, 4), strict=True):
            if all(f ^ 1 << first + k in allowed for f in allowed for k in range(width)):
                found.append(Field(name, "index", width, offset=offset, **code))
        return tuple(found)

    def params(self, shape):
        basis = Param("basis", (BASIS, self.block), "shared")
        return basis, Param("r_max", (1,), "shared"), Param("out_scale", (shape[0],), "out")

    def is_injective(self, r_max: float = 0) -> bool:
        """Whether no two codes with the same basis vector (and phase) mean the same factor: the
        functions take each float32 value once over all their radii. `r_max`: the range of radii, by
        default that of the setting or 8. With all functions this is False, for several are equal.
        """
        values, _ = self._table(r_max or self.r_max or LARGEST_RADIUS)
        return np.unique(values).size == values.size

    def _table(self, r_max: float) -> tuple[np.ndarray, np.ndarray]:
        """Values of the allowed functions (float32) and their entries."""
        allowed = np.isin(entry_functions(self.word), parse_functions(self.functions, self.word))
        entries = np.flatnonzero(allowed)
        return radial_table(self.word, r_max)[0].astype(np.float32)[entries], entries

    # --- fitting ---

    def initial_params(self, weight, seed, feedback=False, importance=None):
        wide = self.amplitude != "byte"
        if not weight.numel():
            basis = torch.ones(BASIS, self.block)
            r_max = torch.tensor([self.r_max or 1.0])
            return {"basis": basis, "r_max": r_max, "out_scale": torch.zeros(weight.shape[0])}
        # Against the largest weight of a row no factor is beyond what the table reaches.
        scale = round_to_half(weight.abs().amax(1)) if wide else row_scale(weight)
        inner = over_scale(weight, scale[:, None])
        lines = fit_basis(inner, self.block, BASIS, self.basis, seed, importance, exact=wide)
        r_max, size, signs = fit_range(
            inner, lines, lambda r: self._table(r), self.r_max, cover=wide, byte=self.word == 22
        )
        basis = lines * size
        if not signs:  # functions of one sign: half of the vectors point either way
            basis = torch.cat((basis[: BASIS // 2], -basis[: BASIS // 2]))
        basis = basis if wide else round_to_half(basis)
        return {"basis": basis, "r_max": torch.tensor([r_max]), "out_scale": scale}

    # --- reference ---

    def decode_tiles(self, codes, params, shape):
        basis = params["basis"]
        code = self.unpack(codes)
        idx = (code >> (10 if self.word == 22 else 12)) & 255
        factor = self._factor(codes, code, params["r_max"], basis.dtype)
        return (factor[..., None] * basis[idx]).flatten(1)

    def slopes(self, codes, params, shape):
        basis, code = params["basis"], self.unpack(codes)
        entry, r_max = self._entry(code), held_r_max(params["r_max"][0].item())
        slope, step = (
            torch.from_numpy(t).to(basis)[entry] for t in radial_slopes(self.word, r_max)
        )
        by = {"radius": slope, "amplitude": slope * step}
        if self.amplitude != "byte":  # a line between two entries
            here, following = self._between_entries(entry, params["r_max"], basis.dtype)
            by = {"radius": (following - here) / step, "amplitude": following - here}
        factor = self._factor(codes, code, params["r_max"], basis.dtype)
        if self.word == 32:
            phase, value = code >> 24, self._values(params["r_max"], basis.dtype)[entry]
            by = {name: s * self._cosine(phase, basis) for name, s in by.items()}
            by["phase"] = value * self._cosine(phase + 64, basis)
        idx = (code >> (10 if self.word == 22 else 12)) & 255
        return Slopes(factor, by, basis, idx, bits=8)

    def unpack(self, codes: Tensor) -> Tensor:
        """(rows, tiles, bytes) uint8 -> (rows, codes) int64 words."""
        byte = codes.long()
        if self.word == 32:
            return (byte << torch.tensor([0, 8, 16, 24], device=codes.device)).sum(-1)
        words = []
        for k in range(4):
            first, shift = 22 * k // 8, 22 * k % 8
            window = sum(byte[..., first + i] << 8 * i for i in range(min(4, 11 - first)))
            words.append((window >> shift) & 0x3FFFFF)
        return torch.stack(words, -1).flatten(1)

    def _factor(self, codes: Tensor, code: Tensor, r_max: Tensor, dtype: torch.dtype) -> Tensor:
        entry = self._entry(code)
        if self.amplitude != "byte":
            here, following = self._between_entries(entry, r_max, dtype)
            return here + self._fraction(codes).to(dtype) * (following - here)
        value = self._values(r_max, dtype)[entry]
        return value * self._cosine(code >> 24, value) if self.word == 32 else value

    def _entry(self, code: Tensor) -> Tensor:
        high, low = (0x3C00, 0x3FF) if self.word == 22 else (0xF000, 0xFFF)
        return (code >> 8 & high) | (code & low)

    def _values(self, r_max: Tensor, dtype: torch.dtype) -> Tensor:
        held = torch.where(r_max[0] > LEAST_RADIUS, r_max[0], LEAST_RADIUS)
        held = torch.where(held < LARGEST_RADIUS, held, LARGEST_RADIUS)
        return _Table.apply(held, self.word, dtype)

    def _between_entries(self, entry: Tensor, r_max: Tensor, dtype: torch.dtype):
        """Values of entries and of those one amplitude on, the last one's own."""
        table = self._values(r_max, dtype)
        return table[entry], table[entry + ((entry & 255) < 255)]

    def _cosine(self, phase: Tensor, like: Tensor) -> Tensor:
        table = turn_cosine(torch.arange(256), 256).float()
        return table.to(like)[phase & 255]

    def _fraction(self, codes: Tensor) -> Tensor:
        beside = codes[..., 11:].clone(memory_format=torch.contiguous_format)  # at an aligned place
        if self.amplitude == "uint16":
            byte = beside.int().unflatten(-1, (4, 2))
            return ((byte[..., 0] | byte[..., 1] << 8).float() * 2.0**-16).flatten(1)
        t = beside.view(torch.float32).flatten(1)  # little endian, as every machine torch runs on
        t = torch.where(t > 0, t, torch.zeros_like(t))
        return torch.where(t < 1, t, torch.ones_like(t))

    def encode_reference(self, target, importance, params):
        basis, r_max = params["basis"], params["r_max"][0].item()
        r_max = min(max(r_max, LEAST_RADIUS), LARGEST_RADIUS)
        w = target.unflatten(1, (-1, self.block))
        h = torch.ones_like(w) if importance is None else importance.expand_as(target).view_as(w)
        power = h @ (basis * basis).t()
        along = (h * w) @ basis.t() / power.clamp_min(1e-30)  # (rows, blocks, 256)
        nearest = self._nearest if self.amplitude == "byte" else self._between
        value, entry, extra = nearest(along, r_max)
        gain = value * (2 * along - value) * power
        idx = gain.argmax(-1, keepdim=True)
        entry, extra = entry.gather(-1, idx)[..., 0], extra.gather(-1, idx)[..., 0]
        return self._pack(entry, idx[..., 0], extra, target.shape[0]), params

    def _nearest(self, c: Tensor, r_max: float) -> tuple[Tensor, Tensor, Tensor]:
        """(value, entry, phase) of the nearest factors."""
        values, entries = self._table(r_max)
        order = np.argsort(values, kind="stable")
        values, entries = torch.from_numpy(values[order]), torch.from_numpy(entries[order])
        best = None
        for phase in PHASES if self.word == 32 else (0,):
            turn = turn_cosine(torch.tensor(phase), 256).float()
            wanted = (c / turn).contiguous()
            at = torch.searchsorted(values, wanted).clamp(0, len(values) - 1)
            below = (at - 1).clamp_min(0)
            at = torch.where(wanted - values[below] <= values[at] - wanted, below, at)
            found = values[at] * turn, entries[at], torch.full_like(at, phase)
            if best is None:
                best = found
            else:
                nearer = (found[0] - c).abs() < (best[0] - c).abs()
                best = tuple(torch.where(nearer, a, b) for a, b in zip(found, best, strict=True))
        return best

    def _between(self, c: Tensor, r_max: float) -> tuple[Tensor, Tensor, Tensor]:
        """(value, entry, fraction) of the nearest factors, neighbouring entries interpolated."""
        table = torch.from_numpy(radial_table(22, r_max)[0].astype(np.float32)).view(FUNCTIONS, 256)
        best, entry, fraction = self._nearest(c, r_max)
        fraction = torch.zeros_like(c)
        c64 = c.double()
        for function in parse_functions(self.functions, 22):
            low, high = table[function, :-1].double(), table[function, 1:].double()
            for i in range(0, 255, 5):  # a fifth of the segments is enough for a judge
                rise = high[i] - low[i]
                t = ((c64 - low[i]) / rise) if rise else torch.full_like(c64, -1)
                t = t.float()
                if self.amplitude == "uint16":
                    t = (t * 65536).round() / 65536
                here = table[function, i]
                value = here + t * (table[function, i + 1] - here)
                better = (t >= 0) & (t < 1) & ((value - c).abs() < (best - c).abs())
                best = torch.where(better, value, best)
                entry = torch.where(better, 256 * function + i, entry)
                fraction = torch.where(better, t, fraction)
        return best, entry, fraction

    def _pack(self, entry: Tensor, idx: Tensor, extra: Tensor, rows: int) -> Tensor:
        """Codes (rows, tiles, bytes) of table entries, basis indices and phases or fractions."""
        if self.word == 32:
            code = extra << 24 | (entry & 0xF000) << 8 | idx << 12 | entry & 0xFFF
            return (code[..., None] >> torch.tensor([0, 8, 16, 24]) & 255).to(torch.uint8)
        code = ((entry & 0x3C00) << 8 | idx << 10 | entry & 0x3FF).view(rows, -1, 4)
        bit = (code[..., None] >> torch.arange(22) & 1).flatten(-2).unflatten(-1, (11, 8))
        packed = (bit << torch.arange(8)).sum(-1).to(torch.uint8)
        if self.amplitude == "byte":
            return packed
        if self.amplitude == "uint16":
            units = (extra * 65536).long()[..., None] >> torch.tensor([0, 8]) & 255
            beside = units.to(torch.uint8).view(rows, -1, 8)
        else:
            beside = extra.contiguous().view(torch.uint8).view(rows, -1, 16)
        return torch.cat((packed, beside), -1)


class _Table(torch.autograd.Function):
    """The table of a word at a held r_max, with the tabulated slope as its derivative."""

    @staticmethod
    def forward(ctx, r_max, word, dtype):
        value, slope = (torch.from_numpy(x) for x in radial_table(word, r_max.item()))
        ctx.save_for_backward(slope.to(r_max.device))
        return value.to(r_max.device, dtype)

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return (grad * slope.to(grad.dtype)).sum(), None, None


def entry_functions(word: int) -> np.ndarray:
    """Number of the function of each table entry."""
    entry = np.arange(1 << (14 if word == 22 else 16))
    return entry >> 8 if word == 22 else (entry >> 12) * 4 + (entry >> 10 & 1)


def parse_functions(text: Any, word: int) -> list[int]:
    """Numbers of the functions that a setting allows, rising; ValueError when it is none."""
    usable = {f for f in range(FUNCTIONS) if word == 22 or f % 4 < 2}
    found: set[int] = set()
    for item in text.split("_") if isinstance(text, str) else [""]:
        named = re.fullmatch("c([0-3])s([0-3])d([0-3])", item)
        if item == "all":
            members = usable
        elif item in CATEGORIES:
            first = 16 * CATEGORIES.index(item)
            members = usable & set(range(first, first + 16))
        elif named:
            c, s, d = map(int, named.groups())
            members = usable & {16 * c + 4 * s + d}
        else:
            members = set()
        if not members:
            raise ValueError(
                "bitfield: functions must be all, or some of poincare, lorentz, klein, special and "
                f"c0s0d0 to c3s3d{3 if word == 22 else 1} joined by _, got {text!r}"
            )
        found |= members
    return sorted(found)

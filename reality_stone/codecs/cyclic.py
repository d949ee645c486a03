"""cyclic: blocks of a row as multiples of a few shared vectors, the factor a phase and amplitude.

Source: the documents' cyclic bit codes with a basis table; layout in csrc/codecs/cyclic.h. The
encoder takes the best of all vectors and factors together; the basis starts from k-means on
directions and is fitted to the codes in turns with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .. import ops
from ..fitting import axes, evenly
from ..packed import over_scale, round_to_half
from .base import Codec, Param, Tile, check_words, flag, one_of, row_scale, whole_number
from .cyclic_tables import cyclic
from .fields import Field
from .slopes import Slopes

SAMPLE = 1 << 13  # blocks the first basis is fitted on
SAMPLE_WEIGHTS = 1 << 21
ROUNDS = 6  # of k-means: the turns with the codes go on from there
CHUNK = 1 << 22  # projections the reference encoder holds at once
LONGEST_INTEGER = 1 << 17  # weights per code up to which dot products of bytes fit 32 bits


@dataclass(frozen=True)
class Cyclic(Codec):
    """word: bits of a code, 16 or 32; compound: a basis of 16 and amplitudes of 6 bits, in 16 bits;
    activation: "int8" multiplies in integers, x and basis in 8 bits; block: weights per code, 0 for
    the whole row."""

    name: ClassVar[str] = "cyclic"
    rates: ClassVar = {2: {"word": 16, "block": 8}, 4: {"word": 32, "block": 8}}
    refits: ClassVar = ("basis",)
    word: int = 16
    compound: bool = False
    activation: str = one_of("float", "int8")
    block: int = 8

    def __post_init__(self):
        if self.word not in (16, 32):
            raise ValueError(f"cyclic: word must be 16 or 32, got {self.word!r}")
        object.__setattr__(self, "word", int(self.word))
        if flag(self.compound, "cyclic: compound") and self.word != 16:
            raise ValueError("cyclic: compound=True needs word=16, got word=32")
        check_words(self)
        object.__setattr__(self, "block", whole_number(self.block, 0, 65536, "cyclic: block"))

    @property
    def vectors(self) -> int:
        return 16 if self.compound else 256

    @property
    def shift(self) -> int:
        """factor = T[diff][phase] * amp / 2^shift"""
        return 14 if self.word == 32 else 13 if self.compound else 11

    def tile(self, shape):
        block = self.block or max(1, shape[1])
        if self.activation == "int8" and block > LONGEST_INTEGER:
            raise ValueError(
                f"cyclic: activation=int8 takes blocks of at most {LONGEST_INTEGER} weights, "
                f"got {block}"
            )
        return Tile(1, block, self.word // 8)

    def fields(self, shape):
        cols = self.tile(shape).cols
        return tuple(
            Field(name, kind, width, cols, offset=offset)
            for name, kind, (offset, width) in (
                ("index", "index", self._bits["index"]),
                ("amplitude", "level", self._bits["amplitude"]),
                ("diff", "cyclic", self._bits["diff"]),
                ("phase", "cyclic", self._bits["phase"]),
            )
            if width
        )

    @property
    def _bits(self) -> dict[str, tuple[int, int]]:
        """(offset, width) of the fields of a word."""
        if self.word == 32:
            return {"index": (0, 8), "amplitude": (8, 8), "diff": (26, 2), "phase": (28, 4)}
        if self.compound:
            return {"index": (0, 4), "amplitude": (4, 6), "diff": (10, 2), "phase": (12, 4)}
        return {"amplitude": (0, 4), "index": (4, 8), "diff": (12, 0), "phase": (12, 4)}

    def params(self, shape):
        basis = Param("basis", (self.vectors, self.tile(shape).cols), "shared")
        return basis, Param("out_scale", (shape[0],), "out")

    def initial_params(self, weight, seed, feedback=False, importance=None):
        shape = (weight.shape[0], weight.shape[1])
        block = self.tile(shape).cols
        if not weight.numel():
            return {p.name: torch.zeros(p.sizes) for p in self.params(shape)}
        scale = row_scale(weight)
        most = max(4 * self.vectors, min(SAMPLE, SAMPLE_WEIGHTS // block))
        wide = -(-shape[1] // block)
        total = shape[0] * wide
        at = evenly(total, most)
        rows, columns = at // wide, at % wide
        padded = torch.nn.functional.pad(weight, (0, wide * block - shape[1]))
        points = padded.view(shape[0], wide, block)[rows, columns]
        points = over_scale(points, scale[rows, None])
        lines = axes(points, self.vectors, seed, ROUNDS)
        along = (points @ lines.t()).abs().amax(1)
        return {"basis": round_to_half(lines * self._length(along)), "out_scale": scale}

    def _factors(self) -> Tensor:
        """Distinct factors in rising order, float64."""
        amps = {16: 64 if self.compound else 16, 32: 256}[self.word]
        level = cyclic()[0].double()[:, None] * torch.arange(amps)
        return level.unique() / 2**self.shift

    def _length(self, along: Tensor) -> float:
        """The length of the vectors at which the factors reach and resolve these multiples."""
        if not along.any():
            return 1.0
        factors = self._factors()
        middle = (factors[1:] + factors[:-1]) / 2
        best, chosen = float("inf"), 1.0
        for reach in (1.1, 1.0, 0.9, 0.8, 0.7, 0.6, 0.5):
            length = along.max().item() * reach / factors.max().item()
            nearest = factors[torch.bucketize(along.double() / length, middle)] * length
            error = (along - nearest).pow(2).sum().item()
            if error < best:
                best, chosen = error, length
        return chosen

    def _words(self, codes: Tensor) -> Tensor:
        return (codes.long() << torch.arange(0, self.word, 8, device=codes.device)).sum(-1)

    def _fields(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """(level, idx) of every code, integers; level = T[diff][phase] * amp."""
        word = self._words(codes)
        index, amp, diff, phase = (
            word >> offset & (1 << width) - 1
            for offset, width in map(self._bits.get, ("index", "amplitude", "diff", "phase"))
        )
        return cyclic().to(codes.device)[diff, phase].long() * amp, index

    def decode_tiles(self, codes, params, shape):
        level, index = self._fields(codes)
        basis = params["basis"]
        factor = level.to(basis.dtype) * 2.0**-self.shift
        return (factor[..., None] * basis[index]).flatten(1)

    def slopes(self, codes, params, shape):
        word, basis = self._words(codes), params["basis"]
        index, (offset, width) = self._fields(codes)[1], self._bits["amplitude"]
        amps = word >> offset & (1 << width) - 1
        layout = f"cyclic_{'compound' if self.compound else self.word}"

        def factor(word: Tensor, order: int) -> Tensor:
            level = ops.bit_derivative(word.to(torch.int32), order, layout)
            return level.to(basis.dtype) * 2.0**-self.shift

        one = word ^ (amps ^ 1) << offset  # the same code with amplitude 1
        by = {"phase": factor(word, 1), "amplitude": factor(one, 0)}
        return Slopes(factor(word, 0), by, basis, index, bits=self._bits["index"][1])

    def encode_reference(self, target, importance, params):
        basis, block = params["basis"].double(), params["basis"].shape[1]
        factors = self._factors()
        middle = (factors[1:] + factors[:-1]) / 2
        x = target.double().view(target.shape[0], -1, block)
        h = torch.ones_like(x[:1]) if importance is None else importance.double().view(1, -1, block)
        power = h @ basis.t() ** 2
        codes = []
        for rows in x.split(max(1, CHUNK // (x.shape[1] * self.vectors))):
            cross = (h * rows) @ basis.t()
            value = cross / power.where(power > 0, 1)
            factor = factors[torch.bucketize(value, middle)]
            gain, index = (factor * (2 * cross - factor * power)).max(-1)
            factor = factor.gather(-1, index[..., None])[..., 0]
            codes.append(self._pack(factor.where(gain > 0, 0), index))
        return torch.cat(codes), params

    def _pack(self, factor: Tensor, index: Tensor) -> Tensor:
        """(..., bytes) uint8 of the codes with these factors and indices."""
        amps = {16: 64 if self.compound else 16, 32: 256}[self.word]
        levels = cyclic()[0].long()[:, None] * torch.arange(amps)  # (phase, amp)
        flat, order = levels.flatten().sort()
        at = order[torch.searchsorted(flat, (factor * 2**self.shift).round().long())]
        phase, amp = at // amps, at % amps
        if self.word == 32:
            word = phase << 28 | amp << 8 | index
        else:
            word = phase << 12 | (amp << 4 | index if self.compound else index << 4 | amp)
        return (word[..., None] >> torch.arange(0, self.word, 8) & 255).to(torch.uint8)

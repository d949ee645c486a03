"""palette: indices into a codebook of free values, of the layer or of each group of a row.

Codebooks are Lloyd's (k-means), optionally weighted by the Hessian's diagonal, and trainable.
Layout in csrc/codecs/palette.h. Source: Lloyd, 1982; Max, 1960; the 5 x 3 word is this project's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fitting import SAMPLE, kmeans, unit_rows
from ..packed import Packed, round_to_half
from .base import Codec, Param, Tile, check_words, one_of, row_scale, whole_number
from .fields import Field
from .uniform import pack_bits, unpack_bits

PAIRS = 32
OWN_BITS = {"dense": 3, "words": 3, "pair": 2.5}


@dataclass(frozen=True)
class Palette(Codec):
    """layout: dense, words (five 3-bit codes in 16 bits) or pair (a 5-bit code for two weights);
    bits: 1 to 4 for dense, else the layout's own (3 and 2.5), as is the default; group: 0 for one
    codebook and a scale per row, n for a codebook per n weights of a row (16 * 2^bits / n more bits
    per weight)."""

    name: ClassVar[str] = "palette"
    rates: ClassVar = {
        1: {"bits": 1},
        2: {"bits": 2},
        2.5: {"layout": "pair"},
        3: {"bits": 3},
        3.2: {"layout": "words"},
        4: {"bits": 4},
    }
    layout: str = one_of("dense", "words", "pair")
    bits: float | None = None
    group: int = 0

    def __post_init__(self):
        check_words(self)
        own = OWN_BITS[self.layout]
        bits = own if self.bits is None else self.bits
        if self.layout == "dense":
            bits = whole_number(bits, 1, 4, "palette: bits")
        elif bits != own:
            raise ValueError(
                f"palette: bits must be {own} with layout={self.layout}, got {self.bits!r}"
            )
        group = whole_number(self.group, 0, 1 << 20, "palette: group")
        if self.layout == "pair" and group:
            raise ValueError(f"palette: group must be 0 with layout=pair, got {group}")
        if self.layout == "words" and group % 5:
            raise ValueError(
                f"palette: group must be a multiple of 5 with layout=words, got {group}"
            )
        object.__setattr__(self, "bits", own if self.layout != "dense" else bits)
        object.__setattr__(self, "group", group)

    @property
    def refits(self) -> tuple[str, ...]:
        return () if self.group else ("codebook",)

    @property
    def entries(self) -> int:
        """Codes of one codebook."""
        return PAIRS if self.layout == "pair" else 2**self.bits

    def tile(self, shape):
        if self.layout == "pair":
            return Tile(1, 16, 5)
        if self.layout == "words":
            cols = self.group or 5
            return Tile(1, cols, cols // 5 * 2)
        cols = self.group or {1: 8, 2: 4, 3: 8, 4: 2}[self.bits]
        return Tile(1, cols, -(-cols * self.bits // 8))

    def fields(self, shape):
        cols = self.tile(shape).cols
        if self.layout == "pair":
            return (Field("index", "index", 5, 2, stride=5, count=8),)
        where = _word_bits if self.layout == "words" else None
        # Codebooks of single values rise, so that neighbours in one are neighbours in value.
        return (Field("level", "level", self.bits, 1, stride=self.bits, count=cols, where=where),)

    def params(self, shape):
        if self.group:
            grid = self.tile(shape).grid(shape)
            return (Param("codebook", (*grid, self.entries), "both"),)
        sizes = (PAIRS, 2) if self.layout == "pair" else (self.entries,)
        return (Param("codebook", sizes, "shared"), Param("out_scale", (shape[0],), "out"))

    def initial_params(self, weight, seed, feedback=False, importance=None):
        if self.group:
            return {p.name: torch.zeros(p.sizes) for p in self.params(tuple(weight.shape))}
        scale = row_scale(weight)
        limit = 1 << 16 if self.layout == "pair" else SAMPLE  # k-means in the plane is slow
        rows, weights = unit_rows(weight, importance, limit)
        if self.layout == "pair":
            even = rows.shape[1] // 2 * 2
            book = kmeans(rows[:, :even].reshape(-1, 2), PAIRS, seed, rounds=30)
        else:
            book = lloyd(rows.flatten(), weights.flatten(), self.entries)
        return {"codebook": round_to_half(book), "out_scale": scale}

    def from_levels(self, codes, levels, scale):
        if self.layout == "pair" or len(levels) > self.entries:
            return None
        shape = (codes.shape[0], codes.shape[1])
        tile = self.tile(shape)
        (rows, tiles), pad = tile.grid(shape), self.entries - len(levels)
        book = torch.cat((levels, levels[-1:].expand(pad)))
        padding = (0, tiles * tile.cols - shape[1])
        code = torch.nn.functional.pad(codes.long(), padding).view(rows, tiles, tile.cols)
        if self.group:
            book = (scale[:, None] * book)[:, None].expand(rows, tiles, -1).contiguous()
            return Packed(self, shape, self._pack(code), {"codebook": round_to_half(book)})
        params = {"codebook": round_to_half(book), "out_scale": round_to_half(scale)}
        return Packed(self, shape, self._pack(code), params)

    def decode_tiles(self, codes, params, shape):
        code, book = self._unpack(codes), params["codebook"]
        if self.group:
            return book.gather(-1, code).flatten(1)
        return book[code].flatten(1)

    def encode_reference(self, target, importance, params):
        unit = 2 if self.layout == "pair" else 1
        cols = self.tile(tuple(target.shape)).cols
        w = target.unflatten(1, (-1, cols // unit, unit))  # (rows, tiles, codes, unit)
        h = torch.ones_like(w[:1]) if importance is None else importance.view(1, *w.shape[1:])
        if self.group:
            book = round_to_half(group_codebooks(w[..., 0], h[..., 0], self.entries))
            params = {"codebook": book}
            code = (w - book[:, :, None]).abs().argmin(-1)
        else:
            best = torch.full(w.shape[:-1], float("inf"))
            code = torch.zeros(w.shape[:-1], dtype=torch.long)
            for i, entry in enumerate(params["codebook"].view(-1, unit)):
                cost = (h * (w - entry) ** 2).sum(-1)
                code = torch.where(cost < best, i, code)
                best = torch.minimum(best, cost)
        return self._pack(code), params

    def _unpack(self, codes: Tensor) -> Tensor:
        if self.layout == "words":
            word = codes.long().unflatten(-1, (-1, 2))
            word = word[..., 0] | word[..., 1] << 8
            shift = torch.arange(0, 15, 3, device=codes.device)
            return ((word[..., None] >> shift) & 7).flatten(-2)
        if self.layout == "pair":
            return unpack_bits(codes, 5, 8).long()
        return unpack_bits(codes, self.bits, self.group or codes.shape[-1] * 8 // self.bits).long()

    def _pack(self, code: Tensor) -> Tensor:
        if self.layout == "words":
            word = (code.unflatten(-1, (-1, 5)) << torch.arange(0, 15, 3)).sum(-1)
            return torch.stack((word & 255, word >> 8), -1).flatten(-2).to(torch.uint8)
        return pack_bits(code, 5 if self.layout == "pair" else self.bits)


def _word_bits(codes: Tensor) -> tuple[Tensor, None]:
    """First bits of the codes of a tile of words (down, across, bytes)."""
    j = torch.arange(codes.shape[2] // 2 * 5, device=codes.device)
    return j // 5 * 16 + j % 5 * 3, None


def lloyd(values: Tensor, weights: Tensor, entries: int, rounds: int = 500) -> Tensor:
    """Codebook (entries,) of values (n,) with weights (n,): Lloyd's algorithm from quantiles, by
    running sums over the sorted values."""
    if not values.numel():
        return torch.zeros(entries)
    values, order = values.double().sort(stable=True)
    weights = weights.double()[order]
    mass = torch.nn.functional.pad(weights.cumsum(0), (1, 0))
    moment = torch.nn.functional.pad((weights * values).cumsum(0), (1, 0))
    book = values[((torch.arange(entries) + 0.5) / entries * len(values)).long()]
    ends = torch.tensor([0]), torch.tensor([len(values)])
    for _ in range(rounds):
        cut = torch.searchsorted(values, (book[1:] + book[:-1]) / 2, right=True)
        cut = torch.cat((ends[0], cut, ends[1]))
        total = mass[cut].diff()
        moved = torch.where(total > 0, moment[cut].diff() / total, book)
        if torch.allclose(moved, book, rtol=1e-5, atol=0):
            break
        book = moved
    return book.float()


def group_codebooks(w: Tensor, h: Tensor, entries: int, rounds: int = 30) -> Tensor:
    """Codebooks (rows, groups, entries) of w (rows, groups, n) by Lloyd's algorithm."""
    at = ((torch.arange(entries) + 0.5) / entries * w.shape[-1]).long()
    book = w.sort(-1).values[..., at].double()
    for _ in range(rounds):
        near = (w[..., None] - book[:, :, None]).abs().argmin(-1)
        one = torch.nn.functional.one_hot(near, entries) * h[..., None].double()
        total = one.sum(-2)
        moment = (one * w[..., None]).sum(-2)
        book = torch.where(total > 0, moment / total, book)
    return book.float()

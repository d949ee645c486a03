"""seed64: one 64-bit seed per square block, a fixed pattern times g(r) sin(theta).

Only the product g(r) sin(theta) counts, so a block has one real degree of freedom however many bits
its seed has; on weights without such structure that is all it can fit. Layout in
csrc/codecs/seed64.h.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..feedback import Hessian
from ..metrics import squared_error
from ..packed import round_to_half
from .base import Codec, Param, Tile, check_weight, check_words, one_of, whole_number
from .fields import Field
from .trig import turn_sine

SIDE = 256  # of a quadtree
TREE_BYTES = 171
LEVELS = 6  # of split bits: blocks of 256 to 8
RADIUS = (1e-6, 0.999)


@dataclass(frozen=True)
class Seed64(Codec):
    """block: side of a block, a power of two from 4 to 256, or 0 for a quadtree of such blocks in
    each 256 x 256; fit: closed (least squares) or adam (the documents' descent, kept where it is no
    worse, which can be by rounding alone).

    Of a quadtree: seeds, the words a tile holds, 171 bytes for its shape aside (0.083 bits per
    weight with 64), and bound, the mean squared error relative to the tile's mean square from which
    a block stays whole.
    """

    name: ClassVar[str] = "seed64"
    rates: ClassVar[dict] = {0.25: {"block": 16}, 1: {"block": 8}, 4: {"block": 4}}
    block: int = 8
    fit: str = one_of("closed", "adam")
    seeds: int = 64
    bound: float = 0.5

    def __post_init__(self):
        if self.block not in (0, 4, 8, 16, 32, 64, 128, 256) or isinstance(self.block, bool):
            raise ValueError(
                "seed64: block must be 0 (a quadtree) or a power of two from 4 to 256, "
                f"got {self.block!r}"
            )
        check_words(self)
        object.__setattr__(self, "block", int(self.block))
        object.__setattr__(self, "seeds", whole_number(self.seeds, 1, 4096, "seed64: seeds"))
        if not (isinstance(self.bound, (int, float)) and 0 <= self.bound <= 1):
            raise ValueError(f"seed64: bound must be from 0 to 1, got {self.bound!r}")
        object.__setattr__(self, "bound", float(self.bound))
        if self.block and (self.seeds != 64 or self.bound != 0.5):
            raise ValueError("seed64: seeds and bound are settings of block=0")

    def tile(self, shape):
        if self.block:
            return Tile(self.block, self.block, 8)
        return Tile(SIDE, SIDE, TREE_BYTES + 8 * self.seeds)

    def fields(self, shape):
        if not self.block:  # which weights a seed of a quadtree is for depends on the tree
            return ()
        block = {"rows": self.block, "cols": self.block}
        return (
            Field("radius", "level", 8, offset=56, **block),
            Field("radius_fine", "level", 16, offset=48, **block),
            Field("phase", "cyclic", 8, offset=24, **block),
            Field("phase_fine", "cyclic", 16, offset=16, **block),
            Field("sign", "sign", 1, offset=31, **block),
        )

    def params(self, shape):
        return (Param("scale", (1,), "shared"),)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        # A product is at most one, and a least-squares p at most peak / 0.9.
        peak = (
            weight.abs().max().double() if weight.numel() else torch.zeros((), dtype=torch.double)
        )
        scale = (peak * 1.25).clamp_max(3e38).float().view(1)
        return {"scale": round_to_half(scale) if peak else torch.ones(1)}

    def encode(self, weight, hessian=None, outputs=None, *, seed=0, label="", given=None):
        weight = check_weight(weight, self.name)
        prepared = Hessian.prepare(hessian, weight.shape[1], label)
        if not self.block or not weight.numel() or not weight.isfinite().all():
            return super().encode(weight, seed=seed, label=label, given=given)
        if prepared is None:
            return super().encode(self._for_padding(weight), seed=seed, label=label, given=given)
        # Least squares in the metric of the input has a closed form. Damped until it loses no more
        # of the weight than leaving it out would: what the samples do not show may matter later.
        h, power = prepared.damped(), weight.double().pow(2).sum().item()
        mean = h.diagonal().mean()
        for more in (0.0, 0.1, 1.0, 10.0):
            h.diagonal().add_(more * mean)
            target = self._in_metric(weight, h)
            if squared_error(target, weight) <= power:
                break
        return super().encode(self._for_padding(target), seed=seed, label=label, given=given)

    def _for_padding(self, weight: Tensor) -> Tensor:
        """Blocks at the edges scaled so that least squares over them padded with zeros is that over
        their real weights."""
        b, (out, n) = self.block, weight.shape
        if out % b == 0 and n % b == 0:
            return weight
        square, scaled = pattern(b).double() ** 2, weight.clone()
        for rows in {b, out % b or b}:
            for cols in {b, n % b or b}:
                r = slice(0, out // b * b) if rows == b else slice(out - rows, out)
                c = slice(0, n // b * b) if cols == b else slice(n - cols, n)
                scaled[r, c] *= (square.sum() / square[:rows, :cols].sum()).item()
        return scaled

    def _in_metric(self, weight: Tensor, h: Tensor) -> Tensor:
        """The matrix of blocks p m (padding cut off) that is nearest to the weight in the metric of
        h: the p of a row of blocks are the solution of one linear system."""
        b, (out, n) = self.block, weight.shape
        m, across = pattern(b), -(-n // b)
        pad = across * b - n
        weights = torch.nn.functional.pad(h, (0, pad, 0, pad)).view(across, b, across, b)
        pull = torch.nn.functional.pad(weight @ h, (0, pad)).view(out, across, b)
        fitted = torch.empty(out, across, b)
        for rows in {b, out % b or b}:  # blocks of whole height, and those at the lower edge
            first, last = (0, out // b * b) if rows == b else (out - rows, out)
            if first == last:
                continue
            alike = m[:rows].t() @ m[:rows]
            system = torch.einsum("tjsk,jk->ts", weights, alike)
            goal = torch.einsum("rijt,ij->rt", _rows(pull[first:last], rows), m[:rows])
            p = torch.linalg.solve(system.double(), goal.double().t()).t().float()
            blocks = p[:, None, :, None] * m[:rows, None]
            fitted[first:last] = blocks.flatten(0, 1)
        return fitted.flatten(1)[:, :n].contiguous()

    def decode_tiles(self, codes, params, shape):
        scale = params["scale"]
        if self.block:
            p = seed_value(codes).to(scale.dtype) * scale
            m = pattern(self.block, codes.device).to(scale.dtype)
            return (p[:, :, None, None] * m).transpose(1, 2).flatten(2).flatten(0, 1)
        words = codes[..., TREE_BYTES:].unflatten(-1, (-1, 8))
        p = seed_value(words).to(scale.dtype) * scale
        m = pattern(SIDE, codes.device).to(scale.dtype)
        rows = []
        for y, row in enumerate(codes[..., :TREE_BYTES].tolist()):
            tiles = [self._tree(tree, p[y, x], m) for x, tree in enumerate(row)]
            rows.append(torch.cat(tiles, 1))
        return torch.cat(rows)

    def _tree(self, tree: list[int], p: Tensor, m: Tensor) -> Tensor:
        """The (256, 256) weights of a tree with factors p (seeds,)."""
        factor, local = torch.empty(SIDE, SIDE, dtype=torch.long), torch.empty_like(m)
        for n, (y, x, size) in enumerate(leaves(tree)):
            factor[y : y + size, x : x + size] = min(n, self.seeds - 1)
            local[y : y + size, x : x + size] = m[:size, :size]
        return p[factor.to(p.device)] * local

    def encode_reference(self, target, importance, params):
        scale = params["scale"].double()
        h = torch.ones(target.shape[1]) if importance is None else importance
        w, h = target.double() / scale, h.double().expand_as(target)
        if self.block:
            _, wm, mm, _ = _moments(w, h, self.block)
            return seed_bytes((wm / mm).nan_to_num(0, 0, 0)), dict(params)
        rows, cols = target.shape[0] // SIDE, target.shape[1] // SIDE
        codes = torch.zeros(rows, cols, TREE_BYTES + 8 * self.seeds, dtype=torch.uint8)
        for y in range(rows):
            for x in range(cols):
                at = slice(y * SIDE, (y + 1) * SIDE), slice(x * SIDE, (x + 1) * SIDE)
                self._encode_tree(w[at], h[at], codes[y, x])
        return codes, dict(params)

    def _encode_tree(self, w: Tensor, h: Tensor, tile: Tensor) -> None:
        """Write the tile of w: nodes above the bound split, the largest gain first."""
        levels = [_moments(w, h, SIDE >> level) for level in range(LEVELS + 1)]
        error = [(ww - wm**2 / mm).clamp_min(0) for ww, wm, mm, _ in levels]
        most = self.bound * levels[0][0].item() / levels[0][3].item()
        tree, queue = [0] * TREE_BYTES, []

        def offer(level, y, x):
            own = error[level][y, x].item()
            if level < LEVELS and own > most * levels[level][3][y, x].item():
                parts = error[level + 1][2 * y : 2 * y + 2, 2 * x : 2 * x + 2].sum().item()
                heapq.heappush(queue, (parts - own, level, y, x))

        offer(0, 0, 0)
        count = 1
        while queue and count + 3 <= self.seeds:
            _, level, y, x = heapq.heappop(queue)
            bit = (4**level - 1) // 3 + (y << level) + x
            tree[bit >> 3] |= 1 << (bit & 7)
            count += 3
            for child in range(4):
                offer(level + 1, 2 * y + child // 2, 2 * x + child % 2)
        p = []
        for y, x, size in leaves(tree):
            level = (SIDE // size).bit_length() - 1
            _, wm, mm, _ = levels[level]
            p.append(wm[y // size, x // size] / mm[y // size, x // size])
        tile[:TREE_BYTES] = torch.tensor(tree, dtype=torch.uint8)
        tile[TREE_BYTES : TREE_BYTES + 8 * len(p)] = seed_bytes(torch.stack(p)).flatten()


def _rows(x: Tensor, rows: int) -> Tensor:
    """(out, blocks, columns) -> (out / rows, row in the block, column in the block, blocks)."""
    return x.unflatten(0, (-1, rows)).transpose(2, 3)


def pattern(size: int, device: torch.device | str = "cpu") -> Tensor:
    """m(i, j) = 1 + 0.1 sin(2 pi ((31 i + 17 j) mod 256) / 256), (size, size) float32."""
    i = torch.arange(size, device=device)
    return (1.0 + 0.1 * turn_sine((31 * i[:, None] + 17 * i) & 255, 256)).float()


def seed_value(words: Tensor) -> Tensor:
    """g(r) sin(theta) of little-endian words (..., 8) uint8 as float32 (...)."""
    byte = words.long() << 8 * (torch.arange(8, device=words.device) % 4)
    low, high = byte[..., :4].sum(-1), byte[..., 4:].sum(-1)
    r = (high.double() * 2.0**-32).clamp(*RADIUS)
    return (2.0 * r / (1.0 + r * r) * turn_sine(low, 1 << 32)).float()


def seed_bytes(p: Tensor) -> Tensor:
    """Words (..., 8) uint8 whose value is nearest to p (...) in [-1, 1]: both factors near
    sqrt |p|."""
    size = p.double().abs().clamp_max(1)
    turn = _q32(size.sqrt().asin() / (2 * math.pi))
    sine = turn_sine(turn, 1 << 32)
    g = torch.where(sine > 0, size / sine.where(sine > 0, 1), 0).clamp_max(1)
    high = torch.where(size > 0, _q32(g / (1 + (1 - g * g).clamp_min(0).sqrt())), 0)
    low = torch.where(p < 0, -turn, turn) & 0xFFFFFFFF
    shift = 8 * torch.arange(4, device=p.device)
    word = torch.cat((low[..., None] >> shift, high[..., None] >> shift), -1)
    return (word & 255).to(torch.uint8)


def gradients(r: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
    """d(g(r) sin(theta)) by r and by theta (radians); times m(i, j) and the scale those of w_ij.

    dg/dr = 2 (1 - r^2) / (1 + r^2)^2: g = tanh(2 atanh r), with the chain through atanh.
    """
    square = r * r
    slope = 2 * (1 - square) / (1 + square) ** 2
    return slope * theta.sin(), 2 * r / (1 + square) * theta.cos()


def leaves(tree: list[int]) -> list[tuple[int, int, int]]:
    """(row, column, size) of the leaves of a quadtree's split bits (171 bytes), in their order."""
    found = []

    def visit(level, y, x):
        bit = (4**level - 1) // 3 + (y << level) + x
        if level < LEVELS and tree[bit >> 3] >> (bit & 7) & 1:
            for child in range(4):
                visit(level + 1, 2 * y + child // 2, 2 * x + child % 2)
        else:
            size = SIDE >> level
            found.append((y * size, x * size, size))

    visit(0, 0, 0)
    return found


def _q32(x: Tensor) -> Tensor:
    return (x * 2.0**32).round().clamp(0, 2**32 - 1).long()


def _moments(w: Tensor, h: Tensor, size: int) -> tuple[Tensor, ...]:
    """Sums of h w^2, h w m, h m^2 and h over blocks of this size, each (rows, cols) of blocks."""
    down, across = w.shape[0] // size, w.shape[1] // size
    m = pattern(size).double().repeat(down, across)

    def sums(x):
        return x.view(down, size, across, size).sum((1, 3))

    return sums(h * w * w), sums(h * w * m), sums(h * m * m), sums(h)

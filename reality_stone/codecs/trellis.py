"""trellis: a polar tail-biting trellis at 1.5 to 4 bits per weight, the flagship format.

Each 16-bit window of a ring of bits hashes to a point of the plane in polar form (64 phases x 64
amplitudes), so a search over the ring chooses among 4096 points per pair of weights at 2 bits a
weight. Layout in csrc/codecs/trellis.h. Ring, rotation and feedback after QTIP (Tseng et al., 2024)
and QuIP# (2024); the polar table is this project's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from ..packed import round_to_half
from .base import Codec, Param, Tile, check_words, flag, hadamard_block, one_of

MULTIPLIER = 0xC83918A1
STATES = 65536
# Size of the table over that of Gaussian weights at which the search errs least: at high rates the
# table must cover the tails. Measured on 2 x 384 tiles; a change of 0.02 costs below 0.3 percent.
GAIN = {1.5: 0.96, 2: 1.0, 2.5: 1.03, 3: 1.06, 3.5: 1.11, 4: 1.15}


@dataclass(frozen=True)
class Trellis(Codec):
    """bits: 1.5 to 4 by halves; rotate: Hadamard on both sides; search: exact or fast."""

    name: ClassVar[str] = "trellis"
    bits: float = 2
    rotate: bool = True
    search: str = one_of("exact", "fast")

    def __post_init__(self):
        if self.bits not in GAIN:
            raise ValueError(f"trellis: bits must be 1.5, 2, 2.5, 3, 3.5 or 4, got {self.bits!r}")
        flag(self.rotate, "trellis: rotate")
        check_words(self)
        whole = int(self.bits)
        object.__setattr__(self, "bits", whole if whole == self.bits else float(self.bits))

    @property
    def k(self) -> int:
        """New bits per state."""
        return int(2 * self.bits)

    def tile(self, shape):
        return Tile(16, 16, 16 * self.k)

    def params(self, shape):
        return (
            Param("radius", (64,), "shared"),
            Param("angle", (16,), "shared"),
            Param("out_scale", (shape[0],), "out"),
            Param("in_scale", (shape[1],), "in"),
        )

    def blocks(self, shape):
        return (hadamard_block(shape[0]), hadamard_block(shape[1])) if self.rotate else (1, 1)

    def inner(self):
        return replace(self, rotate=False)

    def initial_params(self, weight, seed, feedback=False, importance=None):
        out, n = weight.shape
        radius, angle = default_tables()
        generator = torch.Generator().manual_seed(seed)
        out_sign, in_sign = (
            torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1 for size in (out, n)
        )
        if not self.rotate:
            out_sign, in_sign = out_sign.abs(), in_sign.abs()
        rms = weight.double().pow(2).mean().sqrt().item() if weight.numel() else 0.0
        # Errors fed back widen every target.
        gain = max(1.06, GAIN[self.bits]) if feedback else GAIN[self.bits]
        return {
            "radius": radius,
            "angle": angle,
            "out_scale": round_to_half(out_sign * (rms * gain)),
            "in_scale": in_sign,
        }

    def decode_tiles(self, codes, params, shape):
        state = unpack_states(codes, self.k)
        pair = state_points(state, params["radius"], params["angle"])
        rows, cols = codes.shape[:2]
        return pair.view(rows, cols, 16, 16).transpose(1, 2).reshape(16 * rows, 16 * cols)

    def encode_reference(self, target, importance, params):
        rows, cols = target.shape[0] // 16, target.shape[1] // 16
        tiles = target.view(rows, 16, cols, 16).transpose(1, 2).reshape(-1, 256)
        codes = search_reference(tiles, params["radius"], params["angle"], self.k)
        return codes.view(rows, cols, -1), params


@cache
def _tables() -> tuple[Tensor, Tensor]:
    i, j = torch.arange(64, dtype=torch.float64), torch.arange(16, dtype=torch.float64)
    radius = torch.sqrt(-2 * torch.log(1 - (i + 0.5) / 64))
    angle = (j + 0.5) * math.pi / 32
    points = state_points(torch.arange(STATES), radius, angle)
    # Held to float16 values, so that a file stores them in 16 bits exactly.
    return tuple(t.half().float() for t in (radius / points.pow(2).mean().sqrt(), angle))


def default_tables() -> tuple[Tensor, Tensor]:
    """Radius (64,) of a Rayleigh law, unit mean square a weight; angle (16,) of a quarter turn."""
    radius, angle = _tables()
    return radius.clone(), angle.clone()


def unpack_states(codes: Tensor, k: int) -> Tensor:
    """(..., 16 k) ring bytes -> (..., 128) states."""
    word = codes.long().unflatten(-1, (-1, 2))
    word = word[..., 0] | word[..., 1] << 8
    start = torch.arange(128, device=codes.device) * k
    high, low = word[..., start // 16], word[..., (start // 16 + 1) % (8 * k)]
    return ((high << 16 | low) >> (16 - start % 16)) & 0xFFFF


def pack_states(states: Tensor, k: int) -> Tensor:
    """(..., 128) states of a closed ring -> (..., 16 k) bytes: each state's top k bits in order."""
    place = torch.arange(15, -1, -1, device=states.device)
    bit = (states.unsqueeze(-1) >> place[:k]) & 1
    word = (bit.flatten(-2).unflatten(-1, (8 * k, 16)) << place).sum(-1)
    return torch.stack((word & 255, word >> 8), -1).flatten(-2).to(torch.uint8)


def state_points(state: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """The pair of weights of each state: (...,) -> (..., 2), in the dtype of `radius`."""
    p = (state * MULTIPLIER) & 0xFFFFFFFF
    phase, amp = (p >> 27) & 15, (p >> 21) & 63
    cosine, sine = polar_direction(angle)
    r = radius[amp]
    u, v = r * cosine[phase], r * sine[phase]
    return torch.stack(
        (torch.where(p >> 31 == 1, -u, u), torch.where((p >> 15) & 1 == 1, -v, v)), -1
    )


def polar_direction(angle: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin by the Taylor series of csrc/codecs/trellis.h: the same bits on every device."""
    x = angle.double()
    y = x * x
    cosine = sine = torch.zeros_like(y)
    for n in reversed(range(14)):
        sign = -1.0 if n % 2 else 1.0
        cosine = cosine * y + sign / _factorial(2 * n)
        sine = sine * y + sign / _factorial(2 * n + 1)
    return cosine.to(angle.dtype), (sine * x).to(angle.dtype)


def _factorial(n: int) -> float:
    """n! by float64 products in rising order, as the C++ table rounds it."""
    value = 1.0
    for i in range(1, n + 1):
        value *= i
    return value


def search_reference(tiles: Tensor, radius: Tensor, angle: Tensor, k: int) -> Tensor:
    """Tail-biting Viterbi search in plain torch: (tiles, 256) -> (tiles, 16 k). For judging."""
    points = state_points(torch.arange(STATES, device=tiles.device), radius, angle)
    codes = [_search(t, points, k) for t in tiles.split(8) if len(t)]
    return torch.cat(codes) if codes else tiles.new_zeros((0, 16 * k), dtype=torch.uint8)


def _search(tiles: Tensor, points: Tensor, k: int) -> Tensor:
    pairs = tiles.view(-1, 128, 2)
    free = _viterbi(pairs.roll(-64, 1), points, k, None)
    closing = free[:, 63] & (2 ** (16 - k) - 1)  # bits that states 127 and 0 share
    return pack_states(_viterbi(pairs, points, k, closing), k)


def _viterbi(pairs: Tensor, points: Tensor, k: int, closing: Tensor | None) -> Tensor:
    """Best states (n, 128); `closing` (n,) holds the 16-k bits around the ring's seam."""
    n, overlaps = pairs.shape[0], 2 ** (16 - k)
    best = pairs.new_zeros(n, overlaps)
    if closing is not None:
        best = torch.full_like(best, float("inf")).scatter_(1, closing[:, None], 0.0)
    back = []
    for t in range(128):
        cost = ((points[None] - pairs[:, t, None]) ** 2).sum(-1)
        cost = cost.view(n, overlaps, -1).add_(best[..., None]).view(n, 2**k, overlaps)
        best, dropped = cost.min(1)
        back.append(dropped)
    end = best.argmin(1) if closing is None else closing
    states = []
    for t in reversed(range(128)):
        state = back[t].gather(1, end[:, None])[:, 0] << (16 - k) | end
        states.append(state)
        end = state >> k
    return torch.stack(states[::-1], 1)

"""block_sparse: blocks of which only some weights are kept, as int8 or as samples of one cosine.

Layout in csrc/codecs/block_sparse.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..fitting import evenly
from ..packed import over_scale, round_to_half
from .base import Codec, Param, Tile, check_words, flag, one_of, row_scale
from .fields import Field
from .trig import turn_cosine

SAMPLE = 1 << 14  # blocks that the table of masks and the first scale are fitted on
ROUNDS = 16


@dataclass(frozen=True)
class BlockSparse(Codec):
    """layout: square, four of each 4 x 4 weights as int8 (2.5 bits per weight with a table of 256
    masks, 3 with a free mask: mask16=True), or row, a mask, size and phase per 1 x 8 weights."""

    name: ClassVar[str] = "block_sparse"
    rates: ClassVar[dict] = {2.5: {}, 3: {"mask16": True}}
    refits: ClassVar[tuple[str, ...]] = ("value_scale",)
    layout: str = one_of("square", "row")
    mask16: bool = False

    def __post_init__(self):
        check_words(self)
        flag(self.mask16, "block_sparse: mask16")
        if self.mask16 and self.layout != "square":
            raise ValueError("block_sparse: mask16 is a setting of layout=square")

    def tile(self, shape):
        if self.layout == "row":
            return Tile(1, 8, 3)
        return Tile(4, 4, 6 if self.mask16 else 5)

    def fields(self, shape):
        if self.layout == "row":
            return (
                Field("kept", "index", 1, 1, stride=1, count=8),
                Field("amplitude", "level", 8, 8, offset=8, signed=True),
                Field("phase", "cyclic", 8, 8, offset=16),
            )
        # A free mask may have fewer ones than values: then the values left over are zero.
        first, block = (16 if self.mask16 else 8), {"rows": 4, "cols": 4}
        value = block | {"signed": True, "absent": self.mask16}
        values = tuple(
            Field(f"value{n}", "level", 8, offset=first + 8 * n, **value) for n in range(4)
        )
        return (Field("pattern", "index", 8, **block), *values) if self._table else values

    def params(self, shape):
        masks = (Param("masks", (256, 2), "shared", codes=True),) if self._table else ()
        scale, rows = Param("value_scale", (1,), "shared"), Param("out_scale", (shape[0],), "out")
        return (scale, *masks, rows)

    @property
    def _table(self) -> bool:
        return self.layout == "square" and not self.mask16

    def initial_params(self, weight, seed, feedback=False, importance=None):
        rows = row_scale(weight)
        params = {"value_scale": torch.full((1,), 1 / 127), "out_scale": rows}
        w = over_scale(weight, rows[:, None])
        h = torch.ones(weight.shape[1])
        if importance is not None and weight.numel():
            h = importance / importance.max()
        blocks, weights = self._sample(w, h)
        energy = weights * blocks**2
        if self._table:
            params["masks"] = _mask_bytes(fit_masks(energy))
        kept = energy.topk(1 if self.layout == "row" else 4, dim=1).indices
        params["value_scale"] = _first_scale(blocks.gather(1, kept).flatten())
        return {p.name: params[p.name] for p in self.params(tuple(weight.shape))}

    def _sample(self, w: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Evenly spaced blocks (n, weights of a tile) of w and their columns' importance."""
        tile, (out, n) = self.tile(tuple(w.shape)), w.shape
        down, across = out // tile.rows, n // tile.cols
        if not down or not across:  # smaller than a block: the padded one
            size = (tile.rows * tile.cols,)
            whole = torch.zeros(tile.rows, tile.cols)
            if w.numel():
                part = w[: tile.rows, : tile.cols]
                whole[: part.shape[0], : part.shape[1]] = part
            return whole.view(1, -1), torch.ones(1, *size)
        at = evenly(down * across, SAMPLE)
        row = (at // across * tile.rows)[:, None, None] + torch.arange(tile.rows)[:, None]
        col = (at % across * tile.cols)[:, None, None] + torch.arange(tile.cols)
        return w[row, col].flatten(1), h[col].expand(-1, tile.rows, -1).flatten(1)

    def decode_tiles(self, codes, params, shape):
        scale = params["value_scale"]
        if self.layout == "row":
            mask, base, phase = codes.unbind(-1)
            j = torch.arange(8, device=codes.device)
            cosine = turn_cosine(phase[..., None].long() + 32 * j, 256).float().to(scale.dtype)
            value = base.view(torch.int8).to(scale.dtype) * scale
            kept = (mask[..., None] >> j & 1).bool()
            return torch.where(kept, value[..., None] * cosine, 0).flatten(1)
        value = codes[..., -4:].contiguous().view(torch.int8).to(scale.dtype) * scale
        stored = codes[..., :2] if self.mask16 else params["masks"][codes[..., 0].long()]
        mask = stored[..., 0].int() | stored[..., 1].int() << 8
        one = (mask[..., None] >> torch.arange(16, device=codes.device)) & 1
        place = one.cumsum(-1) - 1
        kept = (one == 1) & (place < 4)
        w = torch.where(kept, value.gather(-1, place.clamp(0, 3)), 0)
        return w.unflatten(-1, (4, 4)).transpose(1, 2).flatten(2).flatten(0, 1)

    def encode_reference(self, target, importance, params):
        h = torch.ones(target.shape[1]) if importance is None else importance
        scale = params["value_scale"]
        if self.layout == "row":
            w = target.unflatten(1, (-1, 8))
            return _encode_rows(w, h.view(1, -1, 8).expand_as(w), scale), dict(params)
        w = target.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(2)
        energy = w**2 * h.view(1, -1, 1, 4).expand(1, -1, 4, 4).flatten(2)
        if self.mask16:
            at = energy.topk(4, dim=-1).indices.sort(-1).values
            bits = (1 << at).sum(-1)
            head = torch.stack((bits & 255, bits >> 8), -1)
        else:
            table = params["masks"].int()
            ones = _ones(table[:, 0] | table[:, 1] << 8)
            best = (energy @ ones.t()).argmax(-1)
            at = ones.topk(4, dim=-1).indices.sort(-1).values[best]
            head = best[..., None]
        value = (w.gather(-1, at) / scale).nan_to_num(0, 0, 0).round().clamp(-127, 127)
        tail = value.to(torch.int8).view(torch.uint8)
        return torch.cat((head.to(torch.uint8), tail), -1), dict(params)


def fit_masks(energy: Tensor) -> Tensor:
    """256 masks of four ones each (256,), chosen for blocks of weighted squares (n, 16).

    Lloyd's algorithm on the energy kept: blocks go to their best mask, a mask to the four places
    that hold most of its blocks' energy. Starts from the sets of four largest that hold most.
    Squares become integers, so that sums do not depend on their order.
    """
    mean = energy.mean().clamp_min(torch.finfo(torch.float32).tiny)
    energy = (energy / mean * 64).round().clamp_max(2.0**20)
    best = energy.topk(4, dim=1)
    sets = (1 << best.indices).sum(1)
    every = _sets_of_four()
    total = torch.zeros(1 << 16, dtype=torch.float64).index_add_(
        0, sets, best.values.sum(1).double()
    )
    masks = every[total[every].sort(descending=True, stable=True).indices[:256]]
    kept = 0.0
    for _ in range(ROUNDS):
        value, nearest = (energy @ _ones(masks).t()).max(1)
        now = value.double().sum().item()
        if now <= kept:
            break
        kept = now
        sums = torch.zeros(256, 16, dtype=torch.float64).index_add_(0, nearest, energy.double())
        moved = (1 << sums.sort(dim=1, descending=True, stable=True).indices[:, :4]).sum(1)
        masks = torch.where(sums.sum(1) > 0, moved, masks)
    return masks.sort().values


def _sets_of_four() -> Tensor:
    every = torch.arange(1 << 16)
    return every[_ones(every).sum(1) == 4]


def _ones(masks: Tensor) -> Tensor:
    """(n,) masks -> (n, 16) zeros and ones."""
    return (masks[:, None] >> torch.arange(16) & 1).float()


def _mask_bytes(masks: Tensor) -> Tensor:
    return torch.stack((masks & 255, masks >> 8), 1).to(torch.uint8)


def _first_scale(values: Tensor) -> Tensor:
    """The unit of int8 codes with the least error on `values` among a few clipping ranges."""
    peak = values.abs().max()
    if peak == 0:
        return torch.full((1,), 1 / 127)
    scales = round_to_half(peak / 127 * 2 ** (-torch.arange(16) / 2))
    quantized = (values[:, None] / scales).round().clamp(-127, 127) * scales
    error = ((quantized - values[:, None]).double() ** 2).sum(0)
    return scales[error.argmin()].view(1)


def _encode_rows(w: Tensor, h: Tensor, scale: Tensor) -> Tensor:
    """Codes of blocks w (..., 8): every phase, and for each the best run of masks and size."""
    size = 127 * scale.abs()
    j = torch.arange(8)
    best = torch.zeros(w.shape[:-1])
    codes = torch.zeros((*w.shape[:-1], 3), dtype=torch.uint8)
    for phase in range(256):
        c = turn_cosine(phase + 32 * j, 256).float()
        ratio = torch.where(c != 0, w / c.where(c != 0, 1), 0)
        order = ratio.sort(-1, descending=True).indices
        along, power = (h * w * c).gather(-1, order), (h * c * c).gather(-1, order)
        along, power = along.cumsum(-1), power.cumsum(-1)
        amplitude = (along / power.clamp_min(1e-30)).minimum(size)
        pick = (amplitude * (2 * along - amplitude * power)).argmax(-1, keepdim=True)
        base = (amplitude.gather(-1, pick) / scale).nan_to_num(0, 0, 0).round().clamp(-127, 127)
        value = base * scale * c
        more = (h * value * (2 * w - value)).clamp_min(0)
        gain = more.sum(-1)
        mask = ((more > 0).long() << j).sum(-1)
        byte = base[..., 0].to(torch.int8).view(torch.uint8).long()
        found = torch.stack((mask, byte, torch.full_like(mask, phase)), -1).to(torch.uint8)
        codes = torch.where((gain > best)[..., None], found, codes)
        best = torch.maximum(best, gain)
    return codes

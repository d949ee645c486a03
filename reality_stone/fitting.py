"""Shared params from weights: k-means for a start, then least squares in turns with the codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from .metrics import squared_error
from .packed import Packed, over_scale, round_to_half

if TYPE_CHECKING:
    from .codecs.base import Codec

SAMPLE = 1 << 18  # weights that shared params are fitted on
SAMPLE_TILES = 1024  # of which there are at least so many, however large
ROUNDS = 24
ENOUGH = 2e-3  # a smaller relative gain ends the turns
CHUNK = 1024  # points whose distances are held at a time


def alternate(
    codec: Codec,
    weight: Tensor,
    params: dict[str, Tensor],
    importance: Tensor | None,
    names: Sequence[str],
) -> dict[str, Tensor]:
    """`params` with those of `names` fitted: encode, refit, and so on until the error settles.

    Works on evenly spaced rows, about SAMPLE weights in all, with their out_scale taken off.
    """
    tile, shape = codec.tile((weight.shape[0], weight.shape[1])), tuple(weight.shape)
    tall = -(-SAMPLE_TILES // tile.grid(shape)[1]) * tile.rows
    at = evenly(shape[0], max(tall, SAMPLE // shape[1]))
    count = len(at)
    rows, own, inner = weight[at], dict(params), codec.inner()
    weights = torch.ones(shape[1]) if importance is None else importance / importance.max()
    weights = weights.expand(count, shape[1])
    if "out_scale" in own:
        scale = own["out_scale"][at, None]
        rows = over_scale(rows, scale)
        own["out_scale"] = torch.ones(count)
        relative = scale.abs() / scale.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
        weights = weights * relative.clamp_min(1e-9) ** 2
    for p in codec.params((count, shape[1])):
        if p.name in own and tuple(own[p.name].shape) != tuple(p.sizes):
            own[p.name] = own[p.name].narrow(0, 0, p.sizes[0])
    best, kept = float("inf"), {name: own[name] for name in names}
    for _ in range(ROUNDS):
        codes, fitted = ops.encode(rows, importance, list(own.values()), inner.spec)
        own = dict(zip(own, fitted, strict=True))
        packed = Packed(inner, (count, shape[1]), codes, own)
        error = squared_error(packed.decode() * weights.sqrt(), rows * weights.sqrt())
        if not error < best * (1 - ENOUGH):
            break
        best, kept = error, {name: own[name] for name in names}
        for name in names:
            own[name] = packed.params[name] = refit(packed, rows, name, weights)
    return params | kept


def gain(
    codec: Codec,
    weight: Tensor,
    before: dict[str, Tensor],
    after: dict[str, Tensor],
    importance: Tensor | None,
) -> float:
    """The share of the error under params `after` that codes made for them save over codes made
    for `before`, on evenly spaced rows of about a quarter of SAMPLE weights."""
    at = evenly(weight.shape[0], max(1, SAMPLE // 4 // weight.shape[1]))
    rows, shape = weight[at], (len(at), weight.shape[1])
    sliced = {p.name for p in codec.params(shape) if p.axis in ("out", "both")}

    def own(params):
        return {name: p[at] if name in sliced else p for name, p in params.items()}

    errors = []
    for params in (before, after):
        codes, _ = ops.encode(rows, importance, list(own(params).values()), codec.spec)
        decoded = Packed(codec, shape, codes, own(after)).decode()
        errors.append(squared_error(decoded, rows, importance))
    return 1 - errors[1] / errors[0] if errors[0] else 0.0


def refit(packed: Packed, weight: Tensor, name: str, weights: Tensor) -> Tensor:
    """The param that is best in least squares for the codes and the other params.

    Every weight must be linear in one entry of it: w = c p[k] gives p[k] = sum h c w / sum h c^2,
    both sums taken by the adjoint of decode at p = 1. `weights` h (out, in). Held to float16
    values; entries that no weight uses stay.
    """
    index, before = list(packed.params).index(name), packed.params[name]
    one = replace(packed, params=packed.params | {name: torch.ones_like(before)})
    arguments = (one.codes, list(one.params.values()), one.codec.spec, one.shape)
    factor = one.decode()
    top = ops.decode_grad_params((weights * weight).contiguous(), *arguments)[index]
    power = ops.decode_grad_params((weights * factor).contiguous(), *arguments)[index]
    best = top / power
    return round_to_half(torch.where((power > 0) & best.isfinite(), best, before))


def row_sample(weight: Tensor, limit: int) -> Tensor:
    """Evenly spaced rows of about `limit` weights in all."""
    return weight[evenly(weight.shape[0], max(1, limit // max(1, weight.shape[1])))]


def evenly(total: int, limit: int) -> Tensor:
    """At most `limit` of the numbers below `total`, evenly spaced."""
    count = min(total, limit)
    return torch.arange(count) * total // max(1, count)


def unit_rows(
    weight: Tensor, importance: Tensor | None, limit: int = SAMPLE
) -> tuple[Tensor, Tensor]:
    """Evenly spaced rows, each with a mean square of one, and what an error of each weight counts:
    the column's importance times the row's mean square, at most 1.

    The rows do not depend on how a scale is held, so neither do fits to them."""
    if not weight.numel():
        return weight, weight
    rows = row_sample(weight, limit).double()
    size = rows.pow(2).mean(1, keepdim=True).sqrt()
    columns = torch.ones(weight.shape[1]) if importance is None else importance / importance.max()
    relative = size / size.max().clamp_min(torch.finfo(torch.float64).tiny)
    unit = over_scale(rows, size).float()
    return unit, columns * relative.clamp_min(1e-9).float() ** 2


def kmeans(points: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """Centres (k, d) of points (n, d) by Lloyd's algorithm; deterministic."""
    generator = torch.Generator().manual_seed(seed)
    centres = _first_centres(points, k, generator)
    for _ in range(rounds):
        half = centres.pow(2).sum(1) / -2  # |p - c|^2 is twice what is left, without |p|^2
        nearest = torch.cat([(half + p @ centres.t()).argmax(1) for p in points.split(CHUNK)])
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        count = torch.bincount(nearest, minlength=k).to(points.dtype)
        moved = torch.where((count > 0)[:, None], total / count.clamp_min(1)[:, None], centres)
        if torch.equal(moved, centres):
            break
        centres = moved
    return centres


def axes(points: Tensor, k: int, seed: int, rounds: int = 20) -> Tensor:
    """Unit vectors (k, d) such that each of points (n, d) is near a multiple, of either sign, of
    one: k-means on directions, long points counting more."""
    generator = torch.Generator().manual_seed(seed)
    lines = _unit(_first_centres(points[points.abs().amax(1) > 0], k, generator))
    for _ in range(rounds):
        found = [(p @ lines.t()).abs().max(1) for p in points.split(CHUNK)]
        along, nearest = (torch.cat(parts) for parts in zip(*found, strict=True))
        side = (points * lines[nearest]).sum(1, keepdim=True).sign()
        total = torch.zeros_like(lines).index_add_(0, nearest, points * side * along[:, None])
        moved = torch.where(total.abs().amax(1, keepdim=True) > 0, _unit(total), lines)
        if (moved - lines).abs().max() < 1e-4:
            break
        lines = moved
    return lines


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _first_centres(points: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k of the points by chance; random directions where there are fewer."""
    order = torch.randperm(len(points), generator=generator)[:k]
    missing = k - len(order)
    size = points.abs().mean().item() if len(points) else 1.0
    more = torch.randn(missing, points.shape[1], generator=generator) * size
    return torch.cat((points[order], more.to(points.dtype)))

"""Error feedback from a Hessian (block LDLQ) and scales in its metric, for any codec.

With H = E[x x^T] of a layer's input, the loss of quantized weights is tr (W-Q) H (W-Q)^T. Blocks of
columns are quantized from the last to the first, each with the errors already made fed back through
the block LDL factor of H (Tseng et al., QuIP#, 2024; GPTQ, 2023, is the one-column case).

With F = E[g g^T] of the gradients at the layer's output too, the loss is tr F (W-Q) H (W-Q)^T and
errors are fed back along both sides (Tseng et al., YAQA, 2025): a block waits for all blocks below
it and right of it, so the blocks of one antidiagonal are quantized together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from .packed import Packed, over_scale, round_to_half

if TYPE_CHECKING:
    from .codecs.base import Codec

DAMPING = 0.01
# Of the output side, whose sample is noisier. At 2 bits on the shipped model the KL divergence
# after encoding is 8 percent below that with 0.01, and 4 percent below that with 0.3.
OUTPUT_DAMPING = 0.1
LARGEST_JOINT_FIT = 4096  # columns whose scales are fitted together: a cubic solve


@dataclass
class Hessian:
    """A second moment (n, n) in float64 with the damping that makes its factor exist."""

    matrix: Tensor
    damping: float
    label: str = ""

    @staticmethod
    def prepare(
        hessian: Tensor | Hessian | None, features: int, label: str, damping: float = DAMPING
    ) -> Hessian | None:
        """Check and damp. One that cannot be used gives a warning with the label, and None."""
        if hessian is None or isinstance(hessian, Hessian):
            return hessian
        if tuple(hessian.shape) != (features, features):
            raise ValueError(
                f"hessian must be ({features}, {features}) for this weight, "
                f"got {tuple(hessian.shape)}"
            )
        matrix = hessian.detach().to("cpu", torch.float64)
        mean = matrix.diagonal().mean().item() if features else 0.0
        if not bool(matrix.isfinite().all()) or mean <= 0:
            what = "holds values that are not finite" if mean > 0 or mean != mean else "is zero"
            _warn(label, f"the Hessian {what}; encoding without error feedback")
            return None
        if not 1e-20 < mean < 1e20:  # keep clear of the ends of float32, where the work is done
            matrix = matrix / mean
        return Hessian(matrix, damping, label)

    def diagonal(self) -> Tensor:
        """Damped diagonal, float32: the importance of each input column."""
        d = self.matrix.diagonal()
        return (d.clamp_min(0) + self.damping * d.mean()).float()

    def damped(self) -> Tensor:
        """H + damping * mean(diag H), float32."""
        h = self.matrix.float()
        h.diagonal().add_(self.damping * h.diagonal().mean())
        return h

    def rotated(self, scale: Tensor | None, block: int, features: int) -> Tensor:
        """The damped Hessian of x -> Hadamard(scale * x), padded to `features`, float32."""
        h = self.matrix.float()
        if scale is not None:
            h = h * scale * scale[:, None]
        if block > 1:
            h = ops.hadamard(ops.hadamard(h, block).t().contiguous(), block)
        mean = h.diagonal().mean()
        h.diagonal().add_(self.damping * mean)
        pad = features - h.shape[0]
        if pad:
            h = torch.nn.functional.pad(h, (0, pad, 0, pad))
            h.diagonal()[-pad:] = mean
        return h


def feedback_factor(h: Tensor, block: int, label: str = "") -> Tensor | None:
    """Unit block-lower factor L of h = L D L^T (float32), D block diagonal. Overwrites h, float64.

    Damping rises tenfold at a time, up to four times, when h is not positive definite; then None
    with a warning that names the layer.
    """
    mean, added = h.diagonal().mean().item(), 0.0
    for attempt in range(5):
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed and bool(lower.isfinite().all()):
            for start in range(0, h.shape[0], block):
                c = slice(start, start + block)
                lower[start:, c] = torch.linalg.solve_triangular(
                    lower[c, c].clone(), lower[start:, c].clone(), upper=False, left=False
                )
            return lower.float()
        more = DAMPING * 10.0 ** (attempt + 1) * mean
        h.diagonal().add_(more - added)
        added = more
    _warn(label, "the Hessian is singular even with 10000 times the damping; no error feedback")
    return None


def encode_with_feedback(
    codec: Codec,
    weight: Tensor,
    params: dict[str, Tensor],
    hessian: Hessian,
    outputs: Hessian | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and params of `weight`, block by block with fed-back errors.

    `outputs` is left out where blocks of 16 do not cover rows and columns exactly.
    """
    shape = (weight.shape[0], weight.shape[1])
    tile = codec.tile(shape)
    height, width = (max(n, 16 // n * n) for n in (tile.rows, tile.cols))
    target = to_inner(codec, weight, params)
    rows, features = target.shape
    h = hessian.rotated(params.get("in_scale"), codec.blocks(shape)[1], features).double()
    # Damped, so only a matrix that is no Hessian has less.
    importance = h.diagonal().float().clamp_min(DAMPING * h.diagonal().mean().item())
    factor = feedback_factor(h, width, hessian.label)
    del h  # two float64 matrices of a wide layer are half a gigabyte
    left = None
    if outputs is not None and rows % height == 0 and features % width == 0:
        f = outputs.rotated(params.get("out_scale"), codec.blocks(shape)[0], rows).double()
        left = feedback_factor(f, height, outputs.label)

    work = _Blocks(codec, shape, {name: p.clone() for name, p in params.items()})
    if left is not None and factor is not None:
        _feed_both_ways(work, target, left, factor, height, width)
        return work.codes, work.params
    error = target.clone()  # target - quantized, where quantized; the target elsewhere
    for start in reversed(range(0, features, width)):
        end = min(start + width, features)
        goal = target[:, start:end]
        if factor is not None and end < features:
            goal = goal + error[:, end:] @ factor[end:, start:end]
        place = slice(0, rows), slice(start, end)
        quantized = work.quantize(goal, [place], importance[start:end])
        error[:, start:end] = target[:, start:end] - quantized
    return work.codes, work.params


def _feed_both_ways(
    work: _Blocks, target: Tensor, left: Tensor, right: Tensor, height: int, width: int
) -> None:
    """Quantize T with its errors E fed back as left^T E right, both unit block-lower."""
    down, across = target.shape[0] // height, target.shape[1] // width
    right = right.view(-1, across, width).transpose(0, 1)  # (across, features, width)
    left = left.view(-1, down, height).permute(1, 2, 0)  # (down, height, rows)
    # Zero where nothing is quantized yet, so that whole rows and columns can be multiplied.
    error, carried = torch.zeros_like(target), torch.zeros_like(target)
    by_rows = error.view(down, height, -1)
    by_cols = carried.view(-1, across, width).transpose(0, 1)
    for diagonal in reversed(range(down + across - 1)):
        i = torch.arange(max(0, diagonal - across + 1), min(down, diagonal + 1))
        j = diagonal - i
        places = [
            (slice(height * a, height * a + height), slice(width * b, width * b + width))
            for a, b in zip(i.tolist(), j.tolist(), strict=True)
        ]
        own = torch.stack([target[place] for place in places])
        from_right = torch.bmm(by_rows[i], right[j])
        goal = own + from_right + torch.bmm(left[i], by_cols[j])
        made = own - work.quantize(goal.flatten(0, 1), places).view_as(own)
        for place, e, p in zip(places, made, from_right, strict=True):
            error[place] = e
            carried[place] = e + p


class _Blocks:
    """Quantizes rectangles of T and keeps their codes and the params fitted per tile."""

    def __init__(self, codec: Codec, shape: tuple[int, int], params: dict[str, Tensor]):
        self.params, self.tile, self.inner = params, codec.tile(shape), codec.inner()
        self.codes = torch.empty((*self.tile.grid(shape), self.tile.bytes), dtype=torch.uint8)
        self.axis = {p.name: p.axis for p in codec.params(shape)}

    def quantize(
        self,
        goal: Tensor,
        places: Sequence[tuple[slice, slice]],
        importance: Tensor | None = None,
    ) -> Tensor:
        """Encode the goals of equal rectangles T[rows, cols], one below the other; their values."""
        tiles = [self._tiles(*place) for place in places]
        own = {name: self._own(name, p, goal, places, tiles) for name, p in self.params.items()}
        codes, fitted = ops.encode(
            goal.contiguous(), importance, list(own.values()), self.inner.spec
        )
        for place, part in zip(tiles, codes.chunk(len(tiles)), strict=True):
            self.codes[place] = part
        for name, value in zip(own, fitted, strict=True):
            if self.axis[name] == "both":
                for place, part in zip(tiles, value.chunk(len(tiles)), strict=True):
                    kept = self.params[name][place]
                    kept.copy_(part[: kept.shape[0]])
        return ops.decode(codes, fitted, self.inner.spec, goal.shape)

    def _tiles(self, rows: slice, cols: slice) -> tuple[slice, slice]:
        r, c = self.tile.rows, self.tile.cols
        return slice(rows.start // r, rows.stop // r), slice(cols.start // c, cols.stop // c)

    def _own(self, name, p, goal, places, tiles) -> Tensor:
        """A param as the goals see it: the frame left out (scales of one)."""
        if name == "out_scale":
            return torch.ones(goal.shape[0])
        if name == "in_scale":
            return torch.ones(goal.shape[1])
        if self.axis[name] == "out":
            return torch.cat([p[rows] for rows, _ in places])
        if self.axis[name] != "both":
            return p
        parts = torch.cat([p[place] for place in tiles])
        missing = goal.shape[0] // self.tile.rows - parts.shape[0]
        return torch.nn.functional.pad(parts, (0, 0) * (parts.dim() - 1) + (0, missing))


def to_inner(codec: Codec, weight: Tensor, params: dict[str, Tensor]) -> Tensor:
    """The target of T, padded to tiles: what the frame takes off the weight."""
    shape = (weight.shape[0], weight.shape[1])
    out_block, in_block = codec.blocks(shape)
    w = weight
    if "out_scale" in params:
        w = over_scale(w, params["out_scale"][:, None])
    if "in_scale" in params:
        w = over_scale(w, params["in_scale"])
    w = ops.hadamard(ops.hadamard(w, in_block).t().contiguous(), out_block).t()
    tile = codec.tile(shape)
    rows, cols = tile.grid(shape)
    return torch.nn.functional.pad(
        w, (0, cols * tile.cols - shape[1], 0, rows * tile.rows - shape[0])
    ).contiguous()


def refit_scales(
    packed: Packed, weight: Tensor, hessian: Hessian | None, outputs: Hessian | None = None
) -> dict[str, Tensor]:
    """The frame's scales that are best in closed form for the codes, held to float16 values.

    Each row's scale minimises (w - s q) H (w - s q)^T, or all rows' together tr F E H E^T. With a
    Hessian of moderate size the scales of all columns follow, jointly, and then the rows once more.
    """
    h = None if hessian is None else hessian.damped()
    f = outputs.damped() if outputs is not None and packed.shape[0] <= LARGEST_JOINT_FIT else None
    scales = {"out_scale": round_to_half(_best_out_scale(packed, weight, h, f))}
    if h is None or "in_scale" not in packed.params or packed.shape[1] > LARGEST_JOINT_FIT:
        return scales
    fitted = replace(packed, params=packed.params | scales)
    in_scale = round_to_half(_best_in_scale(fitted, weight, h, f))
    fitted = replace(packed, params=fitted.params | {"in_scale": in_scale})
    return {"in_scale": in_scale, "out_scale": round_to_half(_best_out_scale(fitted, weight, h, f))}


def _unscaled(packed: Packed, name: str) -> Tensor:
    ones = torch.ones_like(packed.params[name])
    return replace(packed, params=packed.params | {name: ones}).decode()


def _best_out_scale(packed: Packed, weight: Tensor, h: Tensor | None, f: Tensor | None) -> Tensor:
    q = _unscaled(packed, "out_scale")
    qh = q if h is None else q @ h
    if f is not None:
        return _solve((qh @ q.t()).mul_(f), (qh @ weight.t()).mul_(f), packed.params["out_scale"])
    power = (qh * q).sum(1)
    best = (qh * weight).sum(1) / power
    return torch.where((power > 0) & best.isfinite(), best, packed.params["out_scale"])


def _best_in_scale(packed: Packed, weight: Tensor, h: Tensor, f: Tensor | None) -> Tensor:
    q = _unscaled(packed, "in_scale")
    qf = q.t() if f is None else q.t() @ f
    return _solve((qf @ q).mul_(h), (qf @ weight).mul_(h), packed.params["in_scale"])


def _solve(system: Tensor, goal: Tensor, otherwise: Tensor) -> Tensor:
    """system^-1 of the row sums of goal, in float64; `otherwise` where that cannot be had."""
    system = system.double()
    system.diagonal().add_(1e-6 * system.diagonal().mean())
    best, failed = torch.linalg.solve_ex(system, goal.sum(1, dtype=torch.float64))
    usable = not failed and bool(best.isfinite().all())
    return best.float() if usable else otherwise


def _warn(label: str, message: str) -> None:
    warnings.warn(f"{label or 'a layer'}: {message}", stacklevel=4)

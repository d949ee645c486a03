"""Error feedback from a Hessian (block LDLQ) and scales in its metric, for any codec.

With H = E[x x^T] of a layer's input, the loss of quantized weights is tr (W-Q) H (W-Q)^T. Blocks of
columns are quantized from the last to the first, each with the errors already made fed back through
the block LDL factor of H (Tseng et al., QuIP#, 2024; GPTQ, 2023, is the one-column case).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops
from .packed import Packed, over_scale, round_to_half

if TYPE_CHECKING:
    from .codecs.base import Codec

DAMPING = 0.01
LARGEST_JOINT_FIT = 4096  # columns whose scales are fitted together: a cubic solve


@dataclass
class Hessian:
    """E[x x^T] (in, in) in float64 with the damping that makes its factor exist."""

    matrix: Tensor
    damping: float
    label: str = ""

    @staticmethod
    def prepare(hessian: Tensor | Hessian | None, features: int, label: str) -> Hessian | None:
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
        return Hessian(matrix, DAMPING, label)

    def diagonal(self) -> Tensor:
        """Damped diagonal, float32: the importance of each input column."""
        d = self.matrix.diagonal()
        return (d.clamp_min(0) + self.damping * d.mean()).float()

    def damped(self) -> Tensor:
        """H + damping * mean(diag H), float32."""
        h = self.matrix.float()
        h.diagonal().add_(self.damping * h.diagonal().mean())
        return h

    def rotated(self, in_scale: Tensor | None, block: int, features: int) -> Tensor:
        """The damped Hessian of x -> Hadamard(in_scale * x), padded to `features`, float32."""
        h = self.matrix.float()
        if in_scale is not None:
            h = h * in_scale * in_scale[:, None]
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
    codec: Codec, weight: Tensor, params: dict[str, Tensor], hessian: Hessian
) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes and params of `weight`, block column by block column with fed-back errors."""
    shape = (weight.shape[0], weight.shape[1])
    tile, inner = codec.tile(shape), codec.inner()
    features = tile.grid(shape)[1] * tile.cols
    block = max(tile.cols, 16 // tile.cols * tile.cols)
    h = hessian.rotated(params.get("in_scale"), codec.blocks(shape)[1], features).double()
    # Damped, so only a matrix that is no Hessian has less.
    importance = h.diagonal().float().clamp_min(DAMPING * h.diagonal().mean().item())
    factor = feedback_factor(h, block, hessian.label)
    del h  # two float64 matrices of a wide layer are half a gigabyte
    target = to_inner(codec, weight, params)

    params = {name: p.clone() for name, p in params.items()}
    axis = {p.name: p.axis for p in codec.params(shape)}
    codes = torch.empty((*tile.grid(shape), tile.bytes), dtype=torch.uint8)
    error = target.clone()  # target - quantized, where quantized; the target elsewhere
    for start in reversed(range(0, features, block)):
        end = min(start + block, features)
        goal = target[:, start:end]
        if factor is not None and end < features:
            goal = goal + error[:, end:] @ factor[end:, start:end]
        a, b = start // tile.cols, end // tile.cols
        own = _block_params(params, axis, a, b, start, end, target.shape[0])
        block_codes, fitted = ops.encode(
            goal.contiguous(), importance[start:end], list(own.values()), inner.spec
        )
        for name, value in zip(own, fitted, strict=True):
            if axis[name] == "both":
                params[name][:, a:b] = value[: params[name].shape[0]]
        codes[:, a:b] = block_codes
        quantized = ops.decode(block_codes, fitted, inner.spec, goal.shape)
        error[:, start:end] = target[:, start:end] - quantized
    return codes, params


def _block_params(params, axis, a, b, start, end, rows) -> dict[str, Tensor]:
    """The params of columns [start, end) of T, frame left out (scales of one)."""
    own = {}
    for name, p in params.items():
        if name == "out_scale":
            own[name] = torch.ones(rows)
        elif name == "in_scale":
            own[name] = torch.ones(end - start)
        elif axis[name] == "both":
            own[name] = torch.nn.functional.pad(
                p[:, a:b], (0, 0, 0, rows - p.shape[0])
            ).contiguous()
        else:
            own[name] = p
    return own


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


def refit_scales(packed: Packed, weight: Tensor, hessian: Hessian | None) -> dict[str, Tensor]:
    """The frame's scales that are best in closed form for the codes, held to float16 values.

    Each row's scale minimises (w - s q) H (w - s q)^T. With a Hessian of moderate size the scales
    of all columns follow, jointly, and then the rows once more.
    """
    h = None if hessian is None else hessian.damped()
    scales = {"out_scale": round_to_half(_best_out_scale(packed, weight, h))}
    if h is None or "in_scale" not in packed.params or packed.shape[1] > LARGEST_JOINT_FIT:
        return scales
    fitted = replace(packed, params=packed.params | scales)
    in_scale = round_to_half(_best_in_scale(fitted, weight, h))
    fitted = replace(packed, params=fitted.params | {"in_scale": in_scale})
    return {"in_scale": in_scale, "out_scale": round_to_half(_best_out_scale(fitted, weight, h))}


def _unscaled(packed: Packed, name: str) -> Tensor:
    ones = torch.ones_like(packed.params[name])
    return replace(packed, params=packed.params | {name: ones}).decode()


def _best_out_scale(packed: Packed, weight: Tensor, h: Tensor | None) -> Tensor:
    q = _unscaled(packed, "out_scale")
    qh = q if h is None else q @ h
    power = (qh * q).sum(1)
    best = (qh * weight).sum(1) / power
    return torch.where((power > 0) & best.isfinite(), best, packed.params["out_scale"])


def _best_in_scale(packed: Packed, weight: Tensor, h: Tensor) -> Tensor:
    q = _unscaled(packed, "in_scale")
    goal = (q.t() @ weight).mul_(h).sum(1, dtype=torch.float64)
    product = (q.t() @ q).mul_(h)
    del q
    system = product.double()
    del product
    system.diagonal().add_(1e-6 * system.diagonal().mean())
    best, failed = torch.linalg.solve_ex(system, goal)
    usable = not failed and bool(best.isfinite().all())
    return best.float() if usable else packed.params["in_scale"]


def _warn(label: str, message: str) -> None:
    warnings.warn(f"{label or 'a layer'}: {message}", stacklevel=4)

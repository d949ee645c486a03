"""What the quantizers compute, in plain torch: the definition that the kernels are judged by.

With u = weight / scale and the levels c (`centers`), the quantized weight is scale * f(u):

    gumbel       f = sum p_i c_i, p = softmax(-(u - c)^2 / tau); every derivative is the exact one
    ste          f = the nearest c; df/du = 1 within half a step of a level, 0 beyond the outer ones
    attenuated   the same, beyond them df/du = exp(-10 * distance), the distance counted in steps
    codebook     as ste; `tau` is the weight of the loss's pull on the weight (VQ-VAE's beta)

The loss is the mean of (weight - scale * f)^2. In the three hard modes its derivative is that of a
fixed choice of levels: it pulls weights to their levels and levels to their weights.
Sources: Bengio et al., 2013 (straight-through); Esser et al., LSQ, 2020: df/du = 1 gives the scale
its derivative f - u; van den Oord et al., VQ-VAE, 2017.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

MODES = ("ste", "attenuated", "codebook", "gumbel")
MOST_LEVELS = 256
CHUNK = 1 << 22  # distances held at a time
LOWEST_TAU = 1e-30  # its inverse, times the square of any usable distance, is finite in float32


class Quantized(NamedTuple):
    """weight (out, in) of the forward pass, codes (out, in) uint8 of the nearest levels, and loss,
    the mean squared quantization error."""

    weight: Tensor
    codes: Tensor
    loss: Tensor


class ScaleGradient(torch.autograd.Function):
    """x, with a gradient `factor` times as large."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


def quantize(
    weight: Tensor,
    centers: Tensor,
    tau: float,
    mode: str,
    scale: Tensor | None = None,
    seed: int | None = None,
) -> Quantized:
    """Quantize weight (out, in) to the levels centers (levels,), times scale (1,) or (out,).

    `seed`: Gumbel noise is added to the logits of mode gumbel; the same seed gives the same noise.
    Rows are taken a few at a time, forward and backward, so that no more than CHUNK distances
    exist. ValueError on arguments that are not so and on weights that are not finite.
    """
    check(weight, centers, tau, mode, scale)
    out, features = weight.shape
    if not weight.numel():
        return Quantized(weight * 1, torch.zeros_like(weight, dtype=torch.uint8), weight.sum())
    scale = weight.new_ones(1, 1) if scale is None else scale.reshape(-1, 1)
    step = max(1, CHUNK // (features * len(centers)))
    parts = []
    for i, start in enumerate(range(0, out, step)):
        rows = slice(start, start + step)
        arguments = weight[rows], centers, scale[rows] if len(scale) > 1 else scale, tau, mode
        noise = None if seed is None else (seed, i)
        if step >= out:
            parts.append(_rows(*arguments, noise))
        else:
            again = {"use_reentrant": False, "preserve_rng_state": False}
            parts.append(checkpoint(_rows, *arguments, noise, **again))
    values, codes, errors = zip(*parts, strict=True)
    loss = torch.stack(errors).sum() / weight.numel()
    if weight.device.type == "cpu" and not torch.compiler.is_compiling():
        explain(loss, weight, centers, scale)
    return Quantized(torch.cat(values), torch.cat(codes), loss)


def _rows(weight, centers, scale, tau, mode, noise):
    """Values, codes and the sum of squared errors of some rows; scale is (1, 1) or (rows, 1)."""
    u = weight / scale
    offset = u.unsqueeze(-1) - centers
    codes = offset.detach().abs().argmin(-1)
    if mode == "gumbel":
        logits = -offset.square() / max(tau, LOWEST_TAU)
        if noise is not None:
            logits = logits + gumbel_noise(logits, *noise)
        value = scale * (logits.softmax(-1) * centers).sum(-1)
        error = weight - value
    else:
        nearest = centers[codes]
        value = scale * (nearest + slope(u.detach(), centers, mode) * (u - u.detach()))
        pulled = ScaleGradient.apply(weight, tau) if mode == "codebook" else weight
        error = pulled - scale * nearest
    return value, codes.to(torch.uint8), error.square().sum()


def slope(u: Tensor, centers: Tensor, mode: str) -> Tensor:
    """df/du of the hard modes."""
    levels = centers.detach().sort().values
    low_step, high_step = levels[1] - levels[0], levels[-1] - levels[-2]
    low, high = levels[0] - 0.5 * low_step, levels[-1] + 0.5 * high_step
    inside = (u >= low) & (u <= high)
    if mode != "attenuated":
        return inside.to(u.dtype)
    tiny = torch.finfo(u.dtype).tiny
    below, above = (low - u) / low_step.clamp_min(tiny), (u - high) / high_step.clamp_min(tiny)
    return (-10 * torch.maximum(below, above).clamp_min(0)).exp()


def gumbel_noise(like: Tensor, seed: int, part: int) -> Tensor:
    """-log(-log(uniform)) in like's shape, dtype and device."""
    generator = torch.Generator(like.device).manual_seed((seed + part) % 2**63)
    uniform = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return -(-uniform.clamp(1e-12, 1 - 1e-7).log()).log()


def check(weight: Tensor, centers: Tensor, tau: float, mode: str, scale: Tensor | None) -> None:
    """One sentence on the first argument that is not as `quantize` wants it."""
    if mode not in MODES:
        raise ValueError(f"mode must be {', '.join(MODES[:-1])} or {MODES[-1]}, got {mode!r}")
    if not (tau > 0 and math.isfinite(tau)):
        raise ValueError(f"tau must be positive and finite, got {tau}")
    if weight.dim() != 2:
        raise ValueError(f"weight must have two dimensions, got shape {tuple(weight.shape)}")
    if centers.dim() != 1 or not 2 <= len(centers) <= MOST_LEVELS:
        raise ValueError(
            f"centers must be (levels,) of 2 to {MOST_LEVELS} levels, got {tuple(centers.shape)}"
        )
    if scale is not None and (scale.dim() != 1 or len(scale) not in (1, len(weight))):
        raise ValueError(f"scale must be (1,) or ({len(weight)},), got {tuple(scale.shape)}")


def explain(loss: Tensor, weight: Tensor, centers: Tensor, scale: Tensor) -> None:
    """ValueError when an argument is not finite, naming it: a NaN must not pass unseen."""
    if not loss.isfinite():
        bad = (~weight.isfinite()).nonzero()
        if len(bad):
            at = tuple(bad[0].tolist())
            raise ValueError(f"the weight is not finite at {at}: {weight[at].item()}")
    if not centers.isfinite().all():
        raise ValueError("the centers hold a value that is not finite")
    if not (scale.isfinite() & (scale != 0)).all():
        raise ValueError("the scale holds a value that is zero or not finite")

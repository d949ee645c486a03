"""Every op in plain torch: the judge of the kernels, and the fallback without the compiled library.

Works in float64 too, where the kernels do not, so gradients can be checked by finite differences.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import codecs, ops
from .codecs.base import check_finite, hadamard
from .codecs.trellis import Trellis
from .derivative.engine import bit_derivative_reference
from .feedback import to_inner
from .quantizers import formulas


def _named(codec: str, params: Sequence[Tensor], shape: Sequence[int]):
    parsed = codecs.codec(codec)
    expected = parsed.params((shape[0], shape[1]))
    if len(expected) != len(params):
        raise ValueError(f"{codec}: expected {len(expected)} params, got {len(params)}")
    for spec, p in zip(expected, params, strict=True):
        if tuple(p.shape) != tuple(spec.sizes):
            raise ValueError(
                f"{codec}: param {spec.name} must have shape {list(spec.sizes)}, "
                f"got {list(p.shape)}"
            )
        if spec.codes != (p.dtype == torch.uint8):
            raise TypeError(f"{codec}: param {spec.name} has dtype {p.dtype}")
    return parsed, {spec.name: p for spec, p in zip(expected, params, strict=True)}


def decode(codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]) -> Tensor:
    parsed, named = _named(codec, params, shape)
    tile = parsed.tile((shape[0], shape[1]))
    wanted = (*tile.grid((shape[0], shape[1])), tile.bytes)
    if codes.dtype != torch.uint8:
        raise TypeError(f"{codec}: codes must be uint8, got {codes.dtype}")
    if tuple(codes.shape) != wanted:
        raise ValueError(f"{codec}: codes must have shape {list(wanted)}, got {list(codes.shape)}")
    if not shape[0] or not shape[1]:
        return torch.zeros(tuple(shape), device=codes.device)
    return parsed.decode_reference(codes, named, (shape[0], shape[1]))


def linear(x, codes, params, codec, shape):
    w = decode(codes, params, codec, shape)
    if x.shape[-1:] != (shape[1],):
        raise ValueError(f"{codec}: x must end in {shape[1]} features, got shape {list(x.shape)}")
    return (x.to(w.dtype) @ w.t()).to(x.dtype)


def linear_grad_input(grad, codes, params, codec, shape):
    w = decode(codes, params, codec, shape)
    return (grad.to(w.dtype) @ w).to(grad.dtype)


def linear_grad_params(grad, x, codes, params, codec, shape):
    dtype = next((p.dtype for p in params if p.is_floating_point()), torch.float32)
    dw = torch.zeros(tuple(shape), dtype=dtype, device=x.device)
    if grad.numel() and x.numel():
        dw = grad.reshape(-1, shape[0]).to(dtype).t() @ x.reshape(-1, shape[1]).to(dtype)
    return decode_grad_params(dw, codes, params, codec, shape)


def decode_grad_params(grad, codes, params, codec, shape):
    if not grad.numel():
        return [
            torch.zeros_like(p) if p.is_floating_point() else torch.empty(0, device=grad.device)
            for p in params
        ]
    with torch.enable_grad():
        leaves = [p.detach().requires_grad_(p.is_floating_point()) for p in params]
        w = decode(codes, leaves, codec, shape)
        wanted = [p for p in leaves if p.requires_grad]
        found = iter(
            torch.autograd.grad(w, wanted, grad, allow_unused=True, materialize_grads=True)
        )
    return [next(found) if p.requires_grad else torch.empty(0, device=grad.device) for p in leaves]


def encode(weight, importance, params, codec):
    parsed = codecs.codec(codec)
    check_finite(weight, codec)
    shape = (weight.shape[0], weight.shape[1])
    named = {spec.name: p for spec, p in zip(parsed.params(shape), params, strict=True)}
    tile = parsed.tile(shape)
    if not weight.numel():
        empty = torch.zeros((*tile.grid(shape), tile.bytes), dtype=torch.uint8)
        return empty, [p.clone() for p in params]
    target = to_inner(parsed, weight, named)
    if importance is not None:
        importance = torch.nn.functional.pad(importance, (0, target.shape[1] - shape[1]), value=1.0)
    codes, fitted = parsed.encode_reference(target, importance, named)
    return codes, [fitted[name].clone() for name in named]


def check_codes(codes, params, codec, shape):
    w = decode(codes, params, codec, shape)
    if not bool(w.isfinite().all()):
        raise ValueError(f"{codec}: the codes decode to values that are not finite")


def trellis_encode(targets, radius, angle, bits, search):
    parsed = Trellis(bits=bits)
    n = targets.shape[0]
    target = targets.view(n, 16, 16).transpose(0, 1).reshape(16, 16 * n)
    codes, _ = parsed.encode_reference(target, None, {"radius": radius, "angle": angle})
    return codes.view(n, -1)


def qat_linear(x, weight, centers, tau, mode, scale=None):
    formulas.check(weight, centers, tau, mode, scale)
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"x must end in {weight.shape[1]} features, got shape {list(x.shape)}")
    q, _, loss = formulas.quantize(weight, centers, tau, mode, scale)
    return (x.to(q.dtype) @ q.t()).to(x.dtype), loss.clone()


def qat_linear_backward(grad, grad_loss, x, weight, centers, tau, mode, scale, wanted):
    given = [x, weight, centers, weight.new_ones(1) if scale is None else scale]
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in given]
        results = qat_linear(*leaves[:3], tau, mode, leaves[3])
        grads = torch.autograd.grad(
            results, leaves, (grad, grad_loss), allow_unused=True, materialize_grads=True
        )
    return tuple(
        g.contiguous() if want else weight.new_empty(0)
        for g, want in zip(grads, wanted, strict=True)
    )


KERNELS = {
    "encode": encode,
    "decode": decode,
    "linear": linear,
    "linear_grad_input": linear_grad_input,
    "linear_grad_params": linear_grad_params,
    "decode_grad_params": decode_grad_params,
    "check_codes": check_codes,
    "hadamard": lambda x, block: hadamard(x, block).clone(),
    "trellis_encode": trellis_encode,
    "bit_derivative": bit_derivative_reference,
    "qat_linear": qat_linear,
    "qat_linear_backward": qat_linear_backward,
}
ops.register_reference(KERNELS)

"""The torch ops: typed wrappers, shape rules, derivatives. The only file that says torch.ops.

The kernels are C++ (csrc/). Where the compiled library is missing the same ops are defined here and
`reality_stone.reference` gives them plain-torch kernels.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C
except ImportError as error:
    _C = None
    MISSING = str(error)
else:
    MISSING = ""

ACCURACIES = ("auto", "exact", "int8")

# Equal to the schemas in csrc/library.cpp; a test compares them.
SCHEMAS = {
    "encode": "(Tensor weight, Tensor? importance, Tensor[] params, str codec)"
    " -> (Tensor, Tensor[])",
    "decode": "(Tensor codes, Tensor[] params, str codec, int[] shape) -> Tensor",
    "linear": "(Tensor x, Tensor codes, Tensor[] params, str codec, int[] shape) -> Tensor",
    "linear_grad_input": "(Tensor grad, Tensor codes, Tensor[] params, str codec, int[] shape)"
    " -> Tensor",
    "linear_grad_params": "(Tensor grad, Tensor x, Tensor codes, Tensor[] params, str codec,"
    " int[] shape) -> Tensor[]",
    "decode_grad_params": "(Tensor grad, Tensor codes, Tensor[] params, str codec, int[] shape)"
    " -> Tensor[]",
    "check_codes": "(Tensor codes, Tensor[] params, str codec, int[] shape) -> ()",
    "hadamard": "(Tensor x, int block) -> Tensor",
    "trellis_encode": "(Tensor targets, Tensor radius, Tensor angle, float bits, str search)"
    " -> Tensor",
    "bit_derivative": "(Tensor codes, int order, str layout) -> Tensor",
    "qat_linear": "(Tensor x, Tensor weight, Tensor centers, float tau, str mode,"
    " Tensor? scale=None) -> (Tensor, Tensor)",
    "qat_linear_backward": "(Tensor grad, Tensor grad_loss, Tensor x, Tensor weight,"
    " Tensor centers, float tau, str mode, Tensor? scale, bool[4] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
}

_library = torch.library.Library("reality_stone", "FRAGMENT")
if _C is None:
    for _name, _schema in SCHEMAS.items():
        _library.define(_name + _schema)
_ops = torch.ops.reality_stone
_linear = _ops.linear.default


def compiled() -> bool:
    """Whether the C++ library is loaded."""
    return _C is not None


def register_reference(kernels: dict[str, Callable]) -> None:
    """Give the plain-torch kernels to every op on every device that has no compiled one."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name, kernel in kernels.items():
        for key in ("CPU", "CUDA"):
            if not has_kernel(f"reality_stone::{name}", key):
                _library.impl(name, kernel, key)
    if not compiled():
        warnings.warn(
            "reality_stone: the compiled library is not there, using the slow plain-torch "
            f"reference ({MISSING}); `reality-stone doctor` says more",
            stacklevel=3,
        )


# --- wrappers -------------------------------------------------------------------------------------


def encode(
    weight: Tensor, importance: Tensor | None, params: Sequence[Tensor], codec: str
) -> tuple[Tensor, list[Tensor]]:
    """Codes of `weight` (out, in) float32, and `params` with those fitted per tile replaced.

    `importance` (in,) weighs the squared error per column. On a GPU trellis, uniform, vq_cyclic and
    palette without groups are encoded there, to the CPU's codes and params bit for bit; other
    codecs are copied to the CPU's search and back. Either way the host waits for the device.
    ValueError where the weight is not finite, naming its first position.
    """
    device = _searching_on.get()
    if weight.device.type != "cpu" or device is None:
        return _ops.encode(weight, importance, list(params), codec)
    columns = None if importance is None else importance.to(device)
    codes, fitted = _ops.encode(weight.to(device), columns, [p.to(device) for p in params], codec)
    return codes.cpu(), [p.cpu() for p in fitted]


_searching_on: ContextVar[torch.device | None] = ContextVar("searching_on", default=None)


@contextlib.contextmanager
def searching_on(device: torch.device) -> Iterator[None]:
    """Within, `encode` takes tensors of the CPU to this GPU and its results back; on any other
    device, and where the library has no CUDA kernels, nothing changes."""
    gpu = device.type == "cuda" and compiled() and bool(build_info().get("cuda"))
    token = _searching_on.set(device if gpu else _searching_on.get())
    try:
        yield
    finally:
        _searching_on.reset(token)


def decode(codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]) -> Tensor:
    """The float32 weight (out, in); the same bits on every device and instruction set."""
    return _ops.decode(codes, list(params), codec, list(shape))


def linear(
    x: Tensor, codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]
) -> Tensor:
    """x (..., in) @ decode(...).T in x's dtype, without building the weight."""
    params, shape = list(params), list(shape)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _ops.linear(x, codes, params, codec, shape)
    # The Python around a derivative runs even where none is wanted, for as long as a small product.
    with torch._C._AutoDispatchBelowAutograd():
        return _linear(x, codes, params, codec, shape)


def linear_grad_input(
    grad: Tensor, codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]
) -> Tensor:
    """grad (..., out) @ decode(...) in grad's dtype."""
    return _ops.linear_grad_input(grad, codes, list(params), codec, list(shape))


def linear_grad_params(
    grad: Tensor,
    x: Tensor,
    codes: Tensor,
    params: Sequence[Tensor],
    codec: str,
    shape: Sequence[int],
) -> list[Tensor]:
    """Gradient of each param for dLoss/dy = grad; an empty tensor for params that are codes."""
    return _ops.linear_grad_params(grad, x, codes, list(params), codec, list(shape))


def decode_grad_params(
    grad: Tensor, codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]
) -> list[Tensor]:
    """Gradient of each param for dLoss/dW = grad (out, in) float32: the adjoint of decode."""
    return _ops.decode_grad_params(grad, codes, list(params), codec, list(shape))


def check_codes(codes: Tensor, params: Sequence[Tensor], codec: str, shape: Sequence[int]) -> None:
    """Raise ValueError unless every tile is a code the encoder could have written."""
    _ops.check_codes(codes, list(params), codec, list(shape))


def hadamard(x: Tensor, block: int) -> Tensor:
    """Orthonormal Walsh-Hadamard transform of each run of `block` values of the last dimension."""
    return _ops.hadamard(x, block)


def trellis_encode(
    targets: Tensor, radius: Tensor, angle: Tensor, bits: float, search: str = "exact"
) -> Tensor:
    """Ring codes (tiles, 32 * bits) of the best tail-biting path for each row of (tiles, 256).

    The same codes on every device, for both searches and angles (16,) within a turn.
    """
    return _ops.trellis_encode(targets, radius, angle, float(bits), search)


def bit_derivative(codes: Tensor, order: int, layout: str) -> Tensor:
    """int16 derivatives of int32 codes of any shape; layouts in csrc/derivative.h."""
    return _ops.bit_derivative(codes, order, layout)


def qat_linear(
    x: Tensor, weight: Tensor, centers: Tensor, tau: float, mode: str, scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x (..., in) times the quantized weight (out, in), in x's dtype, and the quantization loss.

    weight, centers (levels,) and scale, (1,) or (out,), are float32; for tau, the modes ("ste",
    "attenuated", "codebook", "gumbel") and all derivatives see quantizers/formulas.py. The
    quantized weight is never whole in memory. ValueError on arguments that are not so and, on the
    CPU, on weights that are not finite; on a GPU those make the loss NaN.
    """
    return _ops.qat_linear(x, weight, centers, float(tau), mode, scale)


def qat_linear_backward(
    grad: Tensor,
    grad_loss: Tensor,
    x: Tensor,
    weight: Tensor,
    centers: Tensor,
    tau: float,
    mode: str,
    scale: Tensor | None,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, centers and scale from those of both results; empty if not wanted."""
    return _ops.qat_linear_backward(
        grad, grad_loss, x, weight, centers, float(tau), mode, scale, list(wanted)
    )


# --- shape rules ----------------------------------------------------------------------------------


@torch.library.register_fake("reality_stone::decode", lib=_library)
def _(codes, params, codec, shape):
    return codes.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("reality_stone::linear", lib=_library)
def _(x, codes, params, codec, shape):
    return x.new_empty((*x.shape[:-1], shape[0]))


@torch.library.register_fake("reality_stone::linear_grad_input", lib=_library)
def _(grad, codes, params, codec, shape):
    return grad.new_empty((*grad.shape[:-1], shape[1]))


@torch.library.register_fake("reality_stone::linear_grad_params", lib=_library)
def _(grad, x, codes, params, codec, shape):
    return _param_gradients(params)


def _param_gradients(params):
    return [
        torch.empty_like(p, memory_format=torch.contiguous_format)
        if p.is_floating_point()
        else p.new_empty(0, dtype=torch.float32)
        for p in params
    ]


@torch.library.register_fake("reality_stone::decode_grad_params", lib=_library)
def _(grad, codes, params, codec, shape):
    return _param_gradients(params)


@torch.library.register_fake("reality_stone::check_codes", lib=_library)
def _(codes, params, codec, shape):
    return None


@torch.library.register_fake("reality_stone::hadamard", lib=_library)
def _(x, block):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("reality_stone::trellis_encode", lib=_library)
def _(targets, radius, angle, bits, search):
    return targets.new_empty((targets.shape[0], int(32 * bits)), dtype=torch.uint8)


@torch.library.register_fake("reality_stone::bit_derivative", lib=_library)
def _(codes, order, layout):
    return codes.new_empty(codes.shape, dtype=torch.int16)


@torch.library.register_fake("reality_stone::qat_linear", lib=_library)
def _(x, weight, centers, tau, mode, scale=None):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), weight.new_empty(())


@torch.library.register_fake("reality_stone::qat_linear_backward", lib=_library)
def _(grad, grad_loss, x, weight, centers, tau, mode, scale, wanted):
    scale = weight.new_empty(1) if scale is None else scale
    return tuple(
        t.new_empty(t.shape) if want else weight.new_empty(0)
        for t, want in zip((x, weight, centers, scale), wanted, strict=True)
    )


@torch.library.register_fake("reality_stone::encode", lib=_library)
def _(weight, importance, params, codec):
    tile = _parse_codec(codec).tile((weight.shape[0], weight.shape[1]))
    grid = tile.grid((weight.shape[0], weight.shape[1]))
    codes = weight.new_empty((*grid, tile.bytes), dtype=torch.uint8)
    return codes, [torch.empty_like(p) for p in params]


_parse_codec: Callable[[str], Any]


def set_codec_parser(parse: Callable[[str], Any]) -> None:
    """How the fake kernel of `encode` learns a codec's tile: codecs are above this room."""
    global _parse_codec
    _parse_codec = parse


# --- derivatives ----------------------------------------------------------------------------------


def _linear_setup(ctx, inputs, output):
    x, codes, params, ctx.codec, ctx.shape = inputs
    ctx.save_for_backward(x, codes, *params)


def _linear_backward(ctx, grad):
    x, codes, *params = ctx.saved_tensors
    dx = dparams = None
    if ctx.needs_input_grad[0]:
        dx = linear_grad_input(grad, codes, params, ctx.codec, ctx.shape)
    if any(_wanted(ctx, 2, params)):
        dparams = linear_grad_params(grad, x, codes, params, ctx.codec, ctx.shape)
        dparams = [
            g if wanted else None
            for g, wanted in zip(dparams, _wanted(ctx, 2, params), strict=True)
        ]
    return dx, None, dparams if dparams is not None else [None] * len(params), None, None


def _wanted(ctx, position, params) -> list[bool]:
    """Which params of the list argument need a gradient."""
    needs = ctx.needs_input_grad[position]
    needs = list(needs) if isinstance(needs, (list, tuple)) else [bool(needs)] * len(params)
    return [n and p.is_floating_point() for n, p in zip(needs, params, strict=True)]


torch.library.register_autograd(
    "reality_stone::linear", _linear_backward, setup_context=_linear_setup, lib=_library
)


def _decode_setup(ctx, inputs, output):
    codes, params, ctx.codec, ctx.shape = inputs
    ctx.save_for_backward(codes, *params)


def _decode_backward(ctx, grad):
    codes, *params = ctx.saved_tensors
    dparams = decode_grad_params(grad.float(), codes, params, ctx.codec, ctx.shape)
    wanted = _wanted(ctx, 1, params)
    return None, [g if w else None for g, w in zip(dparams, wanted, strict=True)], None, None


torch.library.register_autograd(
    "reality_stone::decode", _decode_backward, setup_context=_decode_setup, lib=_library
)
torch.library.register_autograd(
    "reality_stone::hadamard",
    lambda ctx, grad: (hadamard(grad, ctx.block), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "block", inputs[1]),
    lib=_library,
)


def _qat_setup(ctx, inputs, output):
    x, weight, centers, ctx.tau, ctx.mode, scale = inputs
    ctx.save_for_backward(x, weight, centers, *([] if scale is None else [scale]))


def _qat_backward(ctx, grad, grad_loss):
    x, weight, centers, *rest = ctx.saved_tensors
    scale = rest[0] if rest else None
    needs = ctx.needs_input_grad
    wanted = [needs[0], needs[1], needs[2], scale is not None and needs[5]]
    found = qat_linear_backward(
        grad, grad_loss, x, weight, centers, ctx.tau, ctx.mode, scale, wanted
    )
    dx, dweight, dcenters, dscale = (
        g if want else None for g, want in zip(found, wanted, strict=True)
    )
    return dx, dweight, dcenters, None, None, dscale


torch.library.register_autograd(
    "reality_stone::qat_linear", _qat_backward, setup_context=_qat_setup, lib=_library
)


# --- the library ----------------------------------------------------------------------------------


def build_info() -> dict:
    """Compiler, torch and CUDA the library was built with, and its codecs; empty without it."""
    return _C.build_info() if compiled() else {}


def isa() -> str:
    """Instruction set in use: avx512, avx2, generic, or reference without the library."""
    return _C.isa() if compiled() else "reference"


def best_isa() -> str:
    """The highest instruction set this processor has for the kernels."""
    return _C.best_isa() if compiled() else "reference"


def fast_bfloat16(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 on this device in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def huge_pages(tensor: Tensor) -> Tensor:
    """Ask for 2 MB pages under a large CPU tensor, in place: products stream it faster."""
    if compiled() and tensor.device.type == "cpu" and tensor.nbytes >= 2 << 20:
        _C.huge_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def describe(codec: str, shape: Sequence[int]) -> list[dict]:
    """Tile, params and kernels of each term of a codec in the compiled library."""
    return _C.describe(codec, *shape) if compiled() else []


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run with a lower instruction set ("generic", "avx2", "avx512"); for tests and timing."""
    if not compiled():
        raise RuntimeError(
            "the compiled library is not there, so there is no instruction set to choose"
        )
    before = _C.isa()
    _C.set_isa(name)
    try:
        yield
    finally:
        _C.set_isa(before)


@contextlib.contextmanager
def accuracy(mode: str) -> Iterator[None]:
    """Compute type of `linear` and its gradients. Process-wide; the compiled library only.

    "auto"   bf16 and 16-bit integers where fast; relative error of a product at most 3e-3
    "exact"  float32
    "int8"   as "auto", but the product of `uniform` on AVX-512, in groups of a multiple of 32,
             with two or more rows rounds x to 8 bits with a scale for each row and 64 columns
             (32 where a group is no multiple of 64): each x is off by at most 1/254 of the
             largest of its 64. That is a relative error of 6e-3 of a product with Gaussian x,
             and more the further the largest are from the rest. Gradients are those of "auto".
    """
    if mode not in ACCURACIES:
        raise ValueError(f"accuracy must be 'auto', 'exact' or 'int8', got {mode!r}")
    before = _C.accuracy() if compiled() else mode
    if compiled():
        _C.set_accuracy(mode)
    try:
        yield
    finally:
        if compiled():
            _C.set_accuracy(before)


@contextlib.contextmanager
def progress(callback: Callable[[int, int], None]) -> Iterator[None]:
    """Call `callback(tiles_done, tiles_in_all)` from inside long encodes."""
    if compiled():
        _C.set_progress(callback)
    try:
        yield
    finally:
        if compiled():
            _C.set_progress(None)

"""Gradients of a loss by the fields of the codes, beside those by the params that autograd gives.

They are of codes read as if their amounts were continuous, from the codecs' derivative tables; a
bit of an index has no such reading, and its "gradient" is the first-order change of the loss when
the bit is turned over. Which fields a codec has derivatives for is said by `Codec.slopes` in its
file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec
from ..codecs import codec as make_codec
from ..codecs.slopes import Slopes
from ..packed import Packed

BLOCK_WEIGHTS = 1 << 18  # of the dense gradient at a time, all temporaries within 64 MB
CONVERTED = 1 << 21  # activations turned to float32 at a time

Params = Sequence[Tensor] | Mapping[str, Tensor]


def field_gradient(
    grad_weight: Tensor, codes: Tensor, params: Params, codec: str | Codec, shape: tuple[int, int]
) -> dict[str, Tensor]:
    """dLoss/dfield (out, codes of a row) of every code for dLoss/dW = grad_weight (out, in).

    phase: per radian. radius: by the function's argument (its sign included). amplitude: per step
    of the field. index (out, codes of a row, bits): s * (basis[idx ^ 2^k] - basis[idx]) for bit k,
    which is exact for a loss that is linear in W. Computed in float32, or in grad_weight's float64.
    ValueError for codecs whose codes have no such fields, and for a gradient of another shape.
    """
    packed = _packed(codes, params, codec, shape)
    if tuple(grad_weight.shape) != packed.shape:
        raise ValueError(
            f"{packed.codec.name}: grad_weight must have shape {list(packed.shape)}, "
            f"got {list(grad_weight.shape)}"
        )
    return _add({}, packed, lambda first, last: grad_weight[first:last], grad_weight)


def field_gradient_from(
    grad_y: Tensor,
    x: Tensor,
    codes: Tensor,
    params: Params,
    codec: str | Codec,
    shape: tuple[int, int],
    into: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """`field_gradient` of grad_y.T @ x for grad_y (..., out) = dLoss/dy and inputs x (..., in) of
    y = x @ W.T, by blocks of rows: never the dense gradient, and below 64 MB beside the result.

    into: what earlier calls returned, to add to in place. Sums are in a fixed order.
    """
    packed = _packed(codes, params, codec, shape)
    out, n = packed.shape
    if grad_y.shape[-1:] != (out,) or x.shape != (*grad_y.shape[:-1], n):
        raise ValueError(
            f"{packed.codec.name}: grad_y must be (..., {out}) and x (..., {n}) for the same "
            f"batch, got {list(grad_y.shape)} and {list(x.shape)}"
        )
    grad_y, x = grad_y.reshape(-1, out), x.reshape(-1, n)
    dtype = _dtype(grad_y)

    def rows(first: int, last: int) -> Tensor:
        block = torch.zeros(last - first, n, dtype=dtype, device=x.device)
        step = len(x) if x.dtype == grad_y.dtype == dtype else max(1, CONVERTED // max(1, n))
        pairs = zip(grad_y.split(max(1, step)), x.split(max(1, step)), strict=True)
        for g, part in pairs:
            block.addmm_(g[:, first:last].to(dtype).t(), part.to(dtype))
        return block

    return _add({} if into is None else into, packed, rows, grad_y)


class FieldGradients:
    """Accumulates the field gradients of one layer's codes in every backward through it.

    The layer is an `nn.RBELinear` (or anything with `packed` and `observer`). As a context manager,
    or by attach and detach; ValueError where the layer has an observer already, or its codec's
    codes have no fields with derivatives. `gradients`: as of `field_gradient`, empty before the
    first backward; `clear` empties it.

    >>> from reality_stone.nn import RBELinear
    >>> layer = RBELinear(64, 32, codec="bitfield")
    >>> with FieldGradients(layer) as fields:
    ...     layer(torch.ones(4, 64)).square().sum().backward()
    >>> {name: tuple(g.shape) for name, g in fields.gradients.items()}
    {'radius': (32, 8), 'amplitude': (32, 8), 'index': (32, 8, 8)}
    """

    def __init__(self, layer: Any):
        self.layer = layer
        self.gradients: dict[str, Tensor] = {}
        _slopes(_rows(layer.packed, 0, 0, torch.float32))

    def attach(self) -> FieldGradients:
        if self.layer.observer is not None:
            raise ValueError("the layer has an observer already; detach that first")
        self.layer.observer = self._see
        return self

    def detach(self) -> None:
        if self.layer.observer == self._see:
            self.layer.observer = None

    def clear(self) -> None:
        self.gradients = {}

    def __enter__(self) -> FieldGradients:
        return self.attach()

    def __exit__(self, *error) -> None:
        self.detach()

    @torch.no_grad()
    def _see(self, x: Tensor, grad: Tensor) -> None:
        p = self.layer.packed
        field_gradient_from(grad, x, p.codes, p.params, p.codec, p.shape, into=self.gradients)


def _dtype(grad: Tensor) -> torch.dtype:
    return torch.float64 if grad.dtype == torch.float64 else torch.float32


def _packed(codes: Tensor, params: Params, codec: str | Codec, shape: Sequence[int]) -> Packed:
    codec, shape = make_codec(codec), (shape[0], shape[1])
    if not isinstance(params, Mapping):
        specs = codec.params(shape)
        if len(specs) != len(params):
            raise ValueError(f"{codec.name}: expected {len(specs)} params, got {len(params)}")
        params = {spec.name: p for spec, p in zip(specs, params, strict=True)}
    return Packed(codec, shape, codes, {name: p.detach() for name, p in params.items()})


def _rows(packed: Packed, first: int, last: int, dtype: torch.dtype) -> Packed:
    """Rows first to last of a layer whose tiles are of one row, params in `dtype`."""
    params = {}
    for spec in packed.codec.params(packed.shape):
        p = packed.params[spec.name]
        p = p[first:last] if spec.axis in ("out", "both") else p
        params[spec.name] = p if spec.codes else p.to(dtype)
    return Packed(packed.codec, (last - first, packed.shape[1]), packed.codes[first:last], params)


def _slopes(packed: Packed) -> Slopes:
    slopes = packed.codec.slopes(packed.codes, packed.params, packed.shape)
    if slopes is None:
        raise ValueError(f"{packed.codec.name}: its codes have no fields with derivatives")
    return slopes


def _fields(grad: Tensor, packed: Packed) -> dict[str, Tensor]:
    """Field gradients of a few rows for their dLoss/dW (out, in)."""
    slopes = _slopes(packed)
    for name, axis in (("out_scale", (slice(None), None)), ("in_scale", (slice(None),))):
        if name in packed.params:
            grad = grad * packed.params[name][axis]
    out, across = slopes.factor.shape
    width = 1 if slopes.vectors is None else slopes.vectors.shape[1]
    grad = torch.nn.functional.pad(grad, (0, across * width - grad.shape[1]))
    grad = grad.view(out, across, width)

    def along(index: Tensor | None) -> Tensor:
        return grad[..., 0] if index is None else (grad * slopes.vectors[index]).sum(-1)

    own = along(slopes.index)
    found = {name: slope * own for name, slope in slopes.by.items()}
    if slopes.bits:
        turned = (along(slopes.index ^ 1 << k) for k in range(slopes.bits))
        found["index"] = torch.stack([slopes.factor * (other - own) for other in turned], -1)
    return found


@torch.no_grad()
def _add(
    totals: dict[str, Tensor],
    packed: Packed,
    gradient: Callable[[int, int], Tensor],
    like: Tensor,
) -> dict[str, Tensor]:
    """Adds the field gradients for the dLoss/dW of which gradient(first, last) gives these rows."""
    dtype, (out, n) = _dtype(like), packed.shape
    step = max(1, BLOCK_WEIGHTS // max(1, n))
    for first in range(0, max(1, out), step):  # once for an empty layer, too
        last = min(out, first + step)
        part = _rows(packed, first, last, dtype)
        for name, value in _fields(gradient(first, last).to(dtype), part).items():
            if name not in totals:
                totals[name] = value.new_zeros((out, *value.shape[1:]))
            totals[name][first:last] += value
    return totals

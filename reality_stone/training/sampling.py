"""A few rows of a compressed layer, decoded without the others; what their codes make use of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import ops
from ..codecs import Codec
from ..codecs.base import hadamard_block
from ..fitting import evenly
from ..nn import RBELinear
from ..packed import Packed


class RowSample:
    """About `rows` evenly spaced rows of a layer, the same whatever its codec becomes.

    They are runs on which a rotation over rows closes, an odd number of them, so that the rotation
    has the same size on them alone. Where a codec's tiles do not end with the runs, the whole layer
    is decoded.
    """

    def __init__(self, layer: RBELinear, rows: int):
        self.layer, out = layer, layer.shape[0]
        self.unit = hadamard_block(out)
        count = max(1, rows // self.unit)
        starts = evenly(out // self.unit, count - 1 + count % 2) * self.unit
        self.index = (starts[:, None] + torch.arange(self.unit)).flatten()
        self._codec: Codec | None = None
        self._cut = False  # whether that codec's rows can be cut out

    def of(self, weight: Tensor) -> Tensor:
        """These rows of a dense weight, float32."""
        return weight[self.index.to(weight.device)].float()

    def decode(self) -> Tensor:
        """These rows of the layer's weight, an adapter added, float32."""
        layer, packed = self.layer, self.packed()
        rows = packed.decode()
        if packed.shape == layer.shape:
            rows = self.of(rows)
        if layer.adapter is not None:
            a, b = layer.adapter.a.detach().float(), self.of(layer.adapter.b.detach())
            rows = rows + b @ a * layer.adapter.scale
        return rows

    def packed(self) -> Packed:
        """These rows in codes, or all where they cannot be cut out."""
        whole = self.layer.packed
        if len(self.index) == whole.shape[0]:
            return whole
        if whole.codec != self._codec:
            self._codec, self._cut = whole.codec, True
            try:
                self._cut = torch.equal(self._slice(whole).decode(), self.of(whole.decode()))
            except (ValueError, RuntimeError):
                self._cut = False
        return self._slice(whole) if self._cut else whole

    def _slice(self, whole: Packed) -> Packed:
        shape = (len(self.index), whole.shape[1])
        params = {}
        for spec in whole.codec.params(shape):
            value = whole.params[spec.name]
            along = spec.axis in ("out", "both")
            params[spec.name] = self._take(value, spec.sizes[0]) if along else value
        codes = self._take(whole.codes, whole.codec.tile(shape).grid(shape)[0])
        return Packed(whole.codec, shape, codes, params)

    def _take(self, value: Tensor, count: int) -> Tensor:
        """The `count` entries along the first dimension that belong to these rows."""
        each = math.ceil(len(self.index) / count)  # rows of an entry
        if count * each != len(self.index) or self.unit % each:
            raise ValueError("the codec's tiles do not end with the runs")
        return value[(self.index[::each] // each).to(value.device)]


def entropy(codes: Tensor) -> float:
    """Bits of information in a byte of `codes` (uint8): 8 where every byte is equally frequent."""
    count = torch.bincount(codes.flatten().int(), minlength=256).double()
    share = count[count > 0] / max(1, codes.numel())
    return -(share * share.log2()).sum().item() + 0.0


def used(packed: Packed) -> dict[str, float]:
    """{shared table: share of its entries that some weight depends on}; no single numbers."""
    specs = packed.codec.params(packed.shape)
    tables = [p.name for p in specs if p.axis == "shared" and not p.codes and p.sizes != (1,)]
    if not tables or not packed.codes.numel():
        return {}
    # An entry that no weight uses has a gradient of zero, whatever the gradient of the weights.
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(packed.shape, generator=generator).to(packed.codes.device) + 0.5
    found = ops.decode_grad_params(
        grad, packed.codes, list(packed.params.values()), packed.codec.spec, packed.shape
    )
    grads = dict(zip(packed.params, found, strict=True))
    return {name: (grads[name] != 0).double().mean().item() for name in tables}

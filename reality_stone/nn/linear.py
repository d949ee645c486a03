"""RBELinear: nn.Linear with the weight as codes and a few small trainable tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..codecs import Codec
from ..codecs import codec as make_codec
from ..packed import Packed, storage_bits
from .observe import Observe


class RBELinear(nn.Module):
    """y = x @ decode(codes, params).T + bias for x of shape (..., in_features).

    `codes` is a uint8 buffer; each of the codec's params is an nn.Parameter named as in the codec
    (`out_scale`, ...), trained while the codes stay. Built from scratch, the weight starts as
    nn.Linear's would and is encoded once; `from_linear` and `from_packed` take given weights.

    >>> layer = RBELinear.from_linear(nn.Linear(64, 32), "uniform(bits=4, group=32)")
    >>> layer(torch.zeros(2, 3, 64)).shape
    torch.Size([2, 3, 32])
    """

    in_features: int
    out_features: int
    # Called in every backward with (x, dLoss/dy) as matrices; see nn/observe.py.
    observer: Callable[[Tensor, Tensor], None] | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        codec: str | Codec = "trellis",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__()
        self.codec = make_codec(codec, **settings)
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        tile = self.codec.tile(self.shape)
        size = (*tile.grid(self.shape), tile.bytes)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=device))
        self._names = []
        for spec in self.codec.params(self.shape):
            self._names.append(spec.name)
            if spec.codes:
                empty = torch.empty(spec.sizes, dtype=torch.uint8, device=device)
                self.register_buffer(spec.name, empty)
            else:
                self.register_parameter(
                    spec.name, nn.Parameter(torch.empty(spec.sizes, device=device))
                )
        if self.codes.device.type != "meta":
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Encode a fresh weight with nn.Linear's law, uniform in +-1/sqrt(in_features)."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        weight = torch.empty(self.out_features, self.in_features).uniform_(-bound, bound)
        self.set_packed(self.codec.encode(weight))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_packed(cls, packed: Packed, bias: Tensor | None = None) -> RBELinear:
        """A layer of given codes, on their device."""
        out, n = packed.shape
        layer = cls(n, out, bias is not None, packed.codec, device="meta")
        layer = layer.to_empty(device=packed.codes.device)
        layer.set_packed(packed)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach().clone())
        return layer

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        codec: str | Codec = "trellis",
        hessian: Tensor | None = None,
        *,
        seed: int = 0,
        label: str = "",
        given: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> RBELinear:
        """Compress a dense layer; `hessian` (in, in) is E[x x^T] of its input, `given` holds shared
        params that are used as they are."""
        packed = make_codec(codec, **settings).encode(
            linear.weight, hessian, seed=seed, label=label, given=given
        )
        layer = cls.from_packed(packed.to(linear.weight.device), linear.bias)
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer with the decoded weight."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        dense.weight = nn.Parameter(self.weight.to(dtype or torch.float32))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype or self.bias.dtype).clone())
        return dense.train(self.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features), the logical shape of the weight."""
        return self.out_features, self.in_features

    @property
    def params(self) -> list[Tensor]:
        """The codec's params in its order."""
        return [getattr(self, name) for name in self._names]

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32, detached: for reading."""
        with torch.no_grad():
            return ops.decode(self.codes, self._float_params(), self.codec.spec, self.shape)

    @property
    def packed(self) -> Packed:
        """Codes and params as they are now, sharing memory with the layer."""
        params = dict(zip(self._names, (p.detach() for p in self._float_params()), strict=True))
        return Packed(self.codec, self.shape, self.codes, params)

    def set_packed(self, packed: Packed) -> None:
        """Replace codes and params by those of the same codec and shape."""
        if packed.codec != self.codec or tuple(packed.shape) != self.shape:
            raise ValueError(
                f"expected {self.codec.spec} of shape {self.shape}, "
                f"got {packed.codec.spec} of shape {tuple(packed.shape)}"
            )
        with torch.no_grad():
            ops.huge_pages(self.codes.copy_(packed.codes))
            for name, value in packed.params.items():
                ops.huge_pages(getattr(self, name).copy_(value))

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes and params (not the bias) over the number of weights."""
        stored = storage_bits(self.codes) + sum(storage_bits(p.detach()) for p in self.params)
        return stored / max(1, self.in_features * self.out_features)

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        y = ops.linear(x, self.codes, self._float_params(), self.codec.spec, self.shape)
        if self.observer is not None and torch.is_grad_enabled():
            if not y.requires_grad:  # neither x nor the params need a gradient: the codes do
                y.requires_grad_()
            y = Observe.apply(y, x, self.observer)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def _float_params(self) -> list[Tensor]:
        # .half() and .bfloat16() narrow params; the kernels read float32.
        return [p.float() if p.is_floating_point() else p for p in self.params]

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        text += f"bias={self.bias is not None}, codec={self.codec.spec}"
        if self.codes.device.type == "meta":
            return text
        return text + f", {self.bits_per_weight:.3f} bits/weight"

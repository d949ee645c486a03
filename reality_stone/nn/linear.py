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
from .adapter import Adapter, attach
from .observe import Observe


class RBELinear(nn.Module):
    """y = x @ decode(codes, params).T + bias for x of shape (..., in_features).

    `codes` is a uint8 buffer; each of the codec's params is an nn.Parameter named as in the codec
    (`out_scale`, ...), trained while the codes stay. Built from scratch, the weight starts as
    nn.Linear's would and is encoded once; `from_linear` and `from_packed` take given weights.
    With `lora_rank` the params and the bias are frozen and `adapter` is trained; see nn/lora.py.

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
        lora_rank: int = 0,
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
            kind = torch.uint8 if spec.codes else torch.float32
            self._own(spec.name, torch.empty(spec.sizes, dtype=kind, device=device))
        self.register_module("adapter", None)
        if lora_rank:
            attach(self, Adapter(in_features, out_features, lora_rank, device=device, dtype=dtype))
        if self.codes.device.type != "meta":
            self.reset_parameters()

    def _own(self, name: str, value: Tensor) -> None:
        """Register one of the codec's params, a buffer where it is codes."""
        self._names.append(name)
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def reset_parameters(self) -> None:
        """Encode a fresh weight with nn.Linear's law, uniform in +-1/sqrt(in_features); an adapter
        starts anew."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        weight = torch.empty(self.out_features, self.in_features).uniform_(-bound, bound)
        self.set_packed(self.codec.encode(weight))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.adapter is not None:
            self.adapter.reset_parameters()

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
        lora_rank: int = 0,
        **settings: Any,
    ) -> RBELinear:
        """Compress a dense layer; `hessian` (in, in) is E[x x^T] of its input, `given` holds shared
        params that are used as they are, `lora_rank` adds an adapter."""
        packed = make_codec(codec, **settings).encode(
            linear.weight, hessian, seed=seed, label=label, given=given
        )
        layer = cls.from_packed(packed.to(linear.weight.device), linear.bias)
        if lora_rank:
            device = linear.weight.device
            attach(layer, Adapter(layer.in_features, layer.out_features, lora_rank, device=device))
        return layer.train(linear.training)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer with the decoded weight, an adapter added to it."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight if self.adapter is None else self.weight + self.adapter.weight
        dense.weight = nn.Parameter(weight.to(dtype or torch.float32))
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
        """The decoded weight, float32, detached, without the adapter: for reading."""
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

    def recode(self, packed: Packed) -> None:
        """Take the codes and params of another codec.

        A param whose name and sizes both codecs have keeps its Parameter and takes the new values;
        others are new objects, which an optimiser must be given (`training.renew`). Params
        that codecs share between layers become this layer's own. New ones train if old ones did.
        """
        if tuple(packed.shape) != self.shape:
            raise ValueError(f"expected a weight of {self.shape}, got {tuple(packed.shape)}")
        old, device = {name: getattr(self, name) for name in self._names}, self.codes.device
        trains = any(p.requires_grad for p in old.values())
        dtype = next((p.dtype for p in old.values() if p.is_floating_point()), torch.float32)
        common = {*self.codec.common, *packed.codec.common}
        for name in self._names:
            delattr(self, name)
        self.codec, self._names = packed.codec, []
        self.codes = ops.huge_pages(packed.codes.to(device, copy=True))
        for name, value in packed.params.items():
            kind = dtype if value.is_floating_point() else value.dtype
            self._own(name, value.detach().to(device, kind, copy=True))
            mine, new = old.get(name), getattr(self, name)
            if not isinstance(new, nn.Parameter):
                continue
            new.requires_grad_(trains)
            if isinstance(mine, nn.Parameter) and mine.shape == new.shape and name not in common:
                with torch.no_grad():
                    setattr(self, name, mine.copy_(new))
        if self.adapter is not None and set(old) & set(self.adapter.froze):
            self.adapter.froze += tuple(self._names)  # for the day it is taken off

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes and params (not the bias nor an adapter) over the number of
        weights."""
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
        if self.adapter is not None:
            y = y + self.adapter(x)
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

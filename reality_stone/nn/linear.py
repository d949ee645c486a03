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
from ..packed import Packed
from .adapter import Adapter, attach
from .compressed import Compressed
from .observe import Observe


class RBELinear(Compressed):
    """y = x @ decode(codes, params).T + bias for x of shape (..., in_features).

    `codes` is a uint8 buffer; each of the codec's params is an nn.Parameter named as in the codec
    (`out_scale`, ...), trained while the codes stay. Built from scratch, the weight starts as
    nn.Linear's would and is encoded once; `from_linear` and `from_packed` take given weights.
    With `lora_rank` the params and the bias are frozen and `adapter` is trained; see nn/lora.py.

    >>> layer = RBELinear.from_linear(nn.Linear(64, 32), "uniform(bits=4, group=32)")
    >>> layer(torch.zeros(2, 3, 64)).shape
    torch.Size([2, 3, 32])
    """

    kind, dense_name = "linear", "nn.Linear"
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
        super().__init__(make_codec(codec, **settings), (out_features, in_features), device)
        self.in_features, self.out_features = in_features, out_features
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.register_module("adapter", None)
        if lora_rank:
            attach(self, Adapter(in_features, out_features, lora_rank, device=device, dtype=dtype))
        if self.codes.device.type != "meta":
            self.reset_parameters()

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
        layer = cls.from_dense(
            linear, make_codec(codec, **settings), hessian, seed=seed, label=label, given=given
        )
        if lora_rank:
            device = linear.weight.device
            attach(layer, Adapter(layer.in_features, layer.out_features, lora_rank, device=device))
        return layer

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    @classmethod
    def blank(cls, module: nn.Module, codec: Codec) -> RBELinear:
        out, n = module.shape if isinstance(module, Compressed) else cls.dense_weight(module).shape
        dtype = None if module.bias is None else module.bias.dtype
        return cls(n, out, module.bias is not None, codec, device="meta", dtype=dtype)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        return self.to_linear(dtype)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """The dense layer with the decoded weight, an adapter added to it."""
        dense = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        weight = self.weight if self.adapter is None else self.weight + self.adapter.weight
        dense.weight = nn.Parameter(weight.to(dtype or torch.float32))
        if self.bias is not None:
            dense.bias = nn.Parameter(self.bias.detach().to(dtype or self.bias.dtype).clone())
        return dense.train(self.training)

    def recode(self, packed: Packed) -> None:
        old = set(self._names)
        super().recode(packed)
        if self.adapter is not None and old & set(self.adapter.froze):
            self.adapter.froze += tuple(self._names)  # for the day it is taken off

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

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, "
        return text + f"bias={self.bias is not None}, {self._rate()}"

"""RBEFFN: the feed-forward block of a transformer, its products compressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..codecs import Codec
from ..codecs import codec as make_codec
from .linear import RBELinear

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "relu": functional.relu,
}


class RBEFFN(nn.Module):
    """down(act(up(x))) of x (..., dim), or with `gated` down(act(gate(x)) * up(x)).

    activation: gelu, gelu_tanh, silu or relu. `up` is one RBELinear (dim -> hidden); gated it holds
    the rows of the gate and then those of up, one product for both. ValueError on another
    activation.

    >>> RBEFFN(64, 256, "silu", gated=True)(torch.zeros(2, 3, 64)).shape
    torch.Size([2, 3, 64])
    """

    def __init__(
        self,
        dim: int,
        hidden: int,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = True,
        codec: str | Codec = "trellis",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **settings: Any,
    ):
        super().__init__()
        _check(activation)
        self.dim, self.hidden, self.activation, self.gated = dim, hidden, activation, gated
        made = make_codec(codec, **settings)
        self.up = RBELinear(dim, hidden * (1 + gated), bias, made, device, dtype)
        self.down = RBELinear(hidden, dim, bias, made, device, dtype)

    @classmethod
    def from_linears(
        cls,
        up: nn.Linear,
        down: nn.Linear,
        gate: nn.Linear | None = None,
        activation: str = "gelu",
        codec: str | Codec = "trellis",
        **settings: Any,
    ) -> RBEFFN:
        """Compress dense layers; gated if a gate is given. ValueError where they do not fit."""
        _check(activation)
        layers = [up] if gate is None else [gate, up]
        hidden, dim = up.weight.shape
        if tuple(down.weight.shape) != (dim, hidden):
            raise ValueError(
                f"down must be {hidden} -> {dim}, got {down.in_features} -> {down.out_features}"
            )
        made = make_codec(codec, **settings)
        ffn = cls(dim, hidden, activation, gate is not None, True, made, device="meta")
        ffn.up = RBELinear.from_linear(fused(layers), made)
        ffn.down = RBELinear.from_linear(down, made)
        return ffn.train(up.training)

    def forward(self, x: Tensor) -> Tensor:
        act, y = ACTIVATIONS[self.activation], self.up(x)
        if self.gated:
            gate, y = y.split(self.hidden, -1)
            return self.down(act(gate) * y)
        return self.down(act(y))

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.hidden}, activation={self.activation}, gated={self.gated}"


def fused(layers: Sequence[nn.Linear]) -> nn.Linear:
    """Dense layers of one input as one, its outputs one after the other, for a moment: gradients
    do not reach them. ValueError where some differ in inputs or only some have a bias."""
    for layer in layers:
        if not isinstance(layer, nn.Linear):
            raise TypeError(f"the layers must be nn.Linear, got {type(layer).__name__}")
    first, biased = layers[0], [layer.bias is not None for layer in layers]
    if len({layer.in_features for layer in layers}) > 1 or len(set(biased)) > 1:
        raise ValueError(f"layers fuse with one width of input, all or none with bias: {layers}")
    out = sum(layer.out_features for layer in layers)
    one = nn.Linear(first.in_features, out, bias=biased[0], device="meta")
    one.weight = nn.Parameter(torch.cat([layer.weight.detach() for layer in layers]))
    if biased[0]:
        one.bias = nn.Parameter(torch.cat([layer.bias.detach() for layer in layers]))
    return one.train(first.training)


def _check(activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")

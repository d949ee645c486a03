"""A compressed matrix: codes, named params, codec and logical shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import ops

if TYPE_CHECKING:
    from .codecs.base import Codec


def storage_dtype(tensor: Tensor) -> torch.dtype:
    """The narrowest of float16 and float32 that holds every value exactly; codes stay uint8.

    Files and bits per weight both follow this rule, so what is counted is what is stored.
    """
    if not tensor.is_floating_point():
        return tensor.dtype
    if torch.equal(tensor.to(torch.float16).to(tensor.dtype), tensor):
        return torch.float16
    return torch.float32


def storage_bits(tensor: Tensor) -> int:
    """Bits `tensor` takes in a file."""
    return tensor.numel() * storage_dtype(tensor).itemsize * 8


def round_to_half(tensor: Tensor) -> Tensor:
    """Nearest float16 values as float32, or the tensor itself where float16 loses precision."""
    magnitude = tensor.abs()
    fits = (magnitude == 0) | ((magnitude >= 2.0**-14) & (magnitude < 65504))
    return tensor.half().float() if bool(fits.all()) else tensor


def over_scale(weight: Tensor, scale: Tensor) -> Tensor:
    """weight / scale; zero where a scale of zero stands for a zero row or column."""
    return (weight / scale).nan_to_num(0, 0, 0)


@dataclass
class Packed:
    """`shape` is (out, in); `params` maps the codec's names to tensors, in the codec's order."""

    codec: Codec
    shape: tuple[int, int]
    codes: Tensor
    params: dict[str, Tensor] = field(default_factory=dict)

    def decode(self) -> Tensor:
        """The weight, (out, in) float32."""
        return ops.decode(self.codes, list(self.params.values()), self.codec.spec, self.shape)

    def linear(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out) in x's dtype."""
        return ops.linear(x, self.codes, list(self.params.values()), self.codec.spec, self.shape)

    def check(self) -> None:
        """Raise ValueError unless sizes, dtypes and every code are valid."""
        ops.check_codes(self.codes, list(self.params.values()), self.codec.spec, self.shape)

    def to(self, device: torch.device | str) -> Packed:
        params = {name: p.to(device) for name, p in self.params.items()}
        return replace(self, codes=self.codes.to(device), params=params)

    @property
    def bits(self) -> int:
        """Everything stored for the matrix, in bits."""
        return storage_bits(self.codes) + sum(storage_bits(p) for p in self.params.values())

    @property
    def bits_per_weight(self) -> float:
        """Stored bits (codes, scales, tables, padding) over the logical number of weights."""
        return self.bits / max(1, self.shape[0] * self.shape[1])

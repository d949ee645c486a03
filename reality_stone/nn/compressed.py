"""What every compressed layer holds: codes, a few tables, and the codec that reads them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import ops
from ..codecs import Codec
from ..packed import Packed, storage_bits

READ = (torch.float32, torch.uint8)  # what the kernels take as a param

# Codes that `.to()` and its like have converted -> (the conversion, what it made of them), so that
# layers which share a buffer share what becomes of it. (Shared Parameters torch keeps by itself.)
_converted: WeakIdKeyDictionary = WeakIdKeyDictionary()


class Compressed(nn.Module):
    """A matrix `shape` as a uint8 buffer `codes` and the codec's params under their own names.

    Params are nn.Parameters, trained while the codes stay; those that are codes are buffers. A kind
    of layer says by `replaces`, `blank`, `from_dense` and `to_dense` which dense module it stands
    for; `kind` is its name in plans. Every kind is in nn.KINDS.
    """

    kind: ClassVar[str]
    dense_name: ClassVar[str]  # of the dense module, for messages
    kept: ClassVar[tuple[str, ...]] = ("bias",)  # tensors of the dense module that are not encoded
    smallest: ClassVar[int] = 0  # weights; a module below this stays dense, even if a plan names it
    on_request: ClassVar[bool] = False  # dense unless a plan names it, and no part of coverage
    bias: Tensor | None
    codes: Tensor

    def __init__(self, codec: Codec, shape: tuple[int, int], device: Any = None):
        super().__init__()
        self.shape = shape
        self._follow(codec)
        tile = codec.tile(shape)
        size = (*tile.grid(shape), tile.bytes)
        self.register_buffer("codes", torch.empty(size, dtype=torch.uint8, device=device))
        self._names: list[str] = []
        for spec in codec.params(shape):
            kind = torch.uint8 if spec.codes else torch.float32
            self._own(spec.name, torch.empty(spec.sizes, dtype=kind, device=device))

    def _follow(self, codec: Codec) -> None:
        """Read codes as this codec does from now on."""
        self.codec = codec
        # Before a trace meets it: Python 3.11 makes a cached property under a lock, which
        # torch.export(strict=True) cannot enter.
        _ = codec.spec

    def _own(self, name: str, value: Tensor) -> None:
        """Register one of the codec's params, a buffer where it is codes."""
        self._names.append(name)
        if value.is_floating_point():
            self.register_parameter(name, nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    # --- the dense module that it stands for ---

    @classmethod
    def replaces(cls, module: nn.Module) -> bool:
        """Whether this kind of layer can stand for the dense module."""
        raise NotImplementedError

    @classmethod
    def dense_weight(cls, module: nn.Module) -> Tensor:
        """The dense module's weight as the matrix (out, in) that is compressed."""
        return module.weight

    @classmethod
    def blank(cls, module: nn.Module, codec: Codec) -> Compressed:
        """The layer for a dense (or compressed) module of this kind, without data (meta device)."""
        raise NotImplementedError

    @classmethod
    def from_dense(
        cls, module: nn.Module, codec: Codec, hessian: Tensor | None = None, **options: Any
    ) -> Compressed:
        """Compress a dense module; options: those of `Codec.encode`."""
        weight = cls.dense_weight(module)
        return cls.in_place_of(module, codec.encode(weight, hessian, **options).to(weight.device))

    @classmethod
    def in_place_of(cls, module: nn.Module, packed: Packed) -> Compressed:
        """The layer with these codes that stands for a dense module."""
        layer = cls.blank(module, packed.codec).to_empty(device=packed.codes.device)
        layer.set_packed(packed)
        if "bias" in cls.kept and layer.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().clone())
        return layer.train(module.training)

    def to_dense(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense module with the decoded weight, float32 by default."""
        raise NotImplementedError

    # --- the codes ---

    @property
    def params(self) -> list[Tensor]:
        """The codec's params in its order."""
        own = self._parameters  # getattr takes a microsecond each, of the twenty of a small product
        return [own[name] if name in own else getattr(self, name) for name in self._names]

    @property
    def weight(self) -> Tensor:
        """The decoded weight, float32, detached, without an adapter: for reading."""
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
        self._follow(packed.codec)
        self._names = []
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

    def share(self, other: Compressed) -> None:
        """Use the codes and params of a layer of the same codec and shape: one memory for both."""
        if other.codec != self.codec or other.shape != self.shape:
            raise ValueError(
                f"a layer of {self.codec.spec} and shape {self.shape} cannot share the codes of "
                f"one of {other.codec.spec} and shape {other.shape}"
            )
        self.codes = other.codes
        for name in self._names:
            setattr(self, name, getattr(other, name))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Compressed:
        def once(tensor: Tensor) -> Tensor:
            if tensor.is_floating_point():
                return fn(tensor)
            by, made = _converted.get(tensor, (None, None))
            if by is fn and made() is not None:
                return made()
            result = fn(tensor)
            if result is not tensor:
                _converted[tensor] = fn, weakref.ref(result)
            return result

        return super()._apply(once, recurse)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits of codes and params (not the bias nor an adapter) over the number of
        weights."""
        stored = storage_bits(self.codes) + sum(storage_bits(p.detach()) for p in self.params)
        return stored / max(1, self.shape[0] * self.shape[1])

    def _float_params(self) -> list[Tensor]:
        # .half() and .bfloat16() narrow params; the kernels read float32.
        return [p if p.dtype in READ else p.float() for p in self.params]

    def _rate(self) -> str:
        """codec and bits per weight, for extra_repr."""
        text = f"codec={self.codec.spec}"
        # What is divided over ranks has no values to ask for without the other ranks.
        if any(t.is_meta or hasattr(t, "device_mesh") for t in (self.codes, *self.params)):
            return text
        return text + f", {self.bits_per_weight:.3f} bits/weight"

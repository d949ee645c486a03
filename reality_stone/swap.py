"""The plan of a model: which layers are compressed and how; swapping layers for it and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import tensorfile
from .codecs import Codec, from_config
from .nn import KINDS, Compressed

# What a codec may raise on settings or codes that are not its own.
WRONG = (ValueError, TypeError, OverflowError, AttributeError, RecursionError, ZeroDivisionError)


@dataclass(frozen=True)
class PlanEntry:
    """One compressed layer: module name, (out, in), codec, whether it has a bias, and its kind."""

    name: str
    shape: tuple[int, int]
    codec: Codec
    bias: bool
    kind: str = "linear"  # see nn.KINDS

    @property
    def prefix(self) -> str:
        return f"{self.name}." if self.name else ""

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of codes and params."""
        tile = self.codec.tile(self.shape)
        sizes = {f"{self.prefix}codes": (*tile.grid(self.shape), tile.bytes)}
        return sizes | {f"{self.prefix}{p.name}": p.sizes for p in self.codec.params(self.shape)}

    def to_config(self) -> dict[str, Any]:
        config = {
            "name": self.name,
            "shape": list(self.shape),
            "codec": self.codec.to_config(),
            "bias": self.bias,
        }
        return config if self.kind == "linear" else config | {"kind": self.kind}

    @staticmethod
    def from_config(value: Any) -> PlanEntry:
        """Raises ValueError in one sentence on anything `to_config` would not write."""
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            raise ValueError(f"a plan entry must be an object with a name, got {value!r:.200}")
        name, shape, bias = value["name"], value.get("shape"), value.get("bias")
        kind = value.get("kind", "linear")
        if not tensorfile.is_sizes(shape) or len(shape) != 2:
            raise ValueError(f"layer {name!r}: shape must be [out, in], got {shape!r:.200}")
        if not isinstance(bias, bool):
            raise ValueError(f"layer {name!r}: bias must be true or false, got {bias!r:.200}")
        if not isinstance(kind, str) or kind not in KINDS:
            raise ValueError(
                f"layer {name!r}: kind must be one of {', '.join(KINDS)}, got {kind!r:.200}"
            )
        codec = value.get("codec")
        try:
            entry = PlanEntry(name, (shape[0], shape[1]), from_config(codec), bias, kind)
            entry.tensors()
        except WRONG as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        return entry


def plan_of(model: nn.Module) -> list[PlanEntry]:
    """The compressed layers of a model, in its order."""
    return [
        PlanEntry(name, module.shape, module.codec, module.bias is not None, module.kind)
        for name, module in model.named_modules()
        if isinstance(module, Compressed)
    ]


def replace(model: nn.Module, plan: Iterable[PlanEntry | Mapping[str, Any]]) -> nn.Module:
    """Swap the layers of `plan` for compressed ones without data (meta device), in place.

    A layer that is already what the plan says is left alone. Raises ValueError, before any change,
    on a name that is not there and on a layer of another kind or shape.
    """
    entries = plan_entries(plan)
    swaps: dict[int, nn.Module] = {}
    for entry in entries:
        old = find_layer(model, entry)
        if isinstance(old, Compressed) and old.codec == entry.codec:
            continue
        if getattr(old, "adapter", None) is not None:
            raise ValueError(
                f"layer {entry.name!r} has an adapter, made beside {old.codec.spec}: take it off "
                "with nn.lora.remove_lora before the layer becomes another"
            )
        if old is model:
            raise ValueError("the model is itself the layer to swap: put it into a module first")
        swaps[id(old)] = KINDS[entry.kind].blank(old, entry.codec).train(old.training)
    swap_modules(model, swaps)
    return model


def dequantize(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Swap every compressed layer for the dense one with the decoded weight, in place.

    `dtype` defaults to that of the model's first parameter outside compressed layers, or float32.
    """
    layers = [m for m in model.modules() if isinstance(m, Compressed)]
    own = {id(p) for layer in layers for p in layer.params}
    dense = (p.dtype for p in model.parameters() if id(p) not in own and p.is_floating_point())
    dtype = dtype or next(dense, torch.float32)
    if isinstance(model, Compressed):
        return model.to_dense(dtype)
    swap_modules(model, {id(layer): layer.to_dense(dtype) for layer in layers})
    return model


def swap_modules(model: nn.Module, swaps: dict[int, nn.Module]) -> None:
    """Everywhere a module hangs, so that layers used twice stay one."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in swaps:
                parent._modules[name] = swaps[id(child)]


def plan_entries(plan: Iterable[PlanEntry | Mapping[str, Any]]) -> list[PlanEntry]:
    """Entries from their JSON form. Raises ValueError on a wrong one and on a name given twice."""
    entries = [e if isinstance(e, PlanEntry) else PlanEntry.from_config(e) for e in plan]
    seen: set[str] = set()
    for entry in entries:
        if entry.name in seen:
            raise ValueError(f"layer {entry.name!r} stands in the plan twice")
        seen.add(entry.name)
    return entries


def find_layer(model: nn.Module, entry: PlanEntry) -> nn.Module:
    """The module an entry names, dense or compressed. ValueError unless it is as the entry says."""
    try:
        module = model.get_submodule(entry.name)
    except AttributeError:
        raise ValueError(
            f"the plan names layer {entry.name!r}, which the model does not have"
        ) from None
    kind = KINDS[entry.kind]
    if isinstance(module, Compressed) and module.kind == entry.kind:
        shape = module.shape
    elif kind.replaces(module):
        shape = tuple(kind.dense_weight(module).shape)
    else:
        raise ValueError(
            f"layer {entry.name!r} must be {kind.dense_name} or {kind.__name__}, the model has "
            f"{type(module).__name__}"
        )
    bias = getattr(module, "bias", None) is not None
    if shape != entry.shape or bias != entry.bias:
        raise ValueError(
            f"layer {entry.name!r} is {_layer_text(entry.shape, entry.bias)} in the plan and "
            f"{_layer_text(shape, bias)} in the model"
        )
    return module


def _layer_text(shape: tuple[int, int], bias: bool) -> str:
    return f"{shape[0]} x {shape[1]} {'with' if bias else 'without'} bias"

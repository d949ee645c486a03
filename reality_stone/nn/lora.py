"""Low-rank adapters beside frozen codes: add, save, load, merge, remove."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import tensorfile
from ..metrics import hessian_nmse, nmse
from ..packed import Packed, storage_bits
from .adapter import Adapter, attach, check_settings, detach
from .linear import RBELinear
from .low_rank import start_at

METADATA = "reality_stone_adapter"
VERSION = 1


def add_lora(
    model: nn.Module,
    rank: int = 16,
    alpha: float | None = None,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    *,
    init: str = "zero",
    weights: nn.Module | Mapping[str, Tensor] | None = None,
    hessians: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[str]:
    """Give compressed layers a trainable term B A alpha/rank (alpha defaults to rank); their names.

    targets: name patterns; all compressed layers by default. A layer's own Parameters (tables,
    scales, bias) are frozen; train `lora_parameters(model)`.
    init: "zero" changes nothing at first; "error" starts at the best term of this rank for what the
    codes left of the dense `weights` (the model before compression, or {layer name: weight}), in
    the metric of the input where `hessians` has the layer's E[x x^T] (LQER, 2024; LoftQ, 2023).
    Raises ValueError, before any change, when nothing matches or a layer has an adapter already.

    >>> net = nn.Sequential(RBELinear(64, 64), nn.ReLU(), RBELinear(64, 8))
    >>> add_lora(net, rank=4, targets=["0"])
    ['0']
    """
    check_settings(rank, alpha, dropout)
    layers = _targets(model, targets)
    for name, layer in layers.items():
        if layer.adapter is not None:
            raise ValueError(f"layer {name!r} has an adapter already; remove_lora takes it off")
    if init not in ("zero", "error"):
        raise ValueError(f"init must be 'zero' or 'error', got {init!r}")
    if (init == "error") != (weights is not None):
        raise ValueError('weights= are needed with init="error", and only there')
    made = {}
    for name, layer in layers.items():
        try:
            made[name] = Adapter(
                layer.in_features, layer.out_features, rank, alpha, dropout,
                layer.codes.device, dtype,
            )  # fmt: skip
        except ValueError as error:
            raise ValueError(f"layer {name!r}: {error}") from None
        if init == "error":
            weight = _dense(weights, name, layer)
            error = weight.to(layer.codes.device) - layer.weight
            start_at(made[name], error, (hessians or {}).get(name), name)
    for name, adapter in made.items():
        attach(layers[name], adapter)
    return list(layers)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """{layer name: adapter} in the model's order."""
    return {n: m.adapter for n, m in _layers(model) if m.adapter is not None}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every adapter, for an optimiser."""
    return [p for adapter in adapters(model).values() for p in adapter.parameters()]


def lora_bits(model: nn.Module) -> int:
    """Bits that the adapters take in a file."""
    return sum(storage_bits(p.detach()) for p in lora_parameters(model))


def remove_lora(model: nn.Module) -> list[str]:
    """Take every adapter off, what it learned with it; the layers train as before. Their names."""
    found = list(adapters(model))
    for name in found:
        detach(model.get_submodule(name))
    return found


# --- merging ---


@dataclass(frozen=True)
class Merge:
    """What a merge costs, against W + BA: |Q - (W + BA)|^2 / |W + BA|^2, in the metric of the input
    where that was given. `dropped` is the same for the layer without its adapter."""

    error: float
    dropped: float


def merge(layer: RBELinear, hessian: Tensor | None = None, *, seed: int = 0) -> Merge:
    """Encode W + B A alpha/rank anew in the layer's codec, and take the adapter off.

    Codes cannot hold the sum exactly: the result says what that costs. Raises ValueError, with the
    layer as it was, when new codes would be no closer to the sum than the old ones without the
    adapter, as happens to a small term at few bits: then keep the adapter.
    """
    if not isinstance(layer, RBELinear) or layer.adapter is None:
        raise ValueError("merge takes one compressed layer that has an adapter")
    packed, found = encode_sum(layer, layer.adapter.weight, hessian, seed=seed)
    detach(layer)
    layer.set_packed(packed)
    return found


def encode_sum(
    layer: RBELinear, term: Tensor, hessian: Tensor | None = None, *, seed: int = 0
) -> tuple[Packed, Merge]:
    """Codes of W + `term` (out, in), and what they cost; the layer stays. Raises as `merge`."""
    before = layer.weight
    target = before + term
    given = {name: getattr(layer, name).detach().cpu().float() for name in layer.codec.common}
    packed = layer.codec.encode(target, hessian, seed=seed, given=given)
    packed = packed.to(layer.codes.device)
    found = Merge(_error(packed.decode(), target, hessian), _error(before, target, hessian))
    if not found.error < found.dropped:
        raise ValueError(
            f"{layer.codec.spec}: codes of the weight with its adapter would be off by "
            f"{found.error:.2e} of its square, and without the adapter it is off by "
            f"{found.dropped:.2e}: keep the adapter, or use more bits"
        )
    return packed, found


def _error(a: Tensor, b: Tensor, hessian: Tensor | None) -> float:
    return nmse(a, b) if hessian is None else hessian_nmse(a, b, hessian)


# --- files ---


def save_adapter(model: nn.Module, path: str | os.PathLike[str]) -> Path:
    """Write every adapter of the model to one safetensors file. ValueError where there is none."""
    found, path = adapters(model), Path(path)
    if not found:
        raise ValueError("the model has no adapters to save; add_lora gives it some")
    layers, tensors = {}, {}
    for name, adapter in found.items():
        layer = model.get_submodule(name)
        layers[name] = {
            "shape": list(layer.shape), "rank": adapter.rank, "alpha": adapter.alpha,
            "dropout": adapter.dropout, "codes": _digest(layer),
        }  # fmt: skip
        tensors |= {_key(name, k): p.detach() for k, p in adapter.named_parameters()}
    record = json.dumps({"version": VERSION, "layers": layers})
    part = path.with_name(f".{path.name}.partial")
    try:
        tensorfile.write(part, tensors, {METADATA: record})
        part.replace(path)
    except OSError as error:
        raise OSError(f"{path}: the adapter could not be written: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def load_adapter(model: nn.Module, path: str | os.PathLike[str]) -> list[str]:
    """Put the adapters of a file on the model's compressed layers; the names of those.

    Afterwards the model has these adapters and no others. Where it had one of the same rank and
    dtype, that keeps its Parameters and takes the values. Warns when the file was made beside other
    codes. Raises FileNotFoundError or ValueError in one sentence, the model then being as it was.
    """
    header = tensorfile.read_header(Path(path))
    made = _read(model, header)
    for name, old in adapters(model).items():
        if name not in made:
            detach(model.get_submodule(name))
        elif old.a.shape == made[name].a.shape and old.a.dtype == made[name].a.dtype:
            old.load_state_dict(made[name].state_dict())
            old.alpha, old.dropout = made[name].alpha, made[name].dropout
            del made[name]
        else:
            detach(model.get_submodule(name))
    for name, adapter in made.items():
        attach(model.get_submodule(name), adapter)
    return list(adapters(model))


def _read(model: nn.Module, header: tensorfile.Header) -> dict[str, Adapter]:
    path, record = header.path, header.record(METADATA)
    if not isinstance(record, dict) or not isinstance(record.get("layers"), dict):
        raise ValueError(f"{path}: this is no file of save_adapter")
    if record.get("version") != VERSION:
        raise ValueError(
            f"{path}: version {record.get('version')!r:.50} is not known to this release, which "
            f"reads version {VERSION}"
        )
    layers, made, other_codes = dict(_layers(model)), {}, []
    expected = {_key(name, k) for name in record["layers"] for k in ("a", "b")}
    if extra := sorted(set(header.entries) - expected):
        raise ValueError(f"{path}: tensor {extra[0]!r} belongs to no layer of the file")
    with path.open("rb") as file:
        for name, about in record["layers"].items():
            layer = layers.get(name)
            if layer is None:
                raise ValueError(f"{path}: the model has no compressed layer {name!r}")
            try:
                made[name] = _read_one(layer, name, about, header, file)
            except ValueError as error:
                raise ValueError(f"{path}: layer {name!r}: {error}") from None
            if about.get("codes") != _digest(layer):
                other_codes.append(name)
    if other_codes:
        warnings.warn(
            f"{path}: {len(other_codes)} of {len(made)} adapters were trained beside other codes, "
            f"the first is that of {other_codes[0]!r}",
            stacklevel=3,
        )
    return made


def _read_one(layer: RBELinear, name: str, about: Any, header, file) -> Adapter:
    if not isinstance(about, dict) or about.get("shape") != list(layer.shape):
        shape = about.get("shape") if isinstance(about, dict) else about
        raise ValueError(f"its shape is {list(layer.shape)}, the adapter is for {shape!r:.50}")
    rank = about.get("rank")
    adapter = Adapter(
        layer.in_features, layer.out_features, rank, about.get("alpha"), about.get("dropout"),
        device="meta",
    )  # fmt: skip
    values = {}
    for key, p in adapter.named_parameters():
        entry = header.entries.get(_key(name, key))
        if entry is None:
            raise ValueError(f"tensor {_key(name, key)!r} is missing")
        if entry.shape != tuple(p.shape) or not entry.dtype.is_floating_point:
            raise ValueError(
                f"tensor {entry.name!r} is {entry.dtype} {list(entry.shape)}, rank {rank} needs "
                f"floating point {list(p.shape)}"
            )
        values[key] = tensorfile.read_tensor(header, entry, file)
        if not bool(values[key].isfinite().all()):
            raise ValueError(f"tensor {entry.name!r} holds values that are not finite")
    for key, value in values.items():
        setattr(adapter, key, nn.Parameter(value.to(layer.codes.device)))
    return adapter


def _key(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


def _digest(layer: RBELinear) -> str:
    """What tells one layer's codes from another's."""
    return hashlib.sha256(layer.codes.detach().cpu().contiguous().numpy()).hexdigest()[:16]


# --- the parts of add_lora ---


def _layers(model: nn.Module) -> Iterator[tuple[str, RBELinear]]:
    return ((n, m) for n, m in model.named_modules() if isinstance(m, RBELinear))


def _targets(model: nn.Module, patterns: Sequence[str] | None) -> dict[str, RBELinear]:
    layers = dict(_layers(model))
    if not layers:
        raise ValueError("the model has no compressed layers; call compress first")
    if patterns is None:
        return layers
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in layers):
            raise ValueError(f"no compressed layer matches {pattern!r}")
    return {
        name: layer
        for name, layer in layers.items()
        if any(fnmatch.fnmatchcase(name, p) for p in patterns)
    }


def _dense(weights: nn.Module | Mapping[str, Tensor], name: str, layer: RBELinear) -> Tensor:
    if isinstance(weights, nn.Module):
        weight = getattr(dict(weights.named_modules()).get(name), "weight", None)
    else:
        weight = weights.get(name)
    if weight is None or tuple(weight.shape) != layer.shape:
        shape = None if weight is None else tuple(weight.shape)
        raise ValueError(f"layer {name!r} needs a dense weight of {layer.shape}, got {shape}")
    return weight.detach().float()

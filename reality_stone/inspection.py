"""What is in packed files, sound or damaged, and where the damage is."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from . import checkpoint, shards, tensorfile
from .swap import PlanEntry
from .tensorfile import Header


@dataclass(frozen=True)
class Layer:
    """One compressed layer as stored; `problem` is one sentence, or empty."""

    name: str
    shape: tuple[int, int]
    codec: str
    bits_per_weight: float
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Other:
    """One tensor outside compressed layers."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    problem: str = ""


@dataclass(frozen=True)
class Contents:
    """Everything `inspect` finds; sizes in bytes."""

    path: str
    size: int
    version: int | None
    layers: list[Layer] = field(default_factory=list)
    others: list[Other] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    checksums: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Over the compressed layers, everything counted that is stored for them; a layer that is
        tied to another stores nothing and is not counted."""
        weights = sum(math.prod(layer.shape) for layer in self.layers if layer.bytes)
        return 8 * sum(layer.bytes for layer in self.layers) / weights if weights else 0.0

    @property
    def sound(self) -> bool:
        return not self.problems and not any(e.problem for e in [*self.layers, *self.others])

    def to_json(self) -> dict:
        return asdict(self) | {"bits_per_weight": self.bits_per_weight, "sound": self.sound}


def inspect(path: str | os.PathLike[str], progress: bool = True) -> Contents:
    """Look at a checkpoint directory or one safetensors file; damage is listed, not raised.

    Raises FileNotFoundError when there is nothing under that name.
    """
    path = Path(path)
    problems: list[str] = []
    quantization = None
    if path.is_dir():
        try:
            quantization = checkpoint.read_config(path).get("quantization_config")
        except (ValueError, FileNotFoundError) as error:
            problems.append(str(error))
        try:
            header = shards.read(path, tolerate=True)
        except FileNotFoundError as error:
            problems.append(str(error))
            return Contents(str(path), 0, None, problems=problems)
    else:
        header = tensorfile.read_header(path, tolerate=True)
    header = checkpoint.with_ties(header, quantization)
    problems += header.problems
    own = _written_plan(header)
    if own is not None and quantization is not None:
        problems += checkpoint.written_otherwise(header, quantization)
    if own is None or header.shards:  # shards know their own part of the plan only
        own = quantization or own
    plan, version = _plan(path, own, problems)
    packed = {name for entry in plan for name in entry.tensors()}
    others: list[Other] = []
    layers: list[Layer] = []
    bar = tqdm(total=len(header.entries), desc="inspect", leave=False, disable=not progress or None)
    with bar:
        for name, entry in header.entries.items():
            if name in packed:
                continue
            try:
                tensorfile.read_tensor(header, entry)
                problem = ""
            except ValueError as error:
                problem = str(error)
            kind = tensorfile.NAMES[entry.dtype]
            others.append(Other(name, kind, entry.shape, entry.bytes, problem))
            bar.update()
        for entry in plan:
            layers.append(_layer(header, entry))
            bar.update(len(entry.tensors()))
    if plan or own:
        known = set(header.entries) | packed
        lost = sorted(set(header.digests) - known)
        problems += [
            f"{header.path}: tensor {name!r} was written but is not there" for name in lost
        ]
    return Contents(str(path), header.size, version, layers, others, problems, bool(header.digests))


def _written_plan(header: Header) -> Any:
    """The quantization_config in the weights, put together where they are in shards."""
    if not header.shards:
        return header.record(checkpoint.METHOD)
    found = [shard.record(checkpoint.METHOD) for shard in header.shards]
    found = [one for one in found if isinstance(one, dict) and isinstance(one.get("plan"), list)]
    return {**found[0], "plan": [e for one in found for e in one["plan"]]} if found else None


def _plan(path: Path, quantization: Any, problems: list[str]) -> tuple[list[PlanEntry], int | None]:
    """The entries that can be read, and the checkpoint version."""
    if quantization is None:
        return [], None
    version = quantization.get("version") if isinstance(quantization, dict) else None
    try:
        return checkpoint.read_plan(path, quantization), version
    except ValueError as error:
        problems.append(str(error))
    found: list[PlanEntry] = []
    plan = quantization.get("plan") if isinstance(quantization, dict) else None
    for value in plan if isinstance(plan, list) and version in checkpoint.READERS else []:
        try:
            found.append(PlanEntry.from_config(value))
        except ValueError:
            continue
    return found, version


def _layer(header: Header, entry: PlanEntry) -> Layer:
    places = checkpoint.stored_names(header, entry)
    present = [header.entries[name] for name in places.values() if name in header.entries]
    size = sum(e.bytes for e in present if e.name in places)  # a shared table in its first layer
    problem = ""
    try:
        checkpoint.check_sizes(header, [entry])
        tensors: Mapping[str, Tensor] = {e.name: tensorfile.read_tensor(header, e) for e in present}
        checkpoint.check_layer(header, entry, tensors)
    except ValueError as error:
        problem = str(error)
    rate = 8 * size / max(1, math.prod(entry.shape))
    return Layer(entry.name, entry.shape, entry.codec.spec, rate, size, problem)

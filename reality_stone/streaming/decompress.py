"""A packed checkpoint as a dense one again, tensor by tensor."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint, shards, tensorfile
from ..checkpoint import Checkpoint
from ..nn import RBEExperts
from ..nn.experts import unfused
from ..swap import PlanEntry
from ..tensorfile import CHUNK, Lazy
from . import naming
from .assembly import OTHER_FILES


@dataclass(frozen=True)
class Decompressed:
    """What decompress_checkpoint wrote; sizes in bytes."""

    target: str
    layers: int
    dtype: str
    size: int
    files: list[str]


def decompress_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    *,
    progress: bool = True,
) -> Decompressed:
    """Write the packed checkpoint `source` as a dense one that transformers alone can load.

    dtype: of the decoded weights, by default that which config.json says the source had; all other
    tensors are copied as they are. `target` must be empty or not there. Raises FileNotFoundError or
    ValueError in one sentence, OSError where the disk does not take it.
    """
    source, goal = Path(source), _check_target(target)
    opened = checkpoint.open_checkpoint(source)
    kind = dtype or _source_dtype(opened)
    if not kind.is_floating_point or kind not in tensorfile.NAMES:
        raise ValueError(f"{source}: weights cannot be stored as {kind}")
    part = goal.with_name(f".{goal.name}.{secrets.token_hex(4)}.partial")
    try:
        part.mkdir(parents=True)
        files = _write(opened, part, kind, progress)
        config = {k: v for k, v in opened.config.items() if k != "quantization_config"}
        if dtype is not None and config.get("model_type"):
            config.pop("torch_dtype", None)
            config["dtype"] = str(kind).removeprefix("torch.")
        (part / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        checkpoint.copy_beside(source, part, OTHER_FILES)
        checkpoint._sync(part)
        if goal.exists():
            goal.rmdir()
        part.rename(goal)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{goal}: the checkpoint could not be written: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    size = sum((goal / name).stat().st_size for name in files)
    return Decompressed(str(goal), len(opened.plan), tensorfile.NAMES[kind], size, files)


def _check_target(directory: str | os.PathLike[str]) -> Path:
    target = checkpoint.check_target(directory)
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"{target}: this directory is not empty, choose another name")
    return target


def _source_dtype(opened: Checkpoint) -> torch.dtype:
    name = opened.config.get("dtype") or opened.config.get("torch_dtype")
    found = getattr(torch, name, None) if isinstance(name, str) else None
    return found if isinstance(found, torch.dtype) and found.is_floating_point else torch.float32


def _write(opened: Checkpoint, directory: Path, dtype: torch.dtype, progress: bool) -> list[str]:
    """One dense file for each packed one; their names."""
    header = opened.header
    packed: set[str] = set()
    stored: dict[str, tuple[Path, Lazy]] = {}
    mixtures, turned = _mixtures(opened)
    for entry in opened.plan:
        places = checkpoint.stored_names(header, entry)
        packed |= set(places.values())
        # transformers' Conv1D holds (in, out).
        transposed = (entry.kind == "conv1d") != (entry.name in turned)
        shape = entry.shape[::-1] if transposed else entry.shape
        lazy = Lazy(dtype, shape, _decoder(opened, entry, dtype, transposed))
        stored[f"{entry.prefix}weight"] = header.entries[f"{entry.prefix}codes"].path, lazy
    for name, entry in header.entries.items():
        if name not in packed:
            transposed = name.removesuffix(".weight") in turned
            shape = entry.shape[::-1] if transposed else entry.shape
            lazy = Lazy(entry.dtype, shape, _copier(opened, name, transposed))
            stored[name] = entry.path, lazy
    for name, parts in mixtures:
        _stack(stored, name, parts, dtype)
    paths = sorted({path for path, _ in stored.values()})
    names = [shards.shard_name(k, len(paths)) for k in range(len(paths))]
    bar = tqdm(
        total=len(stored), desc="decompress", unit="tensor", leave=False,
        disable=None if progress else True,
    )  # fmt: skip
    with bar:
        for path, file in zip(paths, names, strict=True):
            own = {n: _counted(lazy, bar) for n, (place, lazy) in stored.items() if place == path}
            tensorfile.write(directory / file, own, {})
    if len(names) > 1:
        files = {name: names[paths.index(path)] for name, (path, _) in stored.items()}
        total = sum(lazy.bytes for _, lazy in stored.values())
        (directory / shards.INDEX).write_text(shards.index_text(files, total))
    return names


def _mixtures(opened: Checkpoint) -> tuple[list[tuple[str, list[str]]], set[str]]:
    """(name of a tensor that holds all experts, names of theirs) and the layers it has transposed.

    Only the model knows which layers are such: it is built without data where a plan names any.
    """
    if not any(entry.name.rpartition(".")[2].isdecimal() for entry in opened.plan):
        return [], set()
    config = {k: v for k, v in opened.config.items() if k != "quantization_config"}
    model, reason = naming.model_on_meta(config)
    if model is None:
        warnings.warn(
            f"{opened.directory}: {reason}: experts are written one by one, if there are any",
            stacklevel=2,
        )
        return [], set()
    found: list[tuple[str, list[str]]] = []
    turned: set[str] = set()
    packed = {entry.name for entry in opened.plan}
    with unfused(model, packed):
        for path, module in model.named_modules():
            if not isinstance(module, RBEExperts):
                continue
            for matrix in module.matrices:
                own = [f"{path}.{matrix}.{i}" for i in range(module.num_experts)]
                found.append((f"{path}.{matrix}", [f"{name}.weight" for name in own]))
                if module.has_bias:
                    found.append((f"{path}.{matrix}_bias", [f"{name}.bias" for name in own]))
                turned |= set(own) if module.is_transposed else set()
    return found, turned


def _stack(
    stored: dict[str, tuple[Path, Lazy]], name: str, parts: list[str], dtype: torch.dtype
) -> None:
    """Put one tensor of all experts in the place of theirs."""
    taken = [stored.pop(part) for part in parts]
    lazies = [lazy for _, lazy in taken]

    def chunks():
        for lazy in lazies:
            for chunk in lazy.chunks():
                made = tensorfile.as_tensor(bytearray(chunk), lazy.dtype, (-1,)).to(dtype)
                yield tensorfile.as_bytes(made)

    shape = lazies[0].shape
    stored[name] = taken[0][0], Lazy(dtype, (len(lazies), *shape), chunks)


def _counted(lazy: Lazy, bar: tqdm) -> Lazy:
    def chunks():
        yield from lazy.chunks()
        bar.update()

    return Lazy(lazy.dtype, lazy.shape, chunks)


def _copier(opened: Checkpoint, name: str, transposed: bool) -> Callable[[], Iterator[Any]]:
    def chunks():
        entry = opened.header.entries[name]
        if transposed:
            return iter([tensorfile.as_bytes(tensorfile.read_tensor(opened.header, entry).t())])
        tensorfile.check_digest(opened.header, entry)
        return tensorfile.read_chunks(entry)

    return chunks


def _decoder(
    opened: Checkpoint, entry: PlanEntry, dtype: torch.dtype, transposed: bool
) -> Callable[[], Iterator[memoryview]]:
    def chunks():
        header = opened.header
        places = checkpoint.stored_names(header, entry)
        tensors: dict[str, Tensor] = {
            name: tensorfile.read_tensor(header, header.entries[name]) for name in places.values()
        }
        weight = checkpoint.check_layer(header, entry, tensors).decode()
        weight = weight.t() if transposed else weight
        rows = max(1, CHUNK // max(1, 4 * weight.shape[1]))
        for slab in weight.split(rows):
            yield tensorfile.as_bytes(slab.to(dtype))

    return chunks

"""A packed checkpoint as a dense one again, tensor by tensor."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from .. import checkpoint, shards, tensorfile
from ..checkpoint import Checkpoint
from ..swap import PlanEntry
from ..tensorfile import CHUNK, Lazy
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
        for name in (*checkpoint.TOKENIZER_FILES, *OTHER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, part / name)
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
    for entry in opened.plan:
        places = checkpoint.stored_names(header, entry)
        packed |= set(places.values())
        chunks = _decoder(opened, entry, dtype)
        lazy = Lazy(dtype, entry.shape, chunks)
        stored[f"{entry.prefix}weight"] = header.entries[f"{entry.prefix}codes"].path, lazy
    for name, entry in header.entries.items():
        if name not in packed:
            stored[name] = entry.path, Lazy(entry.dtype, entry.shape, _copier(opened, name))
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


def _counted(lazy: Lazy, bar: tqdm) -> Lazy:
    def chunks():
        yield from lazy.chunks()
        bar.update()

    return Lazy(lazy.dtype, lazy.shape, chunks)


def _copier(opened: Checkpoint, name: str) -> Callable[[], Iterator[bytearray]]:
    def chunks():
        entry = opened.header.entries[name]
        tensorfile.check_digest(opened.header, entry)
        return tensorfile.read_chunks(entry)

    return chunks


def _decoder(
    opened: Checkpoint, entry: PlanEntry, dtype: torch.dtype
) -> Callable[[], Iterator[memoryview]]:
    def chunks():
        header = opened.header
        places = checkpoint.stored_names(header, entry)
        tensors: dict[str, Tensor] = {
            name: tensorfile.read_tensor(header, header.entries[name]) for name in places.values()
        }
        weight = checkpoint.check_layer(header, entry, tensors).decode()
        rows = max(1, CHUNK // max(1, 4 * weight.shape[1]))
        for slab in weight.split(rows):
            yield tensorfile.as_bytes(slab.to(dtype))

    return chunks

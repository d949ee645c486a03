"""The weights of a model directory: model.safetensors, or an index and the shards it names.

model.safetensors.index.json holds {"weight_map": {tensor: file name}, "metadata": {...}}. A file
name is just that: a shard lies in the directory itself, or, in a snapshot of the Hugging Face
cache, among the blobs of the same model, where the snapshot's links lead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import tensorfile
from .tensorfile import Header

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_INDEX = 100_000_000  # bytes
MAX_SHARDS = 100_000


def read(directory: Path, *, tolerate: bool = False) -> Header:
    """The header of a directory's weights; that of several shards has all their tensors.

    Every shard's header is checked in full. Raises FileNotFoundError or ValueError in one sentence;
    with `tolerate`, damage is listed in `problems` instead, and what is whole is kept.
    """
    file, index = directory / WEIGHTS, directory / INDEX
    if file.exists() or not index.exists():
        return tensorfile.read_header(file, tolerate=tolerate)
    problems: list[str] = []
    try:
        weight_map = read_index(index)
    except ValueError as error:
        if not tolerate:
            raise
        return Header(index, 0, {}, {}, (str(error),))
    headers: list[Header] = []
    for name in dict.fromkeys(weight_map.values()):
        try:
            headers.append(tensorfile.read_header(locate(directory, name), tolerate=tolerate))
        except (ValueError, FileNotFoundError) as error:
            if not tolerate:
                raise
            problems.append(str(error))
    problems += [p for header in headers for p in header.problems]
    found = join(index, headers, weight_map, problems)
    if found.problems and not tolerate:
        raise ValueError(found.problems[0])
    return found


def read_index(path: Path) -> dict[str, str]:
    """{tensor: file name} of an index, its names checked. Raises ValueError in one sentence."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_INDEX)
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this is not valid JSON: {error}") from None
    weight_map = value.get("weight_map") if isinstance(value, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{path}: an index must hold a weight_map of tensors and file names")
    names = set()
    for tensor, name in weight_map.items():
        if not is_plain(name):
            raise ValueError(
                f"{path}: tensor {tensor[:200]!r} is said to be in {name!r:.200}, which is no file "
                "name ending in .safetensors"
            )
        names.add(name)
    if len(names) > MAX_SHARDS:
        raise ValueError(f"{path}: {len(names)} shards are more than {MAX_SHARDS}")
    return weight_map


def is_plain(name: Any) -> bool:
    """Whether this is the name of a shard and cannot be read as a path to elsewhere."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and len(name) <= 255
        and not name.startswith(".")
        and not any(c in "/\\:" or not c.isprintable() for c in name)
    )


def locate(directory: Path, name: str) -> Path:
    """directory/name. Raises ValueError where a link there leads out of the model's own files."""
    path = directory / name
    home, real = directory.resolve(), path.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if path.is_symlink() and real.parent not in allowed:
        raise ValueError(f"{path}: this link leads out of the model's directory, to {real}")
    return path


def join(
    path: Path, headers: list[Header], weight_map: Mapping[str, str], problems: list[str]
) -> Header:
    """Headers of shards as one; whatever of them and of the index disagrees goes to `problems`."""
    entries: dict[str, tensorfile.Entry] = {}
    records: dict[str, dict] = {"sha256": {}, "tied": {}}
    for header in headers:
        for name, entry in header.entries.items():
            file = weight_map.get(name, header.path.name)
            if name in entries:
                problems.append(
                    f"{header.path}: tensor {name!r} is also in {entries[name].path.name}"
                )
            elif file != header.path.name:
                problems.append(f"{header.path}: tensor {name!r} belongs into {file}")
            else:
                entries[name] = entry
        for key, together in records.items():
            own = header.record(key)
            together |= own if isinstance(own, dict) else {}
    whole = {header.path.name for header in headers if not header.problems}
    for name, file in weight_map.items():
        if name not in entries and file in whole:
            problems.append(f"{path.with_name(file)}: tensor {name!r} is missing")
    metadata = {key: json.dumps(value) for key, value in records.items() if value}
    size = sum(header.size for header in headers)
    return Header(path, size, entries, metadata, tuple(problems), tuple(headers))


def index_text(entries: Mapping[str, str], total: int) -> str:
    """The text of an index: {tensor: file name} and the bytes of all tensors."""
    value = {"metadata": {"total_size": total}, "weight_map": dict(sorted(entries.items()))}
    return json.dumps(value, indent=2) + "\n"


def shard_name(k: int, count: int) -> str:
    """The name of shard k, from 0, of `count`."""
    return WEIGHTS if count == 1 else f"model-{k + 1:05d}-of-{count:05d}.safetensors"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found

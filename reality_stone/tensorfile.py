"""Safetensors files read with suspicion and written with a checksum for every tensor.

Layout: header length (uint64, little end first), JSON header, tensors back to back in the header's
order. `__metadata__` of a file of ours holds {"sha256": JSON of {tensor: hex digest}} among others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # bytes, the limit of the safetensors library
MAX_SIZE = 1 << 48  # of one dimension


@dataclass(frozen=True)
class Entry:
    """One tensor: `start` and `end` are bytes from the beginning of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says it holds; `problems` is not empty only where damage was to be tolerated."""

    path: Path
    size: int
    entries: dict[str, Entry]
    metadata: dict[str, str]
    problems: tuple[str, ...] = ()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 of each tensor as recorded; empty in files of other writers."""
        digests = self.record("sha256")
        return digests if isinstance(digests, dict) else {}

    def record(self, key: str) -> Any:
        """A metadata value read as JSON; None where it is missing or cannot be read."""
        try:
            return json.loads(self.metadata.get(key, "null"))
        except (ValueError, RecursionError):
            return None


def read_header(path: Path, *, tolerate: bool = False) -> Header:
    """The header, checked in full against the file's size before anything is allocated.

    With `tolerate`, damage is listed in `problems` and only the tensors that are whole are kept.
    Raises FileNotFoundError, or ValueError in one sentence.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            raw = _header_bytes(path, file, size)
            fields = _parse(path, raw)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        if not tolerate:
            raise
        return Header(path, size, {}, {}, (str(error),))
    problems: list[str] = []
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append(f"{path}: __metadata__ must map names to text")
        metadata = {}
    begin = 8 + len(raw)
    entries: dict[str, Entry] = {}
    at = begin
    for name, value in sorted(fields.items(), key=_offset):
        try:
            entry = _entry(path, name, value, begin)
        except ValueError as error:
            problems.append(str(error))
            continue
        if entry.start != at:
            problems.append(f"{path}: tensor {name!r} starts at byte {entry.start}, expected {at}")
        at = entry.end
        if entry.end > size:
            problems.append(
                f"{path}: the file is cut off at byte {size}, tensor {name!r} ends at {entry.end}"
            )
        else:
            entries[name] = entry
    if at < size and not problems:
        problems.append(f"{path}: {size - at} bytes follow the last tensor, which ends at {at}")
    if problems and not tolerate:
        raise ValueError(problems[0])
    return Header(path, size, entries, metadata, tuple(problems))


def read_tensor(header: Header, entry: Entry, file: BinaryIO) -> Tensor:
    """One tensor of the open file. Raises ValueError when its bytes are not those written."""
    file.seek(entry.start)
    data = bytearray(entry.bytes)
    if file.readinto(data) != len(data):
        raise ValueError(f"{header.path}: the file ends inside tensor {entry.name!r}")
    wanted = header.digests.get(entry.name)
    if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
        raise ValueError(
            f"{header.path}: tensor {entry.name!r} is damaged: its sha256 is not the recorded one"
        )
    if not data:
        return torch.empty(entry.shape, dtype=entry.dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(entry.dtype).view(entry.shape)


def write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write `tensors` one at a time; the same tensors and metadata always give the same bytes."""
    # Widest elements first keeps every tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    digests = dict.fromkeys(names, "0" * 64)
    with path.open("wb") as file:
        file.write(_encode_header(tensors, names, metadata, digests))
        for name in names:
            data = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            digests[name] = hashlib.sha256(data).hexdigest()
            file.write(data)
        file.seek(0)
        file.write(_encode_header(tensors, names, metadata, digests))


def _encode_header(
    tensors: Mapping[str, Tensor],
    names: list[str],
    metadata: Mapping[str, str],
    digests: Mapping[str, str],
) -> bytes:
    extra = {"format": "pt", **metadata, "sha256": json.dumps(digests)}
    header: dict[str, Any] = {"__metadata__": extra}
    at = 0
    for name in names:
        tensor = tensors[name]
        end = at + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def _header_bytes(path: Path, file: BinaryIO, size: int) -> bytes:
    if size < 10:
        raise ValueError(f"{path}: not a safetensors file: it has {size} bytes")
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise ValueError(
            f"{path}: not a safetensors file, or cut off: its header claims {length} bytes, "
            f"the file has {size}"
        )
    return file.read(length)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a name occurs twice")
        return found

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is not valid JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ValueError(f"{path}: the header must be a JSON object")
    return fields


def _offset(item: tuple[str, Any]) -> tuple[int, int]:
    """Sort key: the data offsets, or first where there are none."""
    try:
        start, end = item[1]["data_offsets"]
        return int(start), int(end)
    except (TypeError, ValueError, KeyError, OverflowError):
        return -1, -1


def _entry(path: Path, name: str, value: Any, begin: int) -> Entry:
    where = f"{path}: tensor {name!r}"
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be described by an object")
    dtype, shape, offsets = (value.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{where} has the unknown dtype {dtype!r}")
    if not is_sizes(shape):
        raise ValueError(f"{where} has the shape {shape!r}, wanted a list of sizes")
    if not is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has the data offsets {offsets!r}, wanted [begin, end]")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{where} of {dtype} {shape} needs {wanted} bytes, its offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return Entry(name, DTYPES[dtype], tuple(shape), begin + offsets[0], begin + offsets[1])


def is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of sizes that are safe to compute with."""
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(n) is int and 0 <= n < MAX_SIZE for n in value)
    )

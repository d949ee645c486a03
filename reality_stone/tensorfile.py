"""Safetensors files read with suspicion and written with a checksum for every tensor.

Layout: header length (uint64, little end first), JSON header, tensors back to back in the header's
order. `__metadata__` of a file of ours holds {"sha256": JSON of {tensor: hex digest}} among others.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
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
CHUNK = 1 << 22  # bytes read or written at once where a whole tensor is not needed


@dataclass(frozen=True)
class Entry:
    """One tensor: `start` and `end` are bytes from the beginning of the file `path`."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int
    path: Path

    @property
    def bytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a file says it holds; `problems` is not empty only where damage was to be tolerated.

    One of several `shards` (see shards.py) stands for all of them: `path` is their index.
    """

    path: Path
    size: int
    entries: dict[str, Entry]
    metadata: dict[str, str]
    problems: tuple[str, ...] = ()
    shards: tuple[Header, ...] = ()

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 of each tensor as recorded; empty in files of other writers."""
        digests = self.record("sha256")
        return digests if isinstance(digests, dict) else {}

    @cached_property
    def checked(self) -> set[str]:
        """Tensors whose sha256 check_digest has found right."""
        return set()

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


def header_digest(path: Path) -> str:
    """sha256 of the header's bytes of a file that read_header has found right."""
    with path.open("rb") as file:
        return hashlib.sha256(_header_bytes(path, file, path.stat().st_size)).hexdigest()


def read_tensor(header: Header, entry: Entry, file: BinaryIO | None = None) -> Tensor:
    """One tensor; `file` is its file where that is open. ValueError when its bytes are damaged."""
    data = bytearray(entry.bytes)
    if file is None:
        with _open(entry) as file:
            _read_into(entry, 0, data, file)
    else:
        _read_into(entry, 0, data, file)
    wanted = header.digests.get(entry.name)
    if wanted is not None and hashlib.sha256(data).hexdigest() != wanted:
        raise ValueError(_damaged(entry))
    return as_tensor(data, entry.dtype, entry.shape)


def read_rows(entry: Entry, start: int, stop: int, file: BinaryIO) -> Tensor:
    """Rows start to stop of a tensor, without a look at its sha256: see check_digest."""
    row = entry.bytes // max(1, entry.shape[0])
    data = bytearray((stop - start) * row)
    _read_into(entry, start * row, data, file)
    return as_tensor(data, entry.dtype, (stop - start, *entry.shape[1:]))


def read_chunks(entry: Entry) -> Iterator[bytearray]:
    """The bytes of a tensor, CHUNK at a time."""
    with _open(entry) as file:
        for at in range(0, entry.bytes, CHUNK):
            data = bytearray(min(CHUNK, entry.bytes - at))
            _read_into(entry, at, data, file)
            yield data


def check_digest(header: Header, entry: Entry) -> None:
    """ValueError when a sha256 is recorded for the tensor and its bytes have another; once."""
    wanted = header.digests.get(entry.name)
    if wanted is None or entry.name in header.checked:
        return
    if digest(read_chunks(entry)) != wanted:
        raise ValueError(_damaged(entry))
    header.checked.add(entry.name)


def digest(chunks: Iterable[Any]) -> str:
    """sha256 of bytes in pieces."""
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


def as_tensor(data: bytearray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """The bytes as a tensor that shares their memory."""
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)


def as_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order, without a copy where it is on the CPU and dense."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())


def _open(entry: Entry) -> BinaryIO:
    try:
        return entry.path.open("rb")
    except OSError as error:
        raise ValueError(f"{entry.path}: cannot be read: {error.strerror}") from None


def _read_into(entry: Entry, at: int, data: bytearray, file: BinaryIO) -> None:
    file.seek(entry.start + at)
    if file.readinto(data) != len(data):
        raise ValueError(f"{entry.path}: the file ends inside tensor {entry.name!r}")


def _damaged(entry: Entry) -> str:
    return f"{entry.path}: tensor {entry.name!r} is damaged: its sha256 is not the recorded one"


@dataclass(frozen=True)
class Lazy:
    """A tensor to write that is made when its turn comes: `chunks` gives its bytes in order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Any]]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(
    path: Path, tensors: Mapping[str, Tensor | Lazy], metadata: Mapping[str, str]
) -> dict[str, str]:
    """Write `tensors` one at a time; the same tensors and metadata always give the same bytes.

    Returns the sha256 of each.
    """
    # Widest elements first keeps every tensor aligned to its element size.
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    digests = dict.fromkeys(names, "0" * 64)
    with path.open("wb") as file:
        file.write(_encode_header(tensors, names, metadata, digests))
        for name in names:
            digests[name] = digest(_written(file, tensors[name]))
        file.seek(0)
        file.write(_encode_header(tensors, names, metadata, digests))
    return digests


def _written(file: BinaryIO, tensor: Tensor | Lazy) -> Iterator[Any]:
    """The bytes, each piece once it is written."""
    for chunk in tensor.chunks() if isinstance(tensor, Lazy) else [as_bytes(tensor)]:
        file.write(chunk)
        yield chunk


def _encode_header(
    tensors: Mapping[str, Tensor | Lazy],
    names: list[str],
    metadata: Mapping[str, str],
    digests: Mapping[str, str],
) -> bytes:
    extra = {"format": "pt", **metadata, "sha256": json.dumps(digests)}
    header: dict[str, Any] = {"__metadata__": extra}
    at = 0
    for name in names:
        tensor = tensors[name]
        end = at + math.prod(tensor.shape) * tensor.dtype.itemsize
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
    return Entry(name, DTYPES[dtype], tuple(shape), begin + offsets[0], begin + offsets[1], path)


def read_json(path: Path, most: int = MAX_HEADER) -> Any:
    """The value in a JSON file of at most so many bytes. Raises FileNotFoundError or ValueError."""
    try:
        with path.open("rb") as file:
            return json.loads(file.read(most).decode("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: this is not valid JSON: {error}") from None


def is_sizes(value: Any) -> bool:
    """Whether a JSON value is a list of sizes that are safe to compute with."""
    return (
        isinstance(value, list)
        and len(value) <= 32
        and all(type(n) is int and 0 <= n < MAX_SIZE for n in value)
    )

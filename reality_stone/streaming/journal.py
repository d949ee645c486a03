"""A run on the disk: what is encoded, told from what is not after a kill at any moment.

The directory OUT.partial holds
  job.json            what must be the same for the run to go on
  common.safetensors  tables that layers share, where the codecs have such
  RANK.jsonl          a line for each encoded layer, written once its bytes are on the disk
  SHARD-RANK.bin      those bytes, back to back
  hidden.safetensors  with calibration: the hidden states after the last block that is done
  shards.jsonl        a line for each shard of the result that is complete
  out/                the result, without shards that are not complete
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import tensorfile
from ..packed import Packed, storage_dtype
from ..swap import PlanEntry
from ..tensorfile import Entry

VERSION = 1
JOB, COMMON, SHARDS, OUT = "job.json", "common.safetensors", "shards.jsonl", "out"
HIDDEN = "hidden.safetensors"


@dataclass(frozen=True)
class Record:
    """An encoded layer; its tensors are entries of part files, `digests` their sha256."""

    layer: str
    shard: int
    tensors: dict[str, Entry]
    digests: dict[str, str]
    error: float
    seconds: float
    hessian_error: float | None = None  # in the metric of the input, where that is known

    @property
    def bits(self) -> int:
        return 8 * sum(entry.bytes for entry in self.tensors.values())

    def to_json(self) -> dict[str, Any]:
        tensors = {
            name: [
                tensorfile.NAMES[e.dtype],
                list(e.shape),
                e.path.name,
                e.start,
                self.digests[name],
            ]
            for name, e in self.tensors.items()
        }
        return {
            "layer": self.layer, "shard": self.shard, "tensors": tensors, "error": self.error,
            "seconds": self.seconds, "hessian_error": self.hessian_error,
        }  # fmt: skip


def open_job(directory: Path, job: Mapping[str, Any], resume: bool) -> bool:
    """Start a run in `directory` or, with `resume`, go on with the one there; whether it goes on.

    Raises ValueError in one sentence where that cannot be.
    """
    file, part = directory / JOB, directory / f"{JOB}.tmp"
    job = json.loads(json.dumps(job))
    if not file.exists():
        if directory.exists() and set(directory.iterdir()) - {part}:
            raise ValueError(f"{directory}: this is not an unfinished run, and in its place")
        directory.mkdir(exist_ok=True)
        try:
            write_whole(file, json.dumps(job).encode())
        except OSError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return False
    if not resume:
        raise ValueError(
            f"{directory}: an unfinished run is kept here: add --resume to go on with it, or "
            "delete this directory to start again"
        )
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: the unfinished run cannot be read: {error}") from None
    for key, what in (
        ("version", "was begun by another release"),
        ("source", "was begun when the source was another"),
        ("settings", "was begun with other settings"),
    ):
        if not isinstance(known, dict) or known.get(key) != job[key]:
            raise ValueError(
                f"{directory}: this unfinished run {what}: delete this directory to start again"
            )
    return True


class Journal:
    """The encoded layers of a run; `add` is for one rank's own, `read` finds those of all."""

    def __init__(self, directory: Path, plan: Mapping[str, PlanEntry], rank: int = 0):
        self.directory, self.plan, self.rank = directory, plan, rank
        self.path = directory / f"{rank:05d}.jsonl"

    def add(
        self,
        packed: Packed,
        layer: str,
        shard: int,
        error: float,
        seconds: float,
        hessian_error: float | None = None,
    ) -> Record:
        """Keep a layer; once this returns, no kill takes it away."""
        part = self.directory / f"{shard:05d}-{self.rank:05d}.bin"
        prefix = self.plan[layer].prefix
        values = {f"{prefix}codes": packed.codes}
        values |= {f"{prefix}{n}": v.to(storage_dtype(v)) for n, v in packed.params.items()}
        entries: dict[str, Entry] = {}
        digests: dict[str, str] = {}
        with part.open("ab") as file:
            for name, value in values.items():
                data, at = tensorfile.as_bytes(value), file.tell()
                file.write(data)
                end = at + len(data)
                entries[name] = Entry(name, value.dtype, tuple(value.shape), at, end, part)
                digests[name] = hashlib.sha256(data).hexdigest()
            sync(file)
        record = Record(layer, shard, entries, digests, error, seconds, hessian_error)
        append_line(self.path, record.to_json())
        return record

    def read(self) -> dict[str, Record]:
        """Every layer that is kept."""
        return {record.layer: record for path in self._paths() for record in self._records(path)}

    def load(self, record: Record) -> Packed | None:
        """What was kept; None where its bytes are damaged or, of a complete shard, gone."""
        if not _is_whole(record):
            return None
        entry = self.plan[record.layer]
        values: dict[str, Tensor] = {}
        for name, place in record.tensors.items():
            data = bytearray().join(tensorfile.read_chunks(place))
            values[name.removeprefix(entry.prefix)] = tensorfile.as_tensor(
                data, place.dtype, place.shape
            )
        codes = values.pop("codes")
        return Packed(entry.codec, entry.shape, codes, values)

    def repair(self, complete: Container[int]) -> None:
        """Check every byte, and forget what is not whole or was never recorded.

        complete: shards of which the parts are no longer needed. For one process, before others
        read or add.
        """
        ends: dict[Path, int] = {}
        for path in self._paths():
            good = [r for r in self._records(path) if r.shard in complete or _is_whole(r)]
            write_whole(path, b"".join(line(record.to_json()) for record in good))
            for entry in (e for record in good for e in record.tensors.values()):
                ends[entry.path] = max(ends.get(entry.path, 0), entry.end)
        for path in self.directory.glob("[0-9]*.bin"):
            cut(path, ends.get(path, 0))

    def _paths(self) -> list[Path]:
        return sorted(self.directory.glob("[0-9]*.jsonl"))

    def _records(self, path: Path) -> list[Record]:
        found = [self._record(value) for value in lines(path)]
        return [record for record in found if record is not None]

    def _record(self, value: Any) -> Record | None:
        """A line as written by `add`; None for any other."""
        try:
            entry = self.plan[value["layer"]]
            sizes = entry.tensors()
            entries: dict[str, Entry] = {}
            digests: dict[str, str] = {}
            for name, (kind, shape, part, start, digest) in value["tensors"].items():
                dtype = tensorfile.DTYPES[kind]
                if sizes.pop(name) != tuple(shape) or not tensorfile.is_sizes(
                    [start, value["shard"]]
                ):
                    return None
                if Path(part).name != part or not part.endswith(".bin"):
                    return None
                size = torch.Size(shape).numel() * dtype.itemsize
                path = self.directory / part
                entries[name] = Entry(name, dtype, tuple(shape), start, start + size, path)
                digests[name] = digest
            if sizes:
                return None
            return Record(
                entry.name, value["shard"], entries, digests, value["error"], value["seconds"],
                value.get("hessian_error"),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError):
            return None


def keep_common(directory: Path, tables: Mapping[str, Tensor]) -> None:
    part = directory / f"{COMMON}.tmp"
    tensorfile.write(part, tables, {})
    settle(part, directory / COMMON)


def kept_common(directory: Path) -> dict[str, Tensor] | None:
    """What keep_common kept, or None."""
    if not (directory / COMMON).exists():
        return None
    header = tensorfile.read_header(directory / COMMON)
    return {name: tensorfile.read_tensor(header, e) for name, e in header.entries.items()}


def keep_hidden(directory: Path, done: int, hidden: Sequence[Tensor]) -> None:
    """Keep what comes out of the first `done` blocks in place of what was kept before."""
    part = directory / f"{HIDDEN}.tmp"
    tensors = {f"{i:06d}": value for i, value in enumerate(hidden)}
    tensorfile.write(part, tensors, {"blocks": str(done)})
    settle(part, directory / HIDDEN)


def kept_hidden(directory: Path) -> tuple[int, list[Tensor]]:
    """(blocks done, hidden states) as kept; no block is where there is nothing that is whole."""
    try:
        header = tensorfile.read_header(directory / HIDDEN)
        done = int(header.metadata["blocks"])
        names = sorted(header.entries)
        return done, [tensorfile.read_tensor(header, header.entries[name]) for name in names]
    except (OSError, ValueError, KeyError):
        return 0, []


def _is_whole(record: Record) -> bool:
    try:
        return all(
            tensorfile.digest(tensorfile.read_chunks(entry)) == record.digests[name]
            for name, entry in record.tensors.items()
        )
    except ValueError:
        return False


# --- files ---


def lines(path: Path) -> Iterator[Any]:
    """The JSON value of each line, up to the first that is not whole."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return
    for line in raw.split(b"\n")[:-1]:
        try:
            yield json.loads(line)
        except (ValueError, RecursionError):
            return


def append_line(path: Path, value: Any) -> None:
    with path.open("ab") as file:
        file.write(line(value))
        sync(file)


def line(value: Any) -> bytes:
    return json.dumps(value).encode() + b"\n"


def cut(path: Path, size: int) -> None:
    """Take away what follows the first `size` bytes."""
    if path.stat().st_size > size:
        with path.open("rb+") as file:
            file.truncate(size)
            sync(file)


def sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def settle(part: Path, path: Path) -> None:
    """Have a file's bytes on the disk, then give it its name."""
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    part = path.with_name(f"{path.name}.tmp")
    part.write_bytes(data)
    settle(part, path)

"""Shards, index, manifest and the files beside them, from encoded layers and the dense source."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint, shards, tensorfile
from ..tensorfile import Lazy
from . import journal
from .journal import Record
from .layout import Layout

# Besides those of the tokenizer.
OTHER_FILES = (
    "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "video_preprocessor_config.json",
)  # fmt: skip


class Assembly:
    """The result in `directory`/out, shard by shard: each mirrors one of the source."""

    def __init__(self, directory: Path, layout: Layout):
        self.directory, self.layout = directory, layout
        self.out = directory / journal.OUT
        sources = sorted({recipe.shard for recipe in layout.recipes.values()})
        self._numbers = {path: k for k, path in enumerate(sources)}
        self._layers = {t.entry.name: self._numbers[t.weight.shard] for t in layout.targets}
        self._places = {n: t for t in layout.targets for n in t.entry.tensors()}
        used = set(self._layers.values()) | {
            self._numbers[layout.recipes[name].shard]
            for name, first in layout.names.items()
            if name == first and name not in self._places
        }
        # Numbers of those that something is written to, so that none is empty.
        self._files = {k: shards.shard_name(i, len(used)) for i, k in enumerate(sorted(used))}

    @property
    def tensors(self) -> int:
        """Steps of a run: layers to encode and tensors to copy."""
        firsts = {n for n, first in self.layout.names.items() if n == first}
        return len(self._layers) + len(firsts - set(self._places))

    def shard_of(self, layer: str) -> int:
        return self._layers[layer]

    def complete(self, check: bool = False) -> dict[int, dict[str, Any]]:
        """The shards that are done, as recorded; with `check`, after a look at every byte."""
        found: dict[int, dict[str, Any]] = {}
        for value in journal.lines(self.directory / journal.SHARDS):
            if isinstance(value, dict) and value.get("file") in self._files.values():
                path = self.out / value["file"]
                if path.exists() and (not check or file_digest(path) == value.get("sha256")):
                    found[value["shard"]] = value
        return found

    def repair(self) -> set[int]:
        """Forget shards that are recorded but not whole; the numbers of the others."""
        done = self.complete(check=True)
        text = b"".join(journal.line(value) for value in done.values())
        journal.write_whole(self.directory / journal.SHARDS, text)
        return set(done)

    def build(self, records: Mapping[str, Record], tell: Callable[[str], None]) -> None:
        """Write the shards that are not complete; `tell` is called before each dense tensor."""
        self.out.mkdir(exist_ok=True)
        done = self.complete()
        stored, tied = self._stored(records)
        for k, file in self._files.items():
            if k not in done:
                own = {n: lazy for n, (shard, lazy) in stored.items() if shard == k}
                for name in own:
                    if name not in self._places:
                        own[name] = _told(name, own[name], tell)
                self._write(k, file, own, {a: b for a, b in tied.items() if b in own})
            for part in self.directory.glob(f"{k:05d}-*.bin"):
                part.unlink()

    def _stored(
        self, records: Mapping[str, Record]
    ) -> tuple[dict[str, tuple[int, Lazy]], dict[str, str]]:
        """{name: (shard, tensor)} of what is to be written, and {name left out: name written}."""
        stored: dict[str, tuple[int, Lazy]] = {}
        tied: dict[str, str] = {}
        common: dict[tuple, tuple[str, str]] = {}
        for name, first in self.layout.names.items():
            target = self._places.get(name)
            if first == name and target is not None:
                record = records[target.entry.name]
                own = name.removeprefix(target.entry.prefix)
                if own in target.entry.codec.common:
                    one = (name, record.digests[name])
                    kept, digest = common.setdefault((target.entry.codec, own), one)
                    first = kept if digest == one[1] else name
                lazy = Lazy(
                    record.tensors[name].dtype, record.tensors[name].shape,
                    lambda record=record, name=name: _checked(record, name),
                )  # fmt: skip
                stored[name] = (record.shard, lazy)
            elif first == name:
                recipe = self.layout.recipes[name]
                number = self._numbers[recipe.shard]
                stored[name] = (number, Lazy(recipe.dtype, recipe.shape, recipe.chunks))
            if first != name:
                tied[name] = first
        return {name: value for name, value in stored.items() if name not in tied}, tied

    def _write(self, k: int, file: str, own: dict[str, Lazy], tied: dict[str, str]) -> None:
        quantization = checkpoint.part_of_plan(self.layout.quantization, own)
        metadata = {checkpoint.METHOD: json.dumps(quantization), "tied": json.dumps(tied)}
        part = self.out / f"{file}.tmp"
        digests = tensorfile.write(part, own, metadata)
        value = {
            "shard": k, "file": file, "sha256": file_digest(part),
            "tensors": {
                n: [tensorfile.NAMES[own[n].dtype], list(own[n].shape), digests[n]] for n in own
            },
        }  # fmt: skip
        journal.settle(part, self.out / file)
        journal.append_line(self.directory / journal.SHARDS, value)

    def finish(self, target: Path, manifest: Mapping[str, Any]) -> None:
        """Everything beside the shards, then the result gets its name."""
        done = self.complete()
        files = {value["file"] for value in done.values()}
        for item in list(self.out.iterdir()):
            if item.name not in files:
                shutil.rmtree(item) if item.is_dir() else item.unlink()
        if target.is_dir():
            checkpoint._carry_over(target, self.out)
        checkpoint.copy_beside(self.layout.directory, self.out, OTHER_FILES)
        tensors = {n: (v["file"], *t) for v in done.values() for n, t in v["tensors"].items()}
        if len(files) > 1:
            total = sum(lazy_bytes(kind, shape) for _, kind, shape, _ in tensors.values())
            text = shards.index_text({n: t[0] for n, t in tensors.items()}, total)
            (self.out / shards.INDEX).write_text(text)
        config = self.layout.config | {"quantization_config": self.layout.quantization}
        (self.out / checkpoint.CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        sizes = {
            n: torch.empty(shape, dtype=tensorfile.DTYPES[kind], device="meta")
            for n, (_, kind, shape, _) in tensors.items()
        }
        plan = [t.entry for t in self.layout.targets]
        (self.out / checkpoint.NOTE).write_text(checkpoint._note(plan, sizes))
        value = {
            **manifest,
            "files": {v["file"]: v["sha256"] for v in sorted(done.values(), key=_file)},
            "tensors": {n: self._described(n, t) for n, t in sorted(tensors.items())},
        }
        (self.out / checkpoint.MANIFEST).write_text(json.dumps(value, indent=1) + "\n")
        checkpoint._sync(self.out)
        checkpoint._move_into_place(self.out, target)

    def _described(self, name: str, tensor: tuple[str, str, list[int], str]) -> dict[str, Any]:
        file, kind, shape, digest = tensor
        target = self._places.get(name)
        recipe = self.layout.recipes[name] if target is None else target.weight
        found = {
            "file": file, "dtype": kind, "shape": shape, "sha256": digest,
            "sources": [entry.name for entry in recipe.parts],
        }  # fmt: skip
        if target is not None:
            found |= {"codec": target.entry.codec.spec, "bits": 8 * lazy_bytes(kind, shape)}
        return found


def lazy_bytes(kind: str, shape: list[int]) -> int:
    return Lazy(tensorfile.DTYPES[kind], tuple(shape), tuple).bytes


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    with path.open("rb") as file:
        return tensorfile.digest(iter(lambda: file.read(tensorfile.CHUNK), b""))


def _file(value: Mapping[str, Any]) -> str:
    return value["file"]


def _told(name: str, lazy: Lazy, tell: Callable[[str], None]) -> Lazy:
    def chunks():
        tell(name)
        return lazy.chunks()

    return Lazy(lazy.dtype, lazy.shape, chunks)


def _checked(record: Record, name: str):
    """The bytes of a kept tensor. Raises ValueError where the disk has changed them."""
    entry = record.tensors[name]
    if tensorfile.digest(tensorfile.read_chunks(entry)) != record.digests[name]:
        raise ValueError(
            f"{entry.path}: what is kept of {name!r} is damaged: call again with --resume"
        )
    return tensorfile.read_chunks(entry)


def remove(directory: Path) -> None:
    """Take a finished run away; the job goes last, so that a kill leaves a run that is known."""
    job = directory / journal.JOB
    for item in directory.iterdir():
        if item != job:
            shutil.rmtree(item) if item.is_dir() else os.unlink(item)
    job.unlink(missing_ok=True)
    directory.rmdir()

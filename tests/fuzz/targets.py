"""What untrusted bytes can reach, one function each: files and texts that a model directory holds.

A target takes bytes and a scratch folder. It returns whether they were accepted, and raises only
where the promise is broken: bytes from a file end in one sentence (ValueError or FileNotFoundError)
or in a model that runs. `seeds` are good inputs to start from.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import reality_stone as rs
from reality_stone import checkpoint, inspection, shards, tensorfile
from reality_stone.codecs import REGISTRY
from reality_stone.streaming.journal import Journal
from reality_stone.swap import PlanEntry

SHAPE = (24, 40)


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(40, 24), nn.LayerNorm(24), nn.Linear(24, 5))


def packed_model(codec: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = build()
    model[0] = rs.nn.RBELinear.from_linear(model[0], codec)
    return model.eval()


def accepted(run: Callable[[], object]) -> bool:
    """Whether `run` went through; errors of the promised kinds must be one short line."""
    said = ""
    try:
        run()
    except (ValueError, FileNotFoundError) as error:
        said = str(error) or type(error).__name__
    assert "\n" not in said, said
    assert len(said) < 4000, said[:4000]
    return not said


def use(model: nn.Module) -> None:
    """Forward and backward of a model that was loaded."""
    x = torch.ones(3, 40, requires_grad=True)
    y = model(x)
    assert y.shape == (3, 5)
    y.sum().backward()


def load_and_use(folder: Path) -> bool:
    model = build()
    if not accepted(lambda: rs.load(model, folder)):
        return False
    use(model)
    return True


def header(data: bytes, folder: Path) -> bool:
    """Any bytes as a safetensors file: its header is read, then every tensor it claims."""
    file = folder / "any.safetensors"
    file.write_bytes(data)

    def read() -> None:
        found = tensorfile.read_header(file)
        with file.open("rb") as opened:
            for entry in found.entries.values():
                tensor = tensorfile.read_tensor(found, entry, opened)
                assert tuple(tensor.shape) == entry.shape
                assert tensor.nbytes == entry.bytes <= len(data)

    good = accepted(read)
    contents = inspection.inspect(file, progress=False)
    assert not (good and contents.problems and not contents.layers), contents.problems
    return good


def config(data: bytes, folder: Path) -> bool:
    """Any bytes as config.json beside sound weights that do not carry a plan of their own."""
    saved = _saved(folder)
    (saved / checkpoint.CONFIG).write_bytes(data)
    inspection.inspect(saved, progress=False)
    return load_and_use(saved)


def weights(data: bytes, folder: Path) -> bool:
    """Any bytes as model.safetensors beside a sound config.json."""
    saved = _saved(folder)
    (saved / checkpoint.WEIGHTS).write_bytes(data)
    inspection.inspect(saved, progress=False)
    return load_and_use(saved)


def codes(data: bytes, folder: Path) -> bool:
    """Any bytes as codes and params of any codec, in a file without checksums."""
    names = sorted(REGISTRY)
    codec = REGISTRY[names[data[0] % len(names)]]() if data else REGISTRY["uniform"]()
    entry = PlanEntry("0", SHAPE, codec, True)
    at = 1
    tensors = {k: v for k, v in build().state_dict().items() if k != "0.weight"}
    for name, sizes in entry.tensors().items():
        kind = next((p for p in codec.params(SHAPE) if name == f"0.{p.name}"), None)
        dtype = torch.uint8 if kind is None or kind.codes else torch.float32
        size = math.prod(sizes) * dtype.itemsize
        part = data[at : at + size]
        at += size
        raw = torch.frombuffer(
            bytearray(part + bytes(size - len(part)) or b"\0"), dtype=torch.uint8
        )
        tensors[name] = raw[:size].view(dtype).view(sizes)
    folder = folder / "codes"
    folder.mkdir(exist_ok=True)
    quantization = {"quant_method": checkpoint.METHOD, "version": 1, "plan": [entry.to_config()]}
    (folder / checkpoint.CONFIG).write_text(json.dumps({"quantization_config": quantization}))
    tensorfile.write(folder / checkpoint.WEIGHTS, tensors, {})
    return load_and_use(folder)


def index(data: bytes, folder: Path) -> bool:
    """Any bytes as the index of a checkpoint whose two shards are sound."""
    saved = _sharded(folder)
    (saved / shards.INDEX).write_bytes(data)
    inspection.inspect(saved, progress=False)
    return load_and_use(saved)


def journal(data: bytes, folder: Path) -> bool:
    """Any bytes as the record of an unfinished run: read, repaired, read again."""
    place = folder / "journal"
    place.mkdir(exist_ok=True)
    (place / "00000-00000.bin").write_bytes(_packed_codes())
    (place / "00000.jsonl").write_bytes(data)
    kept = Journal(place, {"0": ENTRY})
    kept.read()
    kept.repair(())
    found = kept.read()
    for record in found.values():
        for tensor in record.tensors.values():
            assert tensor.path == place / "00000-00000.bin"
            assert tensor.end <= len(_packed_codes())
    return bool(found)


def codec(data: bytes, folder: Path) -> bool:
    """Any text as a codec, and what it says about sizes of layers."""
    text = data.decode("utf-8", "surrogateescape")

    def read() -> None:
        found = rs.codec(text)
        assert rs.codec(found.spec) == found
        found.tile(SHAPE)

    return accepted(read)


def plan(data: bytes, folder: Path) -> bool:
    """Any bytes as a plan, its totals and its text."""
    file = folder / "plan.json"
    file.write_bytes(data)

    def read() -> None:
        found = rs.Plan.load(file)
        str(found)
        assert rs.Plan.from_json(found.to_json()) == found

    return accepted(read)


def _some_plan(_: Path) -> list[bytes]:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    found = rs.plan(model, 3.5, codec="uniform", rates=(3, 4, 16), skip=["1"], progress=False)
    return [json.dumps(found.to_json()).encode()]


_sound: dict[str, bytes] = {}


def _saved(folder: Path) -> Path:
    """A sound checkpoint under the folder; its files are written anew every time."""
    target = folder / "model"
    if not _sound:
        rs.save(packed_model("uniform(bits=4, group=20)"), target)
        header = tensorfile.read_header(target / checkpoint.WEIGHTS)
        with (target / checkpoint.WEIGHTS).open("rb") as file:
            found = {n: tensorfile.read_tensor(header, e, file) for n, e in header.entries.items()}
        tensorfile.write(target / checkpoint.WEIGHTS, found, {})
        for name in (checkpoint.CONFIG, checkpoint.WEIGHTS):
            _sound[name] = (target / name).read_bytes()
    target.mkdir(exist_ok=True)
    for name, raw in _sound.items():
        (target / name).write_bytes(raw)
    return target


def _sharded(folder: Path) -> Path:
    """The sound checkpoint in two shards."""
    saved, target = _saved(folder), folder / "shards"
    target.mkdir(exist_ok=True)
    header = tensorfile.read_header(saved / checkpoint.WEIGHTS)
    tensors = {n: tensorfile.read_tensor(header, e) for n, e in header.entries.items()}
    names = [shards.shard_name(i, 2) for i in range(2)]
    place = {name: names[name.startswith("0")] for name in tensors}
    for file in names:
        own = {n: t for n, t in tensors.items() if place[n] == file}
        tensorfile.write(target / file, own, {})
    (target / shards.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": place}))
    (target / checkpoint.CONFIG).write_bytes(_sound[checkpoint.CONFIG])
    return target


ENTRY = PlanEntry("0", SHAPE, rs.codec("uniform(bits=4, group=20)"), True)


def _packed_codes() -> bytes:
    return bytes(range(256)) * 16


def _some_journal(folder: Path) -> list[bytes]:
    """What a run writes that has encoded one layer."""
    place = folder / "written"
    place.mkdir(exist_ok=True)
    for file in place.iterdir():
        file.unlink()
    (place / "00000-00000.bin").write_bytes(_packed_codes())
    layer = packed_model(ENTRY.codec.spec)[0]
    names = dict(ENTRY.tensors().items())
    raw, at, tensors = _packed_codes(), 0, {}
    for name, sizes in names.items():
        own = getattr(layer, name.removeprefix("0."))
        kind = "U8" if own.dtype == torch.uint8 else "F32"
        end = at + math.prod(sizes) * own.dtype.itemsize
        digest = hashlib.sha256(raw[at:end]).hexdigest()
        tensors[name] = [kind, list(sizes), "00000-00000.bin", at, digest]
        at = end
    line = {"layer": "0", "shard": 0, "tensors": tensors, "error": 0.1, "seconds": 0.2}
    return [json.dumps(line).encode() + b"\n"]


@dataclass(frozen=True)
class Target:
    run: Callable[[bytes, Path], bool]
    seeds: Callable[[Path], list[bytes]]


def _file(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(_saved(folder) / name).read_bytes()]


def _some_codes(_: Path) -> list[bytes]:
    """For each codec: its number, then codes and params of a weight, as `codes` reads them."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    found = []
    for i, name in enumerate(sorted(REGISTRY)):
        packed = REGISTRY[name]().encode(weight)
        tensors = [packed.codes, *packed.params.values()]
        raw = b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
        found.append(bytes([i]) + raw)
    return found


TARGETS = {
    "header": Target(header, _file(checkpoint.WEIGHTS)),
    "config": Target(config, _file(checkpoint.CONFIG)),
    "weights": Target(weights, _file(checkpoint.WEIGHTS)),
    "codes": Target(codes, _some_codes),
    "index": Target(index, lambda folder: [(_sharded(folder) / shards.INDEX).read_bytes()]),
    "journal": Target(journal, _some_journal),
    "codec": Target(codec, lambda _: [REGISTRY[name]().spec.encode() for name in REGISTRY]),
    "plan": Target(plan, _some_plan),
}

"""Save and load models with compressed layers: a directory of model.safetensors and config.json.

`config.json` holds `quantization_config`: quant_method, version and the plan, one object for
each compressed layer. The plan also stands in the metadata of model.safetensors, beside a sha256 of
every tensor, so that damage is found and either file can be judged alone. Where the weights are in
several shards, each has the part of the plan that its own layers are.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import secrets
import shutil
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import shards, tensorfile
from .nn import KINDS, Compressed
from .nn.experts import unfused
from .packed import Packed, storage_dtype
from .shards import WEIGHTS
from .swap import WRONG, PlanEntry, find_layer, plan_entries, plan_of, replace
from .tensorfile import Header

METHOD = "reality_stone"
VERSION = 1
READERS = {1: "0.1.0"}  # checkpoint version -> first release that reads it
CONFIG, NOTE, MANIFEST = "config.json", "README.md", "manifest.json"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
SENTENCE_FILES = (  # of sentence-transformers; without them it pools in a way of its own
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
)  # fmt: skip
WARNING = (
    "import reality_stone before loading this with transformers, which alone only warns and gives "
    "these layers random dense weights"
)
MAX_CONFIG = 100_000_000  # bytes

# --- save ---


def save(
    model: nn.Module,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    source: str | os.PathLike[str] | None = None,
    dense_dtype: torch.dtype | None = None,
) -> Path:
    """Write the model as a checkpoint directory, whole or not at all.

    Tokenizer files come from `tokenizer` (an object with save_pretrained) or from the directory
    `source`. Float32 tensors outside compressed layers are stored as `dense_dtype` where that
    loses nothing. A checkpoint of ours under that name is replaced once the new one is complete;
    any other directory that is not empty is refused with ValueError. Raises OSError in one sentence
    when the disk does not take it; what was there before is then still there.
    """
    target = check_target(directory)
    plan = plan_of(model)
    tensors, tied = tensors_to_store(model, plan, dense_dtype)
    described = quantization(plan)
    config = _model_config(model, dense_dtype) | {"quantization_config": described}
    metadata = {METHOD: json.dumps(described), "tied": json.dumps(tied)}
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        if target.is_dir():
            _carry_over(target, part)
        if source is not None:
            copy_beside(Path(source), part)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(part))
        generation = getattr(model, "generation_config", None)
        if hasattr(generation, "to_json_string"):
            (part / "generation_config.json").write_text(generation.to_json_string())
        tensorfile.write(part / WEIGHTS, tensors, metadata)
        (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (part / NOTE).write_text(_note(plan, tensors))
        _sync(part)
        _move_into_place(part, target)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{target}: the checkpoint could not be written: {reason}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def quantization(plan: list[PlanEntry], tied: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The quantization_config of config.json; `tied` where no metadata of the weights has it."""
    config = {
        "quant_method": METHOD,
        "version": VERSION,
        "note": WARNING,
        "plan": [entry.to_config() for entry in plan],
    }
    return config | {"tied": dict(tied)} if tied else config


def check_target(directory: str | os.PathLike[str]) -> Path:
    """The absolute path to save to. Raises ValueError where `save` would refuse to write."""
    target = Path(directory).expanduser().resolve()
    if target.is_dir():
        if any(target.iterdir()) and not _is_ours(target):
            raise ValueError(
                f"{target}: this directory is not empty and holds no {METHOD} checkpoint, "
                "choose another name"
            )
    elif target.exists():
        raise ValueError(f"{target}: this is a file, a checkpoint is a directory")
    elif not target.name:
        raise ValueError(f"{target}: this is no name for a directory")
    parent = next(p for p in target.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{target}: nothing can be written in {parent}")
    return target


def _is_ours(directory: Path) -> bool:
    try:
        config = json.loads((directory / CONFIG).read_text())
        return config["quantization_config"]["quant_method"] == METHOD
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def tensors_to_store(
    model: nn.Module, plan: list[PlanEntry], dense_dtype: torch.dtype | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What to store, tied tensors once; and {name left out: name stored} for the tied."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if hasattr(tensor, "device_mesh"):
            raise ValueError(
                f"tensor {name!r} is divided over ranks: save inside `with "
                "reality_stone.parallel.gathered(model):`"
            )
    packed: dict[str, Tensor] = {}
    for entry in plan:
        if getattr(model.get_submodule(entry.name), "adapter", None) is not None:
            raise ValueError(
                f"layer {entry.name!r} has an adapter, which is no part of a checkpoint: write it "
                "with nn.lora.save_adapter, then take it off with remove_lora or merge"
            )
        layer = model.get_submodule(entry.name).packed
        if layer.codes.is_meta:
            raise ValueError(f"layer {entry.name!r} holds no data (meta device)")
        try:
            layer.check()
        except WRONG as error:
            raise ValueError(f"layer {entry.name!r} cannot be saved: {error}") from None
        packed[f"{entry.prefix}codes"] = layer.codes
        for name, value in layer.params.items():
            packed[f"{entry.prefix}{name}"] = value.to(storage_dtype(value))
    found: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(
                f"{name!r} in the model's state is no dense tensor and cannot be saved"
            )
        if tensor.is_meta:
            raise ValueError(f"tensor {name!r} holds no data (meta device)")
        kept = first.setdefault(_identity(tensor), name)
        if kept != name:
            tied[name] = kept
        elif name in packed:
            found[name] = packed[name]
        else:
            found[name] = _narrow(tensor.detach(), dense_dtype)
        if name not in tied and found[name].dtype not in tensorfile.NAMES:
            raise ValueError(f"tensor {name!r} is {tensor.dtype}, which safetensors cannot hold")
    return found, tied


def _identity(tensor: Tensor) -> tuple:
    """Equal for two names of the same memory."""
    if tensor.is_meta or not tensor.numel():
        return (id(tensor),)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _narrow(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None or tensor.dtype != torch.float32 or dtype.itemsize >= tensor.element_size():
        return tensor
    narrow = tensor.to(dtype)
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _model_config(model: nn.Module, dense_dtype: torch.dtype | None) -> dict[str, Any]:
    config = getattr(model, "config", None)
    known = json.loads(config.to_json_string()) if hasattr(config, "to_json_string") else {}
    # FSDP2 puts a class of its own before the model's.
    own = (c for c in type(model).__mro__ if not c.__module__.startswith("torch.distributed"))
    known["architectures"] = [next(own).__name__]
    if known.get("model_type"):
        dtype = dense_dtype or getattr(model, "dtype", torch.float32)
        known["dtype"] = str(dtype).removeprefix("torch.")
    return known


def _carry_over(old: Path, new: Path) -> None:
    """Keep what others put beside a checkpoint that is about to be replaced."""
    for item in old.iterdir():
        if item.name in (CONFIG, NOTE, MANIFEST) or ".safetensors" in item.name:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=False)


def copy_beside(source: Path, target: Path, names: Iterable[str] = ()) -> None:
    """The tokenizer's files, those of sentence-transformers, and others by name."""
    for name in (*TOKENIZER_FILES, *SENTENCE_FILES, *names):
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    for item in _sentence_modules(source):
        (target / item.parent.name).mkdir(exist_ok=True)
        shutil.copyfile(item, target / item.parent.name / item.name)


def _sentence_modules(source: Path) -> list[Path]:
    """Files of the directories inside `source` that modules.json names: pooling and the like."""
    try:
        modules = json.loads((source / SENTENCE_FILES[0]).read_text())
        names = [str(module["path"]) for module in modules]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    inside = [source / name for name in names if name not in ("", "..") and Path(name).name == name]
    files = [item for place in inside if place.is_dir() for item in sorted(place.iterdir())]
    return [f for f in files if f.is_file() and f.suffix in (".json", ".safetensors", ".txt")]


def _sync(directory: Path) -> None:
    """Have the bytes on the disk before the name says that they are there."""
    for item in directory.iterdir():
        if item.is_file() and not item.is_symlink():
            with item.open("rb") as file:
                os.fsync(file.fileno())


def _move_into_place(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.old")
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        if not target.exists():
            old.rename(target)
        raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


def _note(plan: list[PlanEntry], tensors: Mapping[str, Tensor]) -> str:
    stored = [entry for entry in plan if f"{entry.prefix}codes" in tensors]  # tied layers once
    weights = sum(math.prod(entry.shape) for entry in stored)
    names = [name for entry in plan for name in entry.tensors() if name in tensors]
    bits = sum(tensors[name].numel() * tensors[name].element_size() * 8 for name in names)
    rate = f" at {bits / weights:.3f} bits per weight, everything counted" if weights else ""
    return f"""# A model with layers compressed by Reality Stone

{len(plan)} layers are stored as codes{rate}. Load it with `reality-stone` installed:

```python
import reality_stone as rs
model = rs.from_pretrained("this directory")  # a language model of transformers
rs.load(model, "this directory")              # any other model, built by your own code
```

Do not load it with transformers alone: without `import reality_stone` it only warns, and gives
those layers random dense weights. `reality-stone inspect` shows what is in the files.
"""


# --- load ---


@dataclass(frozen=True)
class Checkpoint:
    """A directory whose config and headers are valid; tensors are not yet read."""

    directory: Path
    config: dict[str, Any]
    plan: list[PlanEntry]
    header: Header


def load(model: nn.Module, directory: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint into `model`, swapping its layers as the plan says; returns the model.

    Floating-point tensors outside compressed layers take the dtype that the model has. Raises
    FileNotFoundError or ValueError in one sentence, and has then changed nothing in the model.
    """
    checkpoint = open_checkpoint(directory)
    with unfused(model, [entry.name for entry in checkpoint.plan]):
        return _fill(model, checkpoint)


def _fill(model: nn.Module, checkpoint: Checkpoint) -> nn.Module:
    file = checkpoint.header.path
    try:
        names = _match(model, checkpoint)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    tensors = _read(checkpoint)
    state = model.state_dict(keep_vars=True)
    _check_ties(file, names, tensors, state)
    devices = {e.name: _device(find_layer(model, e)) for e in checkpoint.plan}
    replace(model, checkpoint.plan)
    with torch.no_grad():
        for entry in checkpoint.plan:
            layer = model.get_submodule(entry.name)
            if any(t.is_meta for t in (layer.codes, *layer.params)):
                device = devices[entry.name]
                layer.to_empty(device="cpu" if device.type == "meta" else device)
        _assign(model, names, tensors)
        _tie(model, checkpoint)
    return model


def _tie(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Codes and tables that were one tensor for several layers are one again."""
    one: dict[tuple, Tensor] = {}
    for entry in checkpoint.plan:
        layer = model.get_submodule(entry.name)
        for name, place in stored_names(checkpoint.header, entry).items():
            own = getattr(layer, name.removeprefix(entry.prefix))
            first = one.setdefault((place, own.device, own.dtype), own)
            setattr(layer, name.removeprefix(entry.prefix), first)


def open_checkpoint(directory: str | os.PathLike[str]) -> Checkpoint:
    """Check config.json and the headers of the weights. Raises as `load` does."""
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory")
    config = read_config(directory)
    plan = read_plan(directory / CONFIG, config.get("quantization_config"))
    header = with_ties(shards.read(directory), config["quantization_config"])
    problems = written_otherwise(header, config["quantization_config"])
    if problems:
        raise ValueError(problems[0])
    check_sizes(header, plan)
    return Checkpoint(directory, config, plan, header)


def written_otherwise(header: Header, quantization: Any) -> list[str]:
    """A sentence for each file that was written with another plan than that of config.json."""
    if not header.shards:
        same = METHOD not in header.metadata or header.record(METHOD) == quantization
        wrong = [] if same else [header]
    else:
        wrong = [
            shard
            for shard in header.shards
            if METHOD in shard.metadata
            and shard.record(METHOD) != part_of_plan(quantization, shard.entries)
        ]
    return [
        f"{shard.path}: the plan it was written with is not the one in {CONFIG}" for shard in wrong
    ]


def part_of_plan(quantization: Any, names: Container[str]) -> Any:
    """A quantization_config with those layers only whose codes are among `names`."""
    plan = quantization.get("plan") if isinstance(quantization, dict) else None
    if not isinstance(plan, list):
        return quantization
    own = [
        value
        for value in plan
        if isinstance(value, dict) and f"{value.get('name')}.codes".lstrip(".") in names
    ]
    return {**quantization, "plan": own}


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a model directory as an object."""
    path = directory / CONFIG
    config = tensorfile.read_json(path, MAX_CONFIG)
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a configuration must be a JSON object")
    return config


def read_plan(path: Path, quantization: Any) -> list[PlanEntry]:
    """The plan of a quantization_config. `path` is for the message. Raises ValueError."""
    if not isinstance(quantization, dict):
        raise ValueError(f"{path}: without quantization_config this is no {METHOD} checkpoint")
    method, version = quantization.get("quant_method"), quantization.get("version")
    if method != METHOD:
        raise ValueError(f"{path}: quant_method must be {METHOD!r}, got {method!r:.200}")
    if type(version) is not int or version not in READERS:
        raise ValueError(
            f"{path}: the checkpoint has version {version!r:.50}; this release reads version "
            f"{VERSION} (reality-stone {READERS[VERSION]} and later), a newer release may read it"
        )
    plan = quantization.get("plan")
    if not isinstance(plan, list):
        raise ValueError(f"{path}: the plan must be a list, got {plan!r:.200}")
    try:
        return plan_entries(plan)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_tied(quantization: Any) -> dict[str, str]:
    """{tensor not stored: the one it shares memory with} of a quantization_config."""
    tied = quantization.get("tied") if isinstance(quantization, dict) else None
    named = isinstance(tied, dict) and all(isinstance(v, str) for v in tied.values())
    return tied if named else {}


def with_ties(header: Header, quantization: Any) -> Header:
    """The header with the tied tensors of the config where it records none of its own."""
    tied = read_tied(quantization)
    if not tied or "tied" in header.metadata:
        return header
    return dataclasses.replace(header, metadata=header.metadata | {"tied": json.dumps(tied)})


def check_sizes(header: Header, plan: list[PlanEntry]) -> None:
    """Codes and params of every layer are there in the dtype and shape that the plan needs."""
    for entry in plan:
        coded = {f"{entry.prefix}{p.name}" for p in entry.codec.params(entry.shape) if p.codes}
        coded.add(f"{entry.prefix}codes")
        places = stored_names(header, entry)
        for name, shape in entry.tensors().items():
            have = header.entries.get(places[name])
            if have is None:
                raise ValueError(f"{header.path}: tensor {name!r} is missing, the plan needs it")
            wanted = ("U8",) if name in coded else ("F16", "F32", "BF16")
            if tensorfile.NAMES[have.dtype] not in wanted or have.shape != tuple(shape):
                raise ValueError(
                    f"{header.path}: tensor {name!r} is {_text(have.dtype, have.shape)}, "
                    f"{entry.codec.spec} needs {' or '.join(wanted)} {list(shape)}"
                )


def stored_names(header: Header, entry: PlanEntry) -> dict[str, str]:
    """{tensor of the layer: its name in the file}. What layers share is stored once."""
    names = {name: name for name in entry.tensors()}
    absent = [name for name in names if name not in header.entries]
    tied = header.record("tied") if absent else None
    for name in absent if isinstance(tied, dict) else ():
        first = tied.get(name)
        names[name] = first if isinstance(first, str) else name
    return names


def _match(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """{name in the model: name in the file} of every tensor, with all names and shapes checked."""
    entries, plan = checkpoint.header.entries, checkpoint.plan
    state = model.state_dict(keep_vars=True)
    packed: dict[str, str] = {}
    for entry in plan:
        layer = find_layer(model, entry)
        if layer is model and not (isinstance(layer, Compressed) and layer.codec == entry.codec):
            raise ValueError("the model is itself the layer to swap: put it into a module first")
        # Under all its names, where the model uses the layer more than once.
        for name, module in model.named_modules(remove_duplicate=False):
            if module is layer:
                prefix = f"{name}." if name else ""
                for own in list(layer.state_dict(keep_vars=True)):
                    if own not in KINDS[entry.kind].kept:
                        state.pop(prefix + own, None)
                for own, stored in stored_names(checkpoint.header, entry).items():
                    packed[prefix + own.removeprefix(entry.prefix)] = stored
    tied = checkpoint.header.record("tied")
    tied = tied if isinstance(tied, dict) else {}
    present = {_identity(t): name for name, t in state.items() if name in entries and _is_tensor(t)}
    names = dict(packed)
    for name, tensor in state.items():
        stored = name
        if name not in entries:
            stored = tied.get(name) or (_is_tensor(tensor) and present.get(_identity(tensor)))
        if not isinstance(stored, str) or stored not in entries:
            raise ValueError(f"tensor {name!r} of the model is missing")
        have = entries[stored]
        floats = have.dtype.is_floating_point and tensor.is_floating_point()
        if have.shape != tuple(tensor.shape) or not (floats or have.dtype == tensor.dtype):
            raise ValueError(
                f"tensor {stored!r} is {_text(have.dtype, have.shape)}, the model needs "
                f"{_text(tensor.dtype, tensor.shape)}"
            )
        names[name] = stored
    extra = sorted(set(entries) - set(names.values()))
    if extra:
        raise ValueError(
            f"tensor {extra[0]!r} has no place in the model"
            + (f", nor have {len(extra) - 1} others" if len(extra) > 1 else "")
        )
    return names


def _device(layer: nn.Module) -> torch.device:
    return next(t.device for t in (*layer.buffers(), *layer.parameters()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _text(dtype: torch.dtype, shape: Iterable[int]) -> str:
    return f"{tensorfile.NAMES.get(dtype, dtype)} {list(shape)}"


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All tensors; those of compressed layers are valid codes and finite params."""
    header = checkpoint.header
    tensors = {n: tensorfile.read_tensor(header, e) for n, e in header.entries.items()}
    for entry in checkpoint.plan:
        check_layer(header, entry, tensors)
    return tensors


def check_layer(header: Header, entry: PlanEntry, tensors: Mapping[str, Tensor]) -> Packed:
    """The layer's Packed. Raises ValueError when its codes or params are not valid."""
    path = header.path
    codes, *params = (tensors[name] for name in stored_names(header, entry).values())
    floats = [p.float() if p.is_floating_point() else p for p in params]
    names = [p.name for p in entry.codec.params(entry.shape)]
    for name, value in zip(names, floats, strict=True):
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise ValueError(
                f"{path}: tensor '{entry.prefix}{name}' holds values that are not finite"
            )
    packed = Packed(entry.codec, entry.shape, codes, dict(zip(names, floats, strict=True)))
    try:
        packed.check()
    except (*WRONG, RuntimeError) as error:
        raise ValueError(f"{path}: layer {entry.name!r}: {error}") from None
    return packed


def _check_ties(
    path: Path, names: dict[str, str], tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """One place in the model must not be given two different values."""
    given: dict[tuple, str] = {}
    for name, stored in names.items():
        if name not in state:
            continue
        first = given.setdefault(_identity(state[name]), stored)
        if first != stored and not torch.equal(tensors[first], tensors[stored]):
            raise ValueError(
                f"{path}: tensors {first!r} and {stored!r} differ, but are one in the model"
            )


def _assign(model: nn.Module, names: dict[str, str], tensors: dict[str, Tensor]) -> None:
    state = model.state_dict(keep_vars=True)
    for name, stored in names.items():
        target = state[name]
        if not target.is_meta:
            target.copy_(tensors[stored])
            continue
        made = tensors[stored].to(target.dtype, copy=True)
        if isinstance(target, nn.Parameter):
            made = nn.Parameter(made, requires_grad=target.requires_grad)
        # Wherever the empty tensor hangs: tied places stay one.
        for module in model.modules():
            for places in (module._parameters, module._buffers):
                for own, tensor in places.items():
                    if tensor is target:
                        places[own] = made

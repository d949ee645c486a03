"""The model a checkpoint is of, without data; its own names for the tensors in the files.

transformers knows how names in files, and in places tensors, become those of a model's state. Of a
directory that transformers knows nothing of, the names of the tensors are all there is to go by.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..tensorfile import Entry, Header
from .recipes import Recipe

# Patterns of layers that names alone do not make linear layers to compress.
NOT_LINEAR = (
    "*embed*", "*lm_head*", "*wte*", "*wpe*", "*shared*", "*position*", "*classifier*", "*score*",
    "output", "head",
)  # fmt: skip


def model_on_meta(config: Mapping[str, Any]) -> tuple[nn.Module | None, str]:
    """The transformers model of a configuration, or None and the reason why there is none."""
    if not config.get("model_type"):
        return None, "config.json has no model_type"
    try:
        import transformers
    except ImportError:
        return None, "transformers is not installed (pip install reality-stone[hf])"
    transformers.logging.set_verbosity_error()
    try:
        known = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = _class_of(transformers, config)(known)
        model.tie_weights()
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return None, f"transformers cannot build the model of config.json ({first:.300})"
    return model.eval(), ""


def _class_of(transformers: Any, config: Mapping[str, Any]) -> Callable[[Any], nn.Module]:
    """The class that config.json names, otherwise a causal language model."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return transformers.AutoModelForCausalLM.from_config


def recipes(model: nn.Module, header: Header) -> dict[str, Recipe]:
    """A recipe for each tensor of the state that transformers would fill from these files."""
    from transformers import conversion_mapping, core_model_loading

    mapping = conversion_mapping.get_model_conversion_mapping(model)
    renamings = [t for t in mapping if isinstance(t, core_model_loading.WeightRenaming)]
    converters = [t for t in mapping if isinstance(t, core_model_loading.WeightConverter)]
    by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Recipe] = {}
    groups: dict[str, list[tuple[str, Entry]]] = {}
    for name in sorted(header.entries, key=core_model_loading.dot_natural_key):
        entry = header.entries[name]
        renamed, pattern = core_model_loading.rename_source_key(
            name, renamings, converters, prefix, state
        )
        if renamed not in state and name in state:
            renamed, pattern = name, None
        if renamed not in state:
            continue
        if pattern is not None:
            groups.setdefault(renamed, []).append((pattern, entry))
        else:
            found[renamed] = Recipe(renamed, entry.dtype, entry.shape, (entry,), header)
    for first, parts in groups.items():
        found |= _converted(model, header, by_pattern[parts[0][0]], first, parts)
    return found


def _converted(
    model: nn.Module, header: Header, converter: Any, first: str, parts: list[tuple[str, Entry]]
) -> dict[str, Recipe]:
    """Recipes for what a converter of transformers makes of several tensors, or of one."""
    patterns, entries = [p for p, _ in parts], tuple(e for _, e in parts)

    def convert(tensors: list[Tensor]) -> dict[str, Tensor]:
        own = copy.deepcopy(converter)
        for pattern, entry, tensor in zip(patterns, entries, tensors, strict=True):
            own.add_tensor(first, entry.name, pattern, tensor)
        made = own.convert(first, model=model, config=model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    try:
        made = convert([torch.empty(e.shape, dtype=e.dtype, device="meta") for e in entries])
    except Exception as error:
        raise ValueError(
            f"{entries[0].path}: transformers cannot make {first!r} of tensor "
            f"{entries[0].name!r} and others: {error}"
        ) from None
    return {
        name: Recipe(name, tensor.dtype, tuple(tensor.shape), entries, header, convert)
        for name, tensor in made.items()
    }


def model_of_names(header: Header) -> nn.Module:
    """A model without data that has the tensors of the files; matrices are linear layers."""
    model, entries = nn.Module(), header.entries
    names = sorted(entries, key=_natural)
    covered: set[str] = set()
    for name in names:
        entry, place = entries[name], name.removesuffix(".weight")
        if place == name or len(entry.shape) != 2 or not entry.dtype.is_floating_point:
            continue
        bias = entries.get(f"{place}.bias")
        has_bias = bias is not None and bias.shape == entry.shape[:1]
        parent, _, leaf = place.rpartition(".")
        layer = nn.Linear(entry.shape[1], entry.shape[0], has_bias, device="meta")
        _at(model, parent)._modules[leaf] = layer
        covered |= {name, f"{place}.bias"} if has_bias else {name}
    for name in names:
        if name not in covered:
            place, _, own = name.rpartition(".")
            empty = torch.empty(entries[name].shape, dtype=entries[name].dtype, device="meta")
            _at(model, place)._buffers[own] = empty
    return model


def _at(model: nn.Module, path: str) -> nn.Module:
    for name in path.split(".") if path else []:
        model = model._modules.setdefault(name, nn.Module())
    return model


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key: numbers by their size."""
    return [
        (not part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in name.split(".")
    ]

"""The model a checkpoint is of, without data; its own names for the tensors in the files.

transformers knows how names in files, and in places tensors, become those of a model's state. Of a
directory that transformers knows nothing of, the names of the tensors are all there is to go by.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import hf
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
        first = hf.first_line(error)
        return None, f"transformers cannot build the model of config.json ({first:.300})"
    return model.eval(), ""


def empty_model(config: Mapping[str, Any]) -> nn.Module:
    """The transformers model of a configuration in float32; parameters have no data, buffers do.

    So it can run once its parameters are put in. Raises what transformers raises.
    """
    import transformers
    from transformers.initialization import no_init_weights

    kind = _class_of(transformers, config)
    known = transformers.AutoConfig.for_model(**config)
    with no_init_weights(), _parameters_on_meta():
        model = getattr(kind, "_from_config", kind)(known, dtype=torch.float32)
    model.tie_weights()
    return model.eval()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within, modules drop the data of a parameter as they get it; one for two stays one."""
    real = nn.Module.register_parameter

    def register(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if value is not None and not value.is_meta:
            value = nn.Parameter(value.to("meta"), value.requires_grad)
        real(module, name, value)

    nn.Module.register_parameter = register
    try:
        yield
    finally:
        nn.Module.register_parameter = real


def _class_of(transformers: Any, config: Mapping[str, Any]) -> Callable[[Any], nn.Module]:
    """The class that config.json names, otherwise a causal language model."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return hf.model_class(transformers, name) or transformers.AutoModelForCausalLM.from_config


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


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a converter of transformers makes of tensors; called with them in the order of `parts`.

    first: the name it is to make, of others the first. parts: (pattern of the converter, tensor).
    """

    model: nn.Module
    converter: Any
    first: str
    parts: tuple[tuple[str, Entry], ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(entry for _, entry in self.parts)

    def __call__(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        own = copy.deepcopy(self.converter)
        for (pattern, entry), tensor in zip(self.parts, tensors, strict=True):
            own.add_tensor(self.first, entry.name, pattern, tensor)
        made = own.convert(self.first, model=self.model, config=self.model.config)
        return {name: v[0] if isinstance(v, list) else v for name, v in made.items()}

    def only(self, number: int) -> Converted | None:
        """The same of one expert's tensors; None where experts are not merged one by one."""
        by_pattern: dict[str, list[Entry]] = {}
        for pattern, entry in self.parts:
            by_pattern.setdefault(pattern, []).append(entry)
        operations = self.converter.operations
        names = [type(operation).__name__ for operation in operations]
        merged = names[0] == "MergeModulelist" and operations[0].dim == 0
        later = all(
            name == "Concatenate" and operation.dim > 0
            for name, operation in zip(names[1:], operations[1:], strict=True)
        )
        counts = {len(entries) for entries in by_pattern.values()}
        if not merged or not later or len(counts) != 1 or number >= min(counts):
            return None
        parts = tuple((pattern, entries[number]) for pattern, entries in by_pattern.items())
        return dataclasses.replace(self, parts=parts)


def _converted(
    model: nn.Module, header: Header, converter: Any, first: str, parts: list[tuple[str, Entry]]
) -> dict[str, Recipe]:
    """Recipes for what a converter makes of several tensors, or of one."""
    convert = Converted(model, converter, first, tuple(parts))
    entries = convert.entries
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


def expert(fused: Recipe, number: int) -> tuple[Recipe, int]:
    """A recipe that has one expert, and at which index of its first dimension.

    Files mostly hold experts one by one, and a model all of them in one tensor: then the recipe is
    of that expert's own tensors, and it is alone.
    """
    own = fused.convert.only(number) if isinstance(fused.convert, Converted) else None
    if own is None:
        return fused, number
    shape = (1, *fused.shape[1:])
    return dataclasses.replace(fused, parts=own.entries, convert=own, shape=shape), 0


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

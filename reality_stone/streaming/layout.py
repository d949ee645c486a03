"""What a dense model directory holds and how a compressed one follows from it, without its weights.

The model of config.json is built on the meta device: it knows which weights belong to linear
layers, what is tied and what its state is called.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoint, shards, tensorfile
from ..codecs import Codec
from ..compress import Report, cover
from ..layer_plan import Plan
from ..nn import RBEExperts
from ..nn.experts import unfused
from ..swap import PlanEntry, replace
from ..targets import SMALLEST, choose, kind_of, tied_heads
from ..tensorfile import Header
from . import naming
from .recipes import Recipe


class NeedsWholeModel(ValueError):
    """What is asked for can be done in memory only; the message says why."""


@dataclass(frozen=True)
class Target:
    """A matrix to encode; `index` counts them in the order of the model."""

    entry: PlanEntry
    weight: Recipe
    index: int


@dataclass(frozen=True)
class Layout:
    """What the packed checkpoint will hold.

    recipes: the dense tensors of the model's state. names: the state of the packed model, each with
    the first name of the same tensor. report: what stays dense and why, still without layers.
    left_out: tensors of the files that the model has no place for.
    """

    directory: Path
    config: dict[str, Any]
    header: Header
    targets: list[Target]
    recipes: dict[str, Recipe]
    names: dict[str, str]
    report: Report
    left_out: list[str]

    @property
    def quantization(self) -> dict[str, Any]:
        return checkpoint.quantization([target.entry for target in self.targets])


def plan_layout(
    directory: Path,
    bits: float,
    codec: str | Codec,
    plan: Plan | Sequence[tuple[str, str | Codec | None]] = (),
    skip: Sequence[str] = (),
) -> Layout:
    """Raises FileNotFoundError or ValueError in one sentence. Arguments as those of rs.compress."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory")
    config = checkpoint.read_config(directory)
    _check_dense(directory, config)
    header = shards.read(directory)
    model, reason = naming.model_on_meta(config)
    if model is None:
        warnings.warn(
            f"{directory}: {reason}; every matrix of at least {SMALLEST} weights is taken for a "
            "linear layer but those whose names are those of embeddings and output heads",
            stacklevel=2,
        )
        model = naming.model_of_names(header)
        skip = [*skip, *naming.NOT_LINEAR]
        recipes = {n: Recipe(n, e.dtype, e.shape, (e,), header) for n, e in header.entries.items()}
    else:
        recipes = naming.recipes(model, header)
    recipes = _complete(header, model, recipes)
    used = {entry.name for recipe in recipes.values() for entry in recipe.parts}
    with unfused(model):
        recipes |= _experts(model, recipes)
        choice = choose(model, bits, codec, plan, skip)
        tied = [heads for heads in tied_heads(model, choice.codecs).values() if heads]
        if tied:
            raise NeedsWholeModel(
                f"{directory}: the plan names an embedding that {tied[0][0]!r} is tied to: both "
                "are compressed together only in memory, by reality_stone.compress"
            )
        targets = [_target(model, recipes, *one, i) for i, one in enumerate(choice.codecs.items())]
        replace(model, [target.entry for target in targets])
    report = Report(skipped=choice.reasons)
    cover(model, report)
    left_out = sorted(set(header.entries) - used)
    return Layout(
        directory, config, header, targets, recipes, _first_names(model), report, left_out
    )


def _experts(model: nn.Module, recipes: Mapping[str, Recipe]) -> dict[str, Recipe]:
    """Recipes for the layers of experts that hold all of them in one tensor elsewhere."""
    found: dict[str, Recipe] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, RBEExperts):
            continue
        for matrix in module.matrices:
            fused = recipes[f"{path}.{matrix}"]
            for number in range(module.num_experts):
                one, place = naming.expert(fused, number)
                weight = one.at(place, module.is_transposed)
                found[f"{path}.{matrix}.{number}.weight"] = weight
                if module.has_bias:
                    bias = recipes[f"{path}.{matrix}_bias"].at(number, False)
                    found[f"{path}.{matrix}.{number}.bias"] = bias
    return found


def _check_dense(directory: Path, config: Mapping[str, Any]) -> None:
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    method = quantization.get("quant_method") if isinstance(quantization, dict) else None
    by = "" if method == checkpoint.METHOD else f" (quant_method is {method!r:.100})"
    raise ValueError(f"{directory}: this model is already compressed{by}, start from the dense one")


def _first_names(model: nn.Module) -> dict[str, str]:
    """{name: first name of the same tensor} of a model's state."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name: first.setdefault(id(tensor), name) for name, tensor in state.items()}


def _complete(header: Header, model: nn.Module, recipes: dict[str, Recipe]) -> dict[str, Recipe]:
    """A recipe of the right shape for every tensor of the state; one for those that are tied."""
    state, names = model.state_dict(keep_vars=True), _first_names(model)
    found: dict[str, Recipe] = {}
    for name in state:
        if name in recipes:
            first = found.setdefault(names[name], recipes[name])
            if first is not recipes[name] and not _same_bytes(first, recipes[name]):
                raise ValueError(
                    f"{header.path}: tensors {first.name!r} and {name!r} differ, but are one in "
                    "the model of config.json: set tie_word_embeddings to false there"
                )
    for name, tensor in state.items():
        recipe = found.get(names[name])
        if recipe is None:
            raise ValueError(
                f"{header.path}: tensor {name!r} of the model ({type(model).__name__}) is missing"
            )
        if recipe.shape != tuple(tensor.shape):
            raise ValueError(
                f"{header.path}: tensor {recipe.parts[0].name!r} has the shape "
                f"{list(recipe.shape)}, the model of config.json needs {list(tensor.shape)}"
            )
    return {name: found[names[name]] for name in state}


def _same_bytes(a: Recipe, b: Recipe) -> bool:
    return tensorfile.digest(a.chunks()) == tensorfile.digest(b.chunks())


def _target(
    model: nn.Module, recipes: Mapping[str, Recipe], name: str, codec: Codec, index: int
) -> Target:
    module, weight = model.get_submodule(name), recipes[f"{name}.weight"]
    kind = kind_of(module)
    if kind.kind == "conv1d":
        weight = weight.swapped()
    shape = tuple(kind.dense_weight(module).shape)
    if weight.shape != shape or len(shape) != 2:
        raise NeedsWholeModel(
            f"layer {name!r} ({type(module).__name__}) can be encoded in memory only"
        )
    if not weight.dtype.is_floating_point:
        raise ValueError(
            f"{weight.shard}: tensor {weight.parts[0].name!r} is {weight.dtype}, "
            "only floating-point weights can be compressed"
        )
    bias = getattr(module, "bias", None) is not None
    return Target(PlanEntry(name, (shape[0], shape[1]), codec, bias, kind.kind), weight, index)

"""What of a model can be compressed, what is chosen, and how much of its matrices that covers."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from .codecs import REGISTRY, Codec, Uniform
from .codecs import codec as make_codec
from .layer_plan import Plan
from .nn import KINDS, Compressed, RBEExperts

SMALLEST = 4096  # weights; below this a layer stays dense
ENOUGH = 0.9  # coverage below which compress warns


@dataclass(frozen=True)
class Candidate:
    """A dense module, its name, and the kind of layer that can stand for it."""

    name: str
    module: nn.Module
    kind: type[Compressed]


def candidates(model: nn.Module) -> Iterator[Candidate]:
    """Every dense module that some kind of layer stands for; one that appears twice under its
    first name. Fused experts count only within `nn.experts.unfused`."""
    for name, module in model.named_modules():
        kind = kind_of(module)
        if kind is not None:
            yield Candidate(name, module, kind)


def kind_of(module: nn.Module) -> type[Compressed] | None:
    """The kind of layer that stands for a dense module, if there is one."""
    return next((kind for kind in KINDS.values() if kind.replaces(module)), None)


@dataclass(frozen=True)
class Choice:
    """The codec of each layer to compress, and why each other candidate stays dense."""

    codecs: dict[str, Codec]
    reasons: dict[str, str]


ASKED = "asked for"  # the reason of layers that the caller wants dense


def choose(
    model: nn.Module,
    bits: float,
    codec: str | Codec,
    plan: Plan | Sequence[tuple[str, str | Codec | None]] = (),
    skip: Sequence[str] = (),
) -> Choice:
    """Codecs in the order to encode: embeddings and norms before all others, which can then be
    calibrated on what these give. Raises ValueError when nothing is left to compress, and on a
    Plan that names layers of another model."""
    every = sorted(candidates(model), key=lambda c: not c.kind.on_request)
    if isinstance(plan, Plan):  # says it all
        _check_patterns(plan, [c.name for c in every])
        codec, plan, skip = Uniform(), [*plan.entries, ("*", None)], ()
    if isinstance(codec, str) and codec in REGISTRY:
        default = REGISTRY[codec].at_bits(bits)
    else:
        default = make_codec(codec)
    dense = _kept_dense(model)
    # A pattern such as "model.*" is about linear layers.
    ordinary = [c.name for c in every if not c.kind.on_request]
    special = [(pattern, one) for pattern, one in plan if not fnmatch.filter(ordinary, pattern)]
    found = Choice({}, {})
    for c in every:
        rules = special if c.kind.on_request else plan
        planned = next((one for pattern, one in rules if fnmatch.fnmatchcase(c.name, pattern)), ...)
        reason = None
        small = c.kind.on_request and c.module.weight.numel() < c.kind.smallest
        if small or (c.kind.on_request and planned is ...):
            continue
        if planned is None or (
            planned is ... and any(fnmatch.fnmatchcase(c.name, p) for p in skip)
        ):
            reason = ASKED
        elif planned is ...:
            planned = default
            small = c.kind.dense_weight(c.module).numel() < SMALLEST
            reason = dense.get(c.name) or (f"below {SMALLEST} weights" if small else None)
        if reason is not None:
            found.reasons[c.name] = reason
        elif planned is not None:
            found.codecs[c.name] = make_codec(planned)
    if not found.codecs:
        raise ValueError(
            f"nothing to compress: the model has {len(found.reasons)} linear layers and all are "
            f"output heads, tied, skipped or below {SMALLEST} weights"
        )
    return found


def _check_patterns(plan: Plan, names: Sequence[str]) -> None:
    for pattern, _ in plan.entries:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"the plan names {pattern!r}, but the model has no such layer")


def plannable(
    model: nn.Module,
    plan: Sequence[tuple[str, str | Codec | None]] = (),
    skip: Sequence[str] = (),
) -> list[str]:
    """The layers that get the usual codec: named by no plan, and not kept dense."""
    return list(choose(model, 0, Uniform(), [(pattern, None) for pattern, _ in plan], skip).codecs)


def tied_heads(model: nn.Module, chosen: Collection[str]) -> dict[str, list[str]]:
    """{embedding to be compressed: the linear layers with the same weight, not chosen alone}."""
    found = {}
    for name in chosen:
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
            found[name] = [n for n, m in layers if n not in chosen and m.weight is module.weight]
    return found


def _kept_dense(model: nn.Module) -> dict[str, str]:
    """Why a module stays dense: an output head, or a weight shared with another module."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.is_meta:
            owners.setdefault(id(weight), []).append(name)
        elif isinstance(weight, Tensor) and not weight.is_meta:
            owners.setdefault(weight.data_ptr(), []).append(name)
    kept = {}
    for names in owners.values():
        for name in names if len(names) > 1 else ():
            kept[name] = f"tied to {next(n for n in names if n != name)}"
    head = _head(model)
    return kept | {n: "the output head" for n, m in model.named_modules() if m is head}


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


# --- coverage ---


@dataclass(frozen=True)
class Matrix:
    """A weight of two dimensions or more that multiplies: its name, size, and whether codes hold
    it. `reason`: why not, where that lies in the module and not in a choice."""

    name: str
    weights: int
    compressed: bool
    reason: str = ""


def matrices(model: nn.Module) -> list[Matrix]:
    """Every matrix of a model but embeddings, what is tied to them, the output head and norms.

    A parameter in a module that no kind of layer stands for counts from 4,096 weights.
    """
    head, modules = _head(model), list(model.modules())
    tables = (m for m in modules if m is head or isinstance(m, (nn.Embedding, nn.EmbeddingBag)))
    seen = {id(p) for table in tables for p in table.parameters()}
    parts = {
        id(part)
        for layer in modules
        if isinstance(layer, Compressed)
        for part in layer.modules()
        if part is not layer
    }
    # Codes of embeddings, which heads may share.
    theirs = {id(getattr(m, "codes", None)) for m in modules if getattr(m, "on_request", False)}
    known = {id(c.module) for c in candidates(model) if not c.kind.on_request}
    found = []
    for name, module in model.named_modules():
        packed = isinstance(module, Compressed) and not module.on_request
        if packed and module is not head and id(module.codes) not in theirs:
            found.append(Matrix(name, module.shape[0] * module.shape[1], True))
        if isinstance(module, Compressed) or id(module) in parts:
            continue  # what else there is in it is codes, tables and an adapter
        for own, p in module.named_parameters(recurse=False):
            if p.dim() < 2 or id(p) in seen:
                continue
            seen.add(id(p))  # a tied one counts once
            full = f"{name}.{own}" if name else own
            if id(module) in known:
                found.append(Matrix(name, p.numel(), False))
            elif RBEExperts.replaces(module):
                found.append(Matrix(full, p.numel(), False))
            elif p.numel() >= SMALLEST:
                reason = f"no layer stands for {type(module).__name__}"
                found.append(Matrix(full, p.numel(), False, reason))
    return found


def share(found: Sequence[Matrix]) -> float:
    """Compressed weights over all; 1 where there are none."""
    total = sum(m.weights for m in found)
    return sum(m.weights for m in found if m.compressed) / total if total else 1.0

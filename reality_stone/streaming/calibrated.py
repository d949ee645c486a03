"""Calibrated compression of a checkpoint, with one dense block of the model in memory at a time.

The walk is that of rs.compress (see blocks.stages), on a model whose parameters have no data but
while they are needed. Before it starts, what precedes the first block runs alone: stand-ins that
only pass hidden states on take the places of the blocks, and so every block's other arguments are
known. That is right where those do not depend on what the blocks compute, which is tried first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import blocks, hf, tensorfile
from ..blocks import Call, calls_from, find_blocks, inference, inside
from ..codecs import Codec
from ..compress import Job, LayerReport, Report, work
from ..nn.experts import unfused
from ..targets import kind_of
from . import journal, naming
from .journal import Journal, Record
from .layout import Layout, NeedsWholeModel
from .weights import Weights

# What a model raises that is asked for data it does not have, or run with other than its blocks.
WRONG = (RuntimeError, TypeError, AttributeError, LookupError)


@dataclass
class Calibrated:
    """A model that can run block by block, the calls it is calibrated on, and their sha256."""

    layout: Layout
    model: nn.Module
    calls: list[Call]
    digest: str
    output: Callable[[Tensor], Any]  # hidden states in the form in which blocks return them

    @classmethod
    def prepare(cls, layout: Layout, tokens: Tensor, batch: int) -> Calibrated:
        """Raises ValueError on tokens that the model has no row for; NeedsWholeModel."""
        calls = calls_from(tokens, batch)
        model = _empty_model(layout)
        hf.check_tokens(model, tokens, layout.directory)
        digest = hashlib.sha256(f"{tuple(tokens.shape)} {batch} ".encode())
        digest.update(tensorfile.as_bytes(tokens.long()))
        with unfused(model), inference(model):
            try:
                output = _try(layout, model, calls[0])
            except WRONG as error:
                raise _needs_whole(layout, f"a pass without it fails ({_first(error)})") from error
        return cls(layout, model, calls, digest.hexdigest(), output)

    def encode(
        self,
        kept: Journal,
        shard_of: Callable[[str], int],
        tables: Mapping[Codec, dict[str, Tensor]],
        seed: int,
        bar: tqdm,
    ) -> None:
        """Keep every layer in the journal. tables: those that layers of a codec share."""
        records = kept.read()
        if len(records) == len(self.layout.targets):
            bar.update(len(records))
            return
        chosen = {target.entry.name: target.entry.codec for target in self.layout.targets}
        with unfused(self.model), inference(self.model), torch.no_grad():
            weights = Weights(self.model, self.layout.recipes)
            job = _KeptJob(self.model, chosen, seed, bar, tables, weights, kept, shard_of)
            work(job, self.calls, walk=_Walk(job, self.output))


class _KeptJob(Job):
    """A job that has each layer in the journal, and encodes none that is there."""

    def __init__(
        self,
        model: nn.Module,
        chosen: Mapping[str, Codec],
        seed: int,
        bar: tqdm,
        tables: Mapping[Codec, dict[str, Tensor]],
        weights: Weights,
        kept: Journal,
        shard_of: Callable[[str], int],
    ):
        super().__init__(model, chosen, seed, Report(), bar, given=dict(tables))
        self.weights, self.kept, self.shard_of = weights, kept, shard_of
        self.records = kept.read()

    def replace(
        self,
        name: str,
        hessian: Tensor | None,
        outputs: Tensor | None = None,
        calibrated: bool = False,
    ) -> None:
        dense = self.model.get_submodule(name)
        self.weights.fill(dense, name)  # what is not in a block, or encoded before them
        record = self.records.get(name)
        packed = None if record is None else self.kept.load(record)
        if record is None or packed is None:
            super().replace(name, hessian, outputs, calibrated)
            packed, told = self.model.get_submodule(name).packed, self.report.layers[-1]
            self.kept.add(
                packed, name, self.shard_of(name), told.error, told.seconds, told.hessian_error
            )
        else:
            self.put(dense, kind_of(dense).in_place_of(dense, packed))
            self.count(record, reached=not calibrated or hessian is not None)
        self.weights.drop([dense])

    def count(self, record: Record, reached: bool) -> None:
        """Of a layer encoded before: the seeds of others follow from how many there are."""
        name, codec = record.layer, self.chosen[record.layer]
        shape = self.kept.plan[name].shape
        rate = record.bits / max(1, shape[0] * shape[1])
        self.report.layers.append(
            LayerReport(
                name, shape, codec.spec, rate, record.error, record.hessian_error, record.seconds
            )
        )
        if not reached:
            self.unreached.append(name)
        self.bar.update()


class _Walk(blocks.Walk):
    """A walk that loads and drops blocks, and goes on where the journal has hidden states."""

    def __init__(self, job: _KeptJob, output: Callable[[Tensor], Any]):
        self.job, self.output, self.place = job, output, job.kept.directory
        self.names: Sequence[str] = ()

    def block_calls(
        self, model: nn.Module, names: Sequence[str], calls: Sequence[Call]
    ) -> list[list[Call]] | None:
        self.names = names
        with (
            self.job.weights.around(names),
            _stand_ins(model, names, lambda hidden: self.output(hidden.clone())),
        ):
            found = blocks.block_calls(model, names, calls)
        if found is None:
            raise NeedsWholeModel("calibration needs the whole model in memory: its blocks differ")
        return found

    def begin(self, hidden: list[Tensor]) -> int:
        done, kept = journal.kept_hidden(self.place)
        told = {layer.name for layer in self.job.report.layers}
        past = [
            name
            for name in self.job.chosen
            if name not in told and any(inside(name, block) for block in self.names[:done])
        ]
        fits = [h.shape for h in kept] == [h.shape for h in hidden]
        if not fits or not all(name in self.job.records for name in past):
            return 0
        for name in past:
            record = self.job.records[name]
            self.job.count(record, reached=record.hessian_error is not None)
        hidden[:] = kept
        return done

    def block(self, name: str) -> AbstractContextManager[None]:
        return self.job.weights.block(name)

    def carried(self, done: int, hidden: Sequence[Tensor]) -> None:
        journal.keep_hidden(self.place, done, hidden)


def _empty_model(layout: Layout) -> nn.Module:
    try:
        return naming.empty_model(layout.config)
    except Exception as error:
        raise _needs_whole(layout, f"no model can be built ({_first(error)})") from error


def _try(layout: Layout, model: nn.Module, call: Call) -> Callable[[Tensor], Any]:
    """The form of what the blocks return, if a model can run block by block."""
    targets = {t.entry.name: model.get_submodule(t.entry.name) for t in layout.targets}
    targets = {name: module for name, module in targets.items() if not kind_of(module).on_request}
    names = find_blocks(model, targets)
    if names == [""]:
        raise _needs_whole(layout, "it has no blocks that are alike")
    outside = [n for n in targets if not any(inside(n, block) for block in names)]
    if outside:
        raise _needs_whole(layout, f"{outside[0]!r} is calibrated outside the blocks")
    _check_apart(layout, model, names)
    weights = Weights(model, layout.recipes)
    with torch.no_grad(), weights.around(names):
        output = _form(layout, weights, names[0], call)
        seen = []
        for change in (torch.clone, lambda h: h.flip(-1) + 1):
            with _stand_ins(model, names, lambda h, change=change: output(change(h))):
                seen.append(blocks.block_calls(model, names, [call]))
    if seen[0] is None or seen[1] is None:
        raise _needs_whole(layout, "its blocks pass on more than hidden states")
    for one, other in zip(seen[0][0], seen[1][0], strict=True):
        hidden = one.args[0] is not None
        if hidden and one.args[0].is_meta:
            raise _needs_whole(layout, "what is before its blocks cannot run alone")
        if not (_same(one.args[1:], other.args[1:]) and _same_named(one.kwargs, other.kwargs)):
            raise _needs_whole(layout, "arguments of its blocks depend on the blocks before")
    return output


def _check_apart(layout: Layout, model: nn.Module, names: Sequence[str]) -> None:
    """Blocks must not share modules with each other or the rest."""
    owner: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        block = next((b for b in names if inside(name, b)), "")
        if owner.setdefault(id(module), block) != block:
            raise _needs_whole(layout, f"module {name!r} is used in more than one block")


def _form(layout: Layout, weights: Weights, name: str, call: Call) -> Callable[[Tensor], Any]:
    """How a block, which is run for it, returns hidden states."""
    found = []

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        found.append(output)
        raise blocks.Stop

    with weights.block(name):
        handle = weights.model.get_submodule(name).register_forward_hook(leave)
        try:
            with suppress(blocks.Stop):
                call.on(weights.model)
        finally:
            handle.remove()
    if found and isinstance(found[0], Tensor):
        return lambda hidden: hidden
    if found and isinstance(found[0], tuple) and all(other is None for other in found[0][1:]):
        others = found[0][1:]
        return lambda hidden: (hidden, *others)
    raise _needs_whole(layout, "its blocks return more than hidden states")


@contextmanager
def _stand_ins(
    model: nn.Module, names: Sequence[str], output: Callable[[Tensor], Any]
) -> Iterator[None]:
    """Within, blocks compute nothing but `output` of the hidden states."""
    found = [model.get_submodule(name) for name in names]
    for block in found:
        block.forward = lambda hidden, *args, **kwargs: output(hidden)
    try:
        yield
    finally:
        for block in found:
            del block.forward


def _same(a: Any, b: Any) -> bool:
    """Whether arguments are of equal values, all of a kind that nothing can be written to."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return not a.is_meta and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, tuple):
        return isinstance(b, tuple) and len(a) == len(b) and all(map(_same, a, b))
    return (a is None or isinstance(a, (bool, int, float, str))) and a == b


def _same_named(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)


def _needs_whole(layout: Layout, reason: str) -> NeedsWholeModel:
    return NeedsWholeModel(
        f"{layout.directory}: calibration needs the whole model in memory: {reason}"
    )


def _first(error: Exception) -> str:
    return hf.first_line(error)[:300]

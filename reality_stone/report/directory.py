"""The page of one packed directory: what it holds, how far it is from the dense model, how fast."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from .. import bench, show
from .bars import Bar, bar_chart
from .curves import Log, training_curves
from .machine import machine
from .maps import Key, block_map
from .measuring import BATCHES, OUTPUT_TOKENS, Measured, Request, measure
from .page import Section, check_page, facts, html_report, percent, sentences, table, tiles

NAMED = 30  # tensors left dense that are listed by name


def report_directory(
    request: Request, path: str | os.PathLike[str], date: str = "", progress: bool = True
) -> Measured:
    """Measure a packed directory and write its page; what cannot be written is said first."""
    check_page(path)
    found = measure(request, progress)
    directory_page(path, found, date=date)
    return found


def directory_page(
    path: str | os.PathLike[str], found: Measured, title: str = "", date: str = ""
) -> Path:
    """Write the page of what `measure` found. The same measurements give the same bytes."""
    details = {"Model": f"{found.name}, {found.architecture}"}
    return html_report(
        path,
        title or f"{found.name}, compressed",
        _summary(found),
        *_sizes(found),
        *_layers(found),
        _quality(found),
        *_speed(found),
        *_training(found),
        _table(found),
        _left_out(found),
        facts("How and where this was measured", details | machine(date)),
        lead=_lead(found),
    )


def _lead(found: Measured) -> str:
    contents = found.contents
    weights = sum(out * n for out, n in (layer.shape for layer in contents.layers))
    codecs = Counter(show.codec(layer.codec) for layer in contents.layers)
    used = ", ".join(name for name, _ in codecs.most_common(3))
    more = f" and {len(codecs) - 3} more" if len(codecs) > 3 else ""
    text = (
        f"{len(contents.layers)} matrices of {weights:,} weights are stored at "
        f"{contents.bits_per_weight:.3f} bits each, everything counted: {used}{more}."
    )
    if not contents.sound:
        text += " The file is damaged: see what was left out."
    return text


def _summary(found: Measured) -> Section:
    before, after = (sum(getattr(s, key) for s in found.sizes) for key in ("before", "after"))
    rate, item = found.contents.bits_per_weight, getattr(torch, found.dtype).itemsize
    matrices = f"compressed matrices {8 * item / rate:.2f} times smaller" if rate else ""
    ratio = f", {before / after:.2f} times smaller" if after else ""
    cards = [
        ("Bits per weight", f"{rate:.3f}", matrices),
        ("All tensors", show.size(after), f"{show.size(before)} dense{ratio}"),
    ]
    if found.quality is not None:
        packed, dense = found.quality.packed, found.quality.dense
        beside = "" if dense is None else f"{dense.perplexity:.3f} dense, x {_ratio(found):.4f}"
        cards.append(("Perplexity", f"{packed.perplexity:.3f}", beside))
        if packed.kl is not None:
            cards.append(("KL from dense", f"{packed.kl:.5f}", "nats per token"))
    elif found.errors:
        mean = sum(found.errors.values()) / len(found.errors)
        cards.append(("Error of weights", percent(mean), "mean over the matrices"))
    return tiles("In short", cards)


def _ratio(found: Measured) -> float:
    return found.quality.packed.perplexity / found.quality.dense.perplexity


def _sizes(found: Measured) -> list[Section]:
    known = "weights" not in found.gaps or bool(found.errors)
    whence = "the dense model's files" if known else f"the same tensors in {found.dtype}"
    bars = [
        Bar("dense", {s.group: s.before for s in found.sizes if s.before or s.after}),
        Bar("packed", {s.group: s.after for s in found.sizes if s.before or s.after}),
    ]
    rows = [
        (
            s.group, show.size(s.before), show.size(s.after),
            f"{s.before / s.after:.2f} x" if s.before and s.after else "",
            f"{s.weights:,}", str(s.tensors),
        )
        for s in found.sizes
    ]  # fmt: skip
    note = f"Before: {whence}. A matrix with its codes, scales and tables counts as one tensor."
    columns = ("part", "before", "after", "smaller", "weights", "tensors")
    chart = bar_chart("Size by part of the model", bars, "bytes of all tensors", show.size)
    return [Section(chart.title, chart.body + table("Sizes", columns, rows, note).body)]


BITS = Key("Bits per weight, everything counted", lambda value: f"{value:.2f}", whole=True)
WEIGHTS = Key("Normalised squared error of the weight, |W - Q|² / |W|²", percent, log=True)
OUTPUTS = Key("Normalised squared error of the output, E|(W - Q) x|² / E|W x|²", percent, log=True)
ALONE = (
    "x is what reaches the layer in the dense model over the first tokens of the text (up to "
    f"{OUTPUT_TOKENS:,}), so each layer is judged alone."
)


def _layers(found: Measured) -> list[Section]:
    rates = {layer.name: layer.bits_per_weight for layer in found.contents.layers}
    maps = [block_map("Bits of each layer", rates, BITS)]
    for title, gap, values, key, note in (
        ("Error of the weights", "weights", found.errors, WEIGHTS, ""),
        ("Error of the outputs", "outputs", found.output_errors, OUTPUTS, ALONE),
    ):
        why = found.gaps.get(gap, "The dense model has no layers by these names.")
        maps.append(block_map(title, values, key, note) if values else sentences(title, why))
    return maps


def _quality(found: Measured) -> Section:
    title = "Perplexity"
    if found.quality is None:
        return sentences(title, found.gaps["quality"])
    packed, dense = found.quality.packed, found.quality.dense
    rows = []
    if dense is not None:
        rows.append(("dense", f"{dense.perplexity:.3f}", "1.0000", ""))
    ratio = "" if dense is None else f"{_ratio(found):.4f}"
    kl = "" if packed.kl is None else f"{packed.kl:.5f}"
    rows.append(("packed", f"{packed.perplexity:.3f}", ratio, kl))
    note = f"Protocol: {found.quality.protocol}."
    if packed.kl is not None:
        note += " KL(dense || packed) in nats per token."
    else:
        note += " Without the dense model (--reference) there is nothing to compare it with."
    return table(title, ("model", "perplexity", "to dense", "KL"), rows, note)


def _speed(found: Measured) -> list[Section]:
    if not found.speed:
        return [sentences("Speed", found.gaps.get("speed", "There is no matrix to time."))]
    return [_speed_chart(found.speed, batch) for batch in BATCHES] + [_speed_table(found.speed)]


def _speed_chart(results: Sequence[bench.Result], batch: int) -> Section:
    bars = [
        Bar(f"{_shape(r.shape)}, {show.codec(r.what)}", {"speed": r.speedup})
        for r in results
        if r.batch == batch and not r.what.startswith("torch")
    ]
    what = "one token" if batch == 1 else f"{batch} tokens at once"
    return bar_chart(
        f"Speed of a product, {what}", bars, "times as fast as torch float32 (dashed)",
        lambda value: f"{value:.3g} x", level=("torch float32", 1.0),
    )  # fmt: skip


def _speed_table(results: Sequence[bench.Result]) -> Section:
    rows = [
        (
            f"{_shape(r.shape)}, batch {r.batch}", show.codec(r.what), f"{r.bits_per_weight:.3f}",
            f"{r.seconds * 1e3:.4f}", f"{100 * r.spread:.0f} %", f"{r.speedup:.2f}",
        )
        for r in results
    ]  # fmt: skip
    first = results[0]
    note = (
        f"Forward, {first.threads} threads, {first.isa}; median of interleaved turns, spread is "
        "half of the middle 80 %. Copies of the weights rotate and exceed three times the cache. "
        "Codes are made up: what a product takes does not depend on them."
    )
    columns = ("matrix", "what", "b/w", "ms", "spread", "torch fp32 x")
    return table("Every time that was taken", columns, rows, note)


def _training(found: Measured) -> list[Section]:
    if not found.logs:
        return [sentences("Training", found.gaps["training"])]
    sections = []
    for log in found.logs:
        name = f"{log.name}, {log.mode}" if log.mode != "training" else log.name
        sections += training_curves(name, [(log.mode, log.training)])
    rows = [
        (log.name, _change(log, "perplexity", ".3f"), _change(log, "kl", ".5f"))
        for log in found.logs
        if log.before and log.after
    ]
    if rows:
        columns = ("training", "perplexity", "KL")
        sections.append(table("Before and after training", columns, rows))
    return sections


def _change(log: Log, key: str, form: str) -> str:
    before, after = log.before.get(key), log.after.get(key)
    return "" if before is None or after is None else f"{before:{form}} to {after:{form}}"


def _table(found: Measured) -> Section:
    rows = [
        (
            layer.name, _shape(layer.shape), show.codec(layer.codec),
            f"{layer.bits_per_weight:.3f}", show.size(layer.bytes),
            _known(found.errors, layer.name), _known(found.output_errors, layer.name),
        )
        for layer in found.contents.layers
    ]  # fmt: skip
    columns = ("layer", "shape", "codec", "b/w", "bytes", "weight error", "output error")
    return table("Every layer", columns, rows)


def _known(values: dict[str, float], name: str) -> str:
    return percent(values[name]) if name in values else ""


def _left_out(found: Measured) -> Section:
    contents = found.contents
    entries = [*contents.layers, *contents.others]
    texts = [*contents.problems, *(entry.problem for entry in entries if entry.problem)]
    dense = [other.name for other in contents.others if len(other.shape) >= 2]
    if dense:
        names = ", ".join(dense[:NAMED]) + (", ..." if len(dense) > NAMED else "")
        texts.append(f"Left dense, of two dimensions or more ({len(dense)}): {names}.")
    lost = [layer.name for layer in contents.layers if layer.name not in found.errors]
    if found.errors and lost:
        texts.append(f"The dense model has no weight by these names: {', '.join(lost[:NAMED])}.")
    texts += found.gaps.values()
    return sentences("What was left out", *dict.fromkeys(texts or ["Nothing."]))


def _shape(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"

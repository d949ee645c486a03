"""One self-contained HTML page of measurements: tables, inline SVG plots, texts.

Nothing is loaded from outside and no plotting library is needed: plots use the page's own colours,
so they follow light and dark mode, and each says its numbers in words as well.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import takewhile
from pathlib import Path

import torch

from . import ops, show
from .compress import LayerReport, Report
from .evaluate import Evaluation
from .training import TrainingReport


@dataclass(frozen=True)
class Stage:
    """One stage of a recipe: the model as measured after it, and how it was trained."""

    name: str
    evaluation: Evaluation
    training: TrainingReport | None = None


@dataclass(frozen=True)
class Trial:
    """One model as it was measured; `compression` and `training` where it had them, or `stages`
    where it was trained in several.

    matrix_bytes: what is stored for the compressed matrices; file_bytes: the whole checkpoint.
    """

    name: str
    bits_per_weight: float
    matrix_bytes: int
    file_bytes: int
    evaluation: Evaluation
    tokens_per_second: float
    text: str
    compression: Report | None = None
    training: TrainingReport | None = None
    stages: Sequence[Stage] = ()


@dataclass(frozen=True)
class Section:
    """A heading and the HTML under it."""

    title: str
    body: str


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a plot; `line` joins them, `labels` writes y beside each."""

    name: str
    points: Sequence[tuple[float, float]]
    line: bool = True
    labels: bool = False


def html_report(
    path: str | os.PathLike[str], title: str, *sections: Section, lead: str = ""
) -> Path:
    """Write the page, whole or not at all, and return its path. `lead` is one paragraph of text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    opening = f"<p class=lead>{escape(lead)}</p>" if lead else ""
    body = "".join(f"<section><h2>{escape(s.title)}</h2>{s.body}</section>\n" for s in sections)
    part = path.with_name(path.name + ".part")
    part.write_text(
        "<!doctype html>\n<html lang=en>\n<head>\n<meta charset=utf-8>\n"
        '<meta name=viewport content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n"
        f"<body>\n<main>\n<h1>{escape(title)}</h1>{opening}\n{body}</main>\n</body>\n</html>\n",
        encoding="utf-8",
    )
    os.replace(part, path)
    return path


COLUMNS = ("model", "b/w", "perplexity", "to dense", "KL", "matrices", "file", "tokens/s")


def trial_rows(trials: Sequence[Trial]) -> list[tuple[str, ...]]:
    """The cells of COLUMNS; the first trial is the dense model the others are compared with."""
    base = trials[0].evaluation.perplexity
    return [
        (
            t.name,
            f"{t.bits_per_weight:.3f}",
            f"{t.evaluation.perplexity:.3f}",
            f"{t.evaluation.perplexity / base:.4f}",
            "" if t.evaluation.kl is None else f"{t.evaluation.kl:.5f}",
            show.size(t.matrix_bytes),
            show.size(t.file_bytes),
            f"{t.tokens_per_second:.0f}",
        )
        for t in trials
    ]


def model_report(
    path: str | os.PathLike[str],
    title: str,
    trials: Sequence[Trial],
    prompt: str,
    details: Mapping[str, str],
) -> Path:
    """The page of a model at several rates: `trials` begins with the dense one.

    `details` (command, data, time) are shown beside the description of the machine.
    """
    dense, *others = trials
    trained = [t for t in others if t.training is not None or t.stages]
    one_shot = [t for t in others if t not in trained]
    judged = dense.evaluation
    smallest = min(t.matrix_bytes for t in others)
    best = min(
        (t for t in others if t.matrix_bytes < 1.01 * smallest),
        key=lambda t: t.evaluation.perplexity,
    )
    lead = (
        f"{best.name}: {dense.matrix_bytes / best.matrix_bytes:.1f} times smaller matrices at "
        f"{best.bits_per_weight:.3f} bits per weight, everything counted; perplexity "
        f"{best.evaluation.perplexity:.3f}, dense {judged.perplexity:.3f}."
    )
    plots = [
        line_plot(
            "Perplexity by rate",
            [
                Series(
                    name,
                    sorted((t.bits_per_weight, t.evaluation.perplexity) for t in group),
                    labels=True,
                )
                for name, group in (("one shot", one_shot), ("tables trained", trained))
                if group
            ],
            "bits per weight",
            "perplexity",
            ("dense", judged.perplexity),
        )
    ]
    for t in trained:
        plots += training_sections(
            t.name, t.stages or [Stage("training", t.evaluation, t.training)]
        )
    compressions = {t.name: t.compression for t in one_shot if t.compression is not None}
    return html_report(
        path,
        title,
        table(
            "Summary",
            COLUMNS,
            trial_rows(trials),
            "b/w, matrices: all that is stored for the compressed matrices (codes, scales, tables, "
            "padding). file: the whole checkpoint, dense embedding included. Perplexity over "
            f"{judged.tokens:,} tokens in cold windows of {judged.context}. KL(dense || model) in "
            "nats per token. tokens/s: greedy generation of one sequence with KV cache, median "
            "over turns.",
        ),
        *plots,
        layer_map("Error and bits of each layer", compressions),
        texts("Text", prompt, {t.name: t.text for t in trials if t.text}),
        facts("How and where this was measured", {**details, **machine()}),
        lead=lead,
    )


def training_sections(name: str, stages: Sequence[Stage]) -> list[Section]:
    """Losses of all stages one after the other, the blocks' before and after, and a table of what
    was measured after each stage, where there are several."""
    sections, curves, notes, at = [], [], [], 0
    for stage in stages:
        done = stage.training
        if done is None:
            continue
        label = f"{stage.name}: " if len(stages) > 1 else ""
        if done.losses or not done.blocks:
            title = f"loss of each step, {stage.name}" if label else "loss of each step"
            curves.append(Series(title, list(enumerate(done.losses, at + 1))))
            notes.append(
                f"{label}{len(done.losses)} steps, {done.tokens:,} tokens, {done.seconds:.0f} s."
            )
            at += len(done.losses)
        if done.blocks:
            kept = [b["after"] if b["accepted"] else b["before"] for b in done.blocks]
            sections.append(
                line_plot(
                    f"Block by block: {name}" + (f", {stage.name}" if label else ""),
                    [
                        Series("before", list(enumerate((b["before"] for b in done.blocks), 1))),
                        Series("after", list(enumerate(kept, 1))),
                    ],
                    "block",
                    "loss on held-out calls",
                )
            )
    if curves:
        note = " ".join(notes)
        sections.append(line_plot(f"Training: {name}", curves, "step", "nats per token", note=note))
    if len(stages) > 1:
        rows = [
            (
                stage.name,
                f"{stage.evaluation.perplexity:.3f}",
                "" if stage.evaluation.kl is None else f"{stage.evaluation.kl:.5f}",
                "" if stage.training is None else f"{stage.training.seconds:.0f}",
            )
            for stage in stages
        ]
        columns = ("after stage", "perplexity", "KL", "seconds")
        sections.append(table(f"Stages: {name}", columns, rows))
    return sections


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], note: str = ""
) -> Section:
    head = "".join(f"<th scope=col>{escape(c)}</th>" for c in columns)
    lines = "".join(
        f"<tr><th scope=row>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    grid = f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
    return Section(title, _scrolling(title, grid) + _note(note))


def facts(title: str, values: Mapping[str, str]) -> Section:
    lines = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in values.items())
    return Section(title, f"<dl>{lines}</dl>")


def texts(title: str, prompt: str, continuations: Mapping[str, str], note: str = "") -> Section:
    """The same prompt (in bold) as each model goes on from it."""
    blocks = "".join(
        f"<figure><figcaption>{escape(name)}</figcaption>"
        f"<blockquote><p><b>{escape(prompt)}</b>{escape(text)}</p></blockquote></figure>"
        for name, text in continuations.items()
    )
    return Section(title, blocks + _note(note))


def layer_map(title: str, reports: Mapping[str, Report], note: str = "") -> Section:
    """Heat map, layers down and reports across: error of each layer, bits per weight below it."""
    cells = {name: {layer.name: layer for layer in r.layers} for name, r in reports.items()}
    errors = [_error(layer) for column in cells.values() for layer in column.values()]
    if not errors:
        return Section(title, _note("No layer was compressed."))
    floor = max(min(errors), 1e-12)
    span = math.log(max(max(errors), floor) / floor) or 1.0
    names = list(dict.fromkeys(n for column in cells.values() for n in column))
    levels = zip(*(name.split(".")[:-1] for name in names), strict=False)
    shared = ".".join(level[0] for level in takewhile(lambda x: len(set(x)) == 1, levels))
    head = f"<th scope=col>layer{f' in {escape(shared)}' if shared else ''}</th>"
    head += "".join(f"<th scope=col>{escape(n)}</th>" for n in cells)
    lines = []
    for name in names:
        short = escape(name[len(shared) :].lstrip(".")).replace(".", ".<wbr>")
        row = f"<tr><th scope=row>{short}</th>"
        for column in cells.values():
            layer = column.get(name)
            if layer is None:
                row += "<td>dense</td>"
                continue
            heat = math.log(max(_error(layer), floor) / floor) / span
            row += (
                f'<td style="--heat:{heat:.2f}">{_percent(_error(layer))}'
                f"<small>{layer.bits_per_weight:.2f} b/w</small></td>"
            )
        lines.append(row + "</tr>")
    grid = (
        f"<table class=heat><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
    )
    scale = (
        "Relative squared error of a layer's output on calibration data (of the weight, where "
        "there was none); the stronger the colour, the larger, on a logarithmic scale from "
        f"{_percent(min(errors))} to {_percent(max(errors))}."
    )
    return Section(title, _scrolling(title, grid) + _note(scale) + _note(note))


def line_plot(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    reference: tuple[str, float] | None = None,
    note: str = "",
) -> Section:
    """Points and lines as SVG. `reference` (name, y) is a dashed horizontal line."""
    series = [
        Series(s.name, [p for p in s.points if all(map(math.isfinite, p))], s.line, s.labels)
        for s in series
    ]
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points] + ([reference[1]] if reference else [])
    if not xs:
        return Section(title, _note("There are no finite values to draw."))
    frame = _Frame(_ticks(min(xs), max(xs)), _ticks(min(ys), max(ys)))
    words = [
        f"{s.name}: "
        + (
            ", ".join(f"{y:.5g} at {x:.4g}" for x, y in s.points)
            if len(s.points) <= 12
            else f"from {s.points[0][1]:.5g} to {s.points[-1][1]:.5g} in {len(s.points)} points"
        )
        for s in series
        if s.points
    ]
    drawn = frame.axes(x_label, y_label)
    if reference:
        name, y = reference
        words.append(f"{name}: {y:.5g}")
        drawn += frame.level(y, f"{name} {y:.5g}")
    for i, s in enumerate(series):
        drawn += frame.series(i, s)
    legend = "".join(
        f"<li><svg viewBox='0 0 20 12' aria-hidden=true class=s{i % 3}>{_mark(i, 10, 6)}</svg>"
        f"{escape(s.name)}</li>"
        for i, s in enumerate(series)
    )
    said = escape(f"{y_label} against {x_label}. " + "; ".join(words))
    size = f"0 0 {_Frame.WIDTH} {_Frame.HEIGHT}"
    return Section(
        title,
        f"<figure><ul class=legend>{legend}</ul>"
        f'<svg class=plot viewBox="{size}" role=img aria-label="{said}">'
        f"<title>{escape(title)}</title>{drawn}</svg></figure>" + _note(note),
    )


def machine() -> dict[str, str]:
    """What the numbers of a page were measured on, and when."""
    info = ops.build_info()
    memory = 0
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "Date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        "Processor": f"{_processor()}, {os.cpu_count()} logical cores",
        "Threads": f"{torch.get_num_threads()}",
        "Instruction set": ops.isa(),
        "Memory": f"{memory / 2**30:.1f} GiB" if memory else "unknown",
        "System": platform.platform(terse=True),
        "Python, torch": f"{platform.python_version()}, {torch.__version__}",
        "Library": f"compiler {info['compiler']}" if info else "not compiled, plain torch",
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line for line in file if line.startswith("model name"))
            return name.split(":", 1)[1].strip()
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _error(layer: LayerReport) -> float:
    return layer.error if layer.hessian_error is None else layer.hessian_error


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if value >= 1e-3 else f"{100 * value:.2g} %"


def _note(text: str) -> str:
    return f"<p class=note>{escape(text)}</p>" if text else ""


def _scrolling(label: str, grid: str) -> str:
    # Focusable, so that a wide table can be scrolled from the keyboard.
    return f'<div class=scroll role=region tabindex=0 aria-label="{escape(label)}">{grid}</div>'


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers that cover the range."""
    if high <= low:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    unit = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if (high - low) / (unit * m) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _mark(kind: int, x: float, y: float) -> str:
    """Told apart by shape as well as by colour: circle, square, diamond."""
    if kind % 3 == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    if kind % 3 == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8"/>'
    return f'<path d="M{x:.1f} {y - 5.5:.1f}l5.5 5.5-5.5 5.5-5.5-5.5z"/>'


@dataclass(frozen=True)
class _Frame:
    """Maps data to the plane of the drawing; text stays legible at a phone's width."""

    x_ticks: list[float]
    y_ticks: list[float]

    WIDTH, HEIGHT = 480, 330
    LEFT, RIGHT, TOP, BOTTOM = 58, 18, 26, 48

    def x(self, value: float) -> float:
        share = (value - self.x_ticks[0]) / (self.x_ticks[-1] - self.x_ticks[0])
        return self.LEFT + share * (self.WIDTH - self.LEFT - self.RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_ticks[0]) / (self.y_ticks[-1] - self.y_ticks[0])
        return self.HEIGHT - self.BOTTOM - share * (self.HEIGHT - self.TOP - self.BOTTOM)

    def axes(self, x_label: str, y_label: str) -> str:
        right, bottom = self.WIDTH - self.RIGHT, self.HEIGHT - self.BOTTOM
        drawn = []
        for value in self.y_ticks:
            y = self.y(value)
            drawn.append(f'<path class=grid d="M{self.LEFT} {y:.1f}H{right}"/>')
            drawn.append(
                f'<text x="{self.LEFT - 6}" y="{y + 4.5:.1f}" text-anchor=end>{value:.6g}</text>'
            )
        for value in self.x_ticks:
            x = self.x(value)
            drawn.append(f'<path class=axis d="M{x:.1f} {bottom}v5"/>')
            drawn.append(
                f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor=middle>{value:.6g}</text>'
            )
        drawn.append(f'<path class=axis d="M{self.LEFT} {bottom}H{right}"/>')
        middle = (self.LEFT + right) / 2
        drawn.append(
            f'<text x="{middle:.0f}" y="{self.HEIGHT - 8}" text-anchor=middle>'
            f"{escape(x_label)}</text>"
        )
        drawn.append(f'<text x="4" y="14">{escape(y_label)}</text>')
        return "".join(drawn)

    def level(self, y: float, text: str) -> str:
        at, right = self.y(y), self.WIDTH - self.RIGHT
        return (
            f'<path class=level d="M{self.LEFT} {at:.1f}H{right}"/>'
            f'<text class=level x="{self.LEFT + 6}" y="{at - 6:.1f}">{escape(text)}</text>'
        )

    def series(self, index: int, s: Series) -> str:
        points = [(self.x(x), self.y(y)) for x, y in s.points]
        drawn = ""
        if s.line and len(points) > 1:
            path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
            drawn += f'<path class=line d="M{path}"/>'
        if len(points) <= 24:
            drawn += "".join(_mark(index, x, y) for x, y in points)
        if s.labels:
            for (x, y), (_, value) in zip(points, s.points, strict=True):
                end = "end" if x > self.WIDTH - 70 else "start"
                shift = -8 if end == "end" else 8
                side = 18 if index % 2 else -8  # every other series writes below its points
                drawn += (
                    f'<text x="{x + shift:.1f}" y="{y + side:.1f}" text-anchor={end}>'
                    f"{value:.4g}</text>"
                )
        return f"<g class=s{index % 3}>{drawn}</g>"


STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --rule: #d5dae0; --paper: #fff;
  --panel: #f5f7f9; --s0: #0b62c4; --s1: #b2460c; --s2: #2e7d32; --heat-colour: 226 120 32; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8ebee; --soft: #a0a9b4; --rule: #3a424b;
  --paper: #14171a; --panel: #1e2327; --s0: #6cb2ff; --s1: #ff9d5c; --s2: #7bd17f; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
main { max-width: 52rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
.lead { margin: 0; font-size: 1.05rem; }
.note { color: var(--soft); font-size: .88rem; margin: .6rem 0 0; max-width: 44rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
  font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .6rem; text-align: right; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td { white-space: nowrap; }
th:first-child { text-align: left; padding-left: 0; position: sticky; left: 0;
  background: var(--paper); }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
.heat { width: auto; font-size: .85rem; }
.heat th, .heat td { padding: .2rem .55rem; }
.heat tbody th { font-weight: 400; max-width: 20rem; }
.heat td { background: rgb(var(--heat-colour) / calc(.04 + .56 * var(--heat, 0)));
  border: 1px solid var(--paper); }
.heat small { display: block; color: var(--ink); opacity: .8; font-size: .72rem; line-height: 1.2; }
figure { margin: 0 0 1rem; }
figcaption { font-weight: 600; font-size: .92rem; }
blockquote { margin: .3rem 0 0; padding: .6rem .9rem; background: var(--panel);
  border-left: 3px solid var(--s0); }
blockquote p { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.plot { display: block; width: 100%; max-width: 38rem; height: auto; }
.plot text { font: 13px system-ui, sans-serif; fill: var(--ink); }
.grid { stroke: var(--rule); } .axis { stroke: var(--soft); }
path.level { stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 6 4; }
.s0 { --c: var(--s0); } .s1 { --c: var(--s1); } .s2 { --c: var(--s2); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.s0 circle, .s1 rect, .s2 path:not(.line) { fill: var(--c); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0;
  margin: 0 0 .3rem; font-size: .9rem; }
.legend svg { width: 20px; height: 12px; margin-right: .35rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; margin: 0;
  font-size: .92rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 34rem) { dl { display: block; } dd { margin: 0 0 .5rem; }
  .heat th, .heat td { padding: .2rem .3rem; } }
"""

"""Heat maps: tables whose cells are coloured, so that they are read and scrolled as tables."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ..compress import LayerReport, Report
from .colour import Scale, colour, hexadecimal, ink, scale_legend
from .page import Section, breakable, paragraph, percent, scrolling, sentences
from .structure import below, common, grid

WIDE = 12  # columns; in a map of more, cells are small and say their number when pointed at


@dataclass(frozen=True)
class Cell:
    """One field of a map: `value` chooses the colour, `text` says it, `small` stands below."""

    value: float
    text: str
    small: str = ""
    title: str = ""


@dataclass(frozen=True)
class Key:
    """What the numbers of a map are: `unit` in words, `say` writes one.

    log: coloured by their logarithm. whole: from a whole number to another, so that a narrow range
    does not look wide.
    """

    unit: str
    say: Callable[[float], str]
    log: bool = False
    whole: bool = False

    def scale(self, values: Iterable[float]) -> Scale | None:
        """The scale of the finite values, None without any."""
        found = Scale.of(values, self.log)
        if found is None or not self.whole:
            return found
        low = math.floor(found.low)
        return Scale(low, max(math.ceil(found.high), low + 1), self.log)


def heat_map(
    title: str,
    corner: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[Cell | None]],
    key: Key,
    empty: str = "",
    note: str = "",
) -> Section:
    """`rows` hold one cell a column, None where there is nothing (`empty` is written there)."""
    scale = key.scale(cell.value for row in rows.values() for cell in row if cell)
    if scale is None:
        return sentences(title, "There are no values to draw.", note)
    head = f"<th scope=col>{escape(corner)}</th>"
    head += "".join(f"<th scope=col>{escape(c)}</th>" for c in columns)
    body = "".join(
        f"<tr><th scope=row>{breakable(name)}</th>"
        + "".join(_field(cell, scale, empty) for cell in row)
        + "</tr>"
        for name, row in rows.items()
    )
    kind = "heat fine" if len(columns) > WIDE else "heat"
    table = f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    shape = "logarithmic" if scale.log and scale.low < scale.high else "linear"
    caption = f"<figcaption>{escape(key.unit)}, {shape} scale</figcaption>"
    colours = f"<figure class=key>{caption}{scale_legend(scale, key.unit, key.say)}</figure>"
    return Section(title, colours + scrolling(title, table) + paragraph(note))


def _field(cell: Cell | None, scale: Scale, empty: str) -> str:
    if cell is None:
        return f"<td class=none>{escape(empty)}</td>"
    small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
    title = f' title="{escape(cell.title)}"' if cell.title else ""
    look = 'class="cell none"'
    if math.isfinite(cell.value):
        rgb = colour(scale.share(cell.value))
        look = f'class=cell style="background:{hexadecimal(rgb)};color:{ink(rgb)}"'
    return f"<td {look}{title}><span>{escape(cell.text)}</span>{small}</td>"


def block_map(title: str, values: Mapping[str, float], key: Key, note: str = "") -> Section:
    """One value for each layer by name: kinds of layers down, blocks across, or a strip of all
    layers where the names tell of no blocks. Layers that share a place are averaged."""
    placed = grid(list(values))
    rows: dict[str, list[Cell | None]] = {}
    for kind, cells in placed.rows.items():
        rows[kind] = [_mean(names, values, key.say) if names else None for names in cells]
    notes = [note] if note else []
    if placed.blocks:
        below = f" below {placed.shared}" if placed.shared else ""
        notes.insert(0, f"Down: layers{below}; across: blocks.")
    if any(len(names) > 1 for cells in placed.rows.values() for names in cells):
        notes.append("A cell of several layers shows their mean.")
    return heat_map(title, "layer", placed.columns, rows, key, note=" ".join(notes))


def _mean(names: Sequence[str], values: Mapping[str, float], say: Callable[[float], str]) -> Cell:
    own = [values[name] for name in names]
    mean = sum(own) / len(own)
    title = f"{names[0]}: {say(mean)}"
    if len(own) > 1:
        title = f"{len(own)} layers as {names[0]}: {say(mean)}, {say(min(own))} to {say(max(own))}"
    return Cell(mean, say(mean), title=title)


def layer_map(title: str, reports: Mapping[str, Report], note: str = "") -> Section:
    """Heat map, layers down and reports across: error of each layer, bits per weight below it."""
    cells = {name: {layer.name: layer for layer in r.layers} for name, r in reports.items()}
    names = list(dict.fromkeys(n for column in cells.values() for n in column))
    if not names:
        return sentences(title, "No layer was compressed.", note)
    shared = common(names)
    rows = {
        below(name, shared): [
            _measured(column[name]) if name in column else None for column in cells.values()
        ]
        for name in names
    }
    corner = f"layer in {shared}" if shared else "layer"
    return heat_map(title, corner, list(cells), rows, ERROR, "dense", note)


def _measured(layer: LayerReport) -> Cell:
    error = layer.error if layer.hessian_error is None else layer.hessian_error
    return Cell(error, percent(error), f"{layer.bits_per_weight:.2f} b/w")


ERROR = Key(
    "Relative squared error of a layer's output on calibration data (of the weight, where there "
    "was none)",
    percent,
    log=True,
)
